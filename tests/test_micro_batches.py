"""`MOLF_MICRO_BATCHES`: a training that takes its batches in parts is the same training, with less memory."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from molf import models, tracking
from molf.batches import SeededBatches, SeededOrder, total_steps
from molf.checkpoint import Checkpoints
from molf.config import Training, check_params, read_yaml
from molf.errors import UserError, main
from molf.memory import MICRO_BATCHES, advice, parts_asked, split
from molf.paths import Cell, read_json
from molf.resume import Keeper
from molf.stages import compare, train
from molf.training import Outcome
from molf.training import train as train_model
from tests.cells import StopAfter, Stopped
from tests.conftest import ROOT, frame, talks


def budget(**changes: Any) -> Training:
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= {"max_length": 64, "batch_size": 4, "gradient_accumulation": 2, "epochs": 2, "threads": 1}
    data["training"] |= changes
    return check_params(data, "test").training


@pytest.mark.parametrize(
    ("changes", "parts", "share"),
    [
        ({}, 1, (4, 2)),
        ({}, 2, (2, 4)),
        ({}, 4, (1, 8)),
        ({}, 64, (1, 8)),  # no finer than a row
        ({"batch_size": 6}, 4, (2, 6)),  # 4 does not divide 6, 3 does
        ({"batch_size": 7}, 4, (7, 2)),
        ({"processes": 2}, 2, (2, 2)),
        ({"processes": 2, "gradient_accumulation": 1}, 2, (1, 2)),  # of the two rows that each has
    ],
)
def test_a_processs_rows_are_split_and_nothing_else(
    changes: dict[str, Any], parts: int, share: tuple[int, int]
) -> None:
    whole = budget(**changes)
    finer = split(whole, parts)
    assert finer.micro_batches() == share
    assert Training.model_validate(finer.model_dump()) == finer
    kept = {"batch_size", "gradient_accumulation"}
    assert finer.model_dump(exclude=kept) == whole.model_dump(exclude=kept)
    for examples in (5, 8, 23, 24, 25):
        assert total_steps(finer, examples) == total_steps(whole, examples)
        assert steps(finer, examples) == steps(whole, examples)


def steps(training: Training, examples: int) -> list[set[int]]:
    """Which examples each optimizer step of an epoch takes, over all processes."""
    rows, accumulation = training.micro_batches()
    order = SeededOrder(examples, 3)
    shares = [list(SeededBatches(order, rows, rank, training.processes)) for rank in range(training.processes)]
    found = []
    for start in range(0, len(shares[0]), accumulation):
        found.append({index for share in shares for batch in share[start : start + accumulation] for index in batch})
    return found


@pytest.mark.parametrize("text", ["0", "3", "-2", "two", "1.0", "²", " 2", "9" * 30])
def test_what_is_no_power_of_two_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(MICRO_BATCHES, text)
    with pytest.raises(UserError, match=rf"{MICRO_BATCHES}=.*: a power of two is needed \(1, 2, 4, ...\), or unset it"):
        parts_asked()


@pytest.mark.parametrize(("text", "number"), [("", 1), ("1", 1), ("2", 2), ("16", 16)])
def test_powers_of_two_are_taken(monkeypatch: pytest.MonkeyPatch, text: str, number: int) -> None:
    monkeypatch.setenv(MICRO_BATCHES, text)
    assert parts_asked() == number
    monkeypatch.delenv(MICRO_BATCHES)
    assert parts_asked() == 1


@pytest.mark.parametrize(
    ("rows", "parts", "said"), [(8, 1, "=2 "), (8, 2, "=4 "), (3, 1, "=4 "), (6, 4, "=8 "), (1, 1, ""), (8, 8, "")]
)
def test_who_lacks_memory_is_told_the_next_finer_split(rows: int, parts: int, said: str) -> None:
    told = advice(budget(batch_size=rows), parts=parts)
    assert f"{MICRO_BATCHES}{said}" in told if said else MICRO_BATCHES not in told


def trained_in(
    base: Path, folder: Path, method: str, rows: pd.DataFrame, training: Training, stop: int = 0
) -> Outcome | None:
    """Trains a cell that writes a checkpoint every two steps into a folder; None where it is ended after a step."""
    data = read_yaml(ROOT / "params.yaml")
    data["methods"]["molf"] |= {"r": [4]}
    block = check_params(data, "test").methods[method]
    keeper = Keeper(Checkpoints(folder / "checkpoints", {"cell": method}, keep=1), 2, None)
    ear = StopAfter(stop)
    try:
        return train_model(base, rows, block, training, 3, folder / "weights", folder / "scratch", ear, keeper)
    except Stopped:
        return None


def require_alike(one: Outcome | None, other: Outcome | None, one_folder: Path, other_folder: Path) -> None:
    """Equal losses and weights, within 1e-5."""
    assert one is not None and other is not None
    assert one.history["tokens"].sum() > 0
    for name in ("step", "tokens", "learning_rate"):
        assert one.history[name].tolist() == other.history[name].tolist()
    for name in ("loss", "grad_norm"):
        assert other.history[name].tolist() == pytest.approx(one.history[name].tolist(), rel=1e-5)
    ours, theirs = (load_file(folder / "weights/model.safetensors") for folder in (one_folder, other_folder))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.acceptance
@pytest.mark.parametrize(("method", "rows", "parts"), [("fft", frame, 4), ("fft", talks, 2), ("molf", frame, 2)])
def test_split_batches_train_what_whole_ones_train(
    base: Path, tmp_path: Path, method: str, rows: Callable[[int], pd.DataFrame], parts: int
) -> None:
    """Completions of unlike lengths, so that a mean over parts is no mean over tokens; the last step has fewer rows."""
    whole = trained_in(base, tmp_path / "whole", method, rows(22), budget())
    parted = trained_in(base, tmp_path / "split", method, rows(22), split(budget(), parts))
    require_alike(whole, parted, tmp_path / "whole", tmp_path / "split")


@pytest.mark.acceptance
@pytest.mark.parametrize("before", [1, 2])
def test_a_training_goes_on_with_another_split(base: Path, tmp_path: Path, before: int) -> None:
    """From within an epoch of three steps: step 4 is the first of the second."""
    whole = trained_in(base, tmp_path / "whole", "fft", frame(22), budget())
    own = tmp_path / "resumed"
    assert trained_in(base, own, "fft", frame(22), split(budget(), before), stop=5) is None
    resumed = trained_in(base, own, "fft", frame(22), split(budget(), 3 - before))
    assert resumed is not None and resumed.summary["resumed_at_steps"] == [4]
    require_alike(whole, resumed, tmp_path / "whole", own)


@pytest.mark.acceptance
def test_a_cell_of_split_batches_is_the_same_cell_and_says_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, cell = shutil.copytree(trained, tmp_path / "project"), Cell("tiny", "fact", "fft", 0)
    whole = read_json(root / cell.results / "train/run.json")
    monkeypatch.chdir(root)
    monkeypatch.setenv(MICRO_BATCHES, "8")  # of 4 rows
    monkeypatch.setattr(sys, "argv", ["train", "tiny", "fact", "fft", "0"])
    monkeypatch.setattr(models, "quiet", lambda: None)  # which is for good
    monkeypatch.setattr(tracking, "Store", lambda *_: (_ for _ in ()).throw(ConnectionError("none in this test")))
    assert main(train.run) == 0
    told = "each batch of 4 rows was taken as 4 of 1 (MOLF_MICRO_BATCHES): the same steps but for rounding and dropout"
    assert f"WARNING: {told}" in capsys.readouterr().out
    run, summary = (read_json(root / cell.results / f"train/{name}.json") for name in ("run", "summary"))
    assert (run["fingerprint"], run["config"]) == (whole["fingerprint"], whole["config"])
    assert summary["micro_batches"] == run["hardware"]["micro_batches"] == 4
    assert whole["hardware"]["micro_batches"] == 1
    assert run["hardware"]["fingerprint"] != whole["hardware"]["fingerprint"]
    assert main(compare.run) == 0
    [group] = read_json(root / "reports/comparison.json")["groups"]
    assert "one machine in unlike ways" in group["why_not_comparable"]
    assert "batches in 4 parts" in group["why_not_comparable"]
    assert any(text.startswith(told) for text in group["methods"][0]["warnings"])
