"""The benchmarks run end to end at tiny sizes, and their table says what their samples say; never how fast."""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import precision, real
from benchmarks.__main__ import cases, run
from benchmarks.device import Device
from benchmarks.measure import Row, Skipped, side_by_side
from benchmarks.optimizer import GEMMA, LAYERS, gemma_linears
from benchmarks.table import markdown
from benchmarks.workloads import Trainee, batch, build, step_flops
from molf import molf_modules, tiny

# One thread: at tiny sizes two wait for each other more than they work.
QUICK = ("--quick", "--threads", "1")


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """Other tests keep the threads that they found."""
    found = torch.get_num_threads()
    yield
    torch.set_num_threads(found)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Whole-step and optimizer cases at tiny sizes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    run([*QUICK, "--only", "step", "optimizer", "--into", str(folder), "--name", "t"])
    found: dict[str, Any] = json.loads((folder / "t.json").read_text())
    return found


def test_the_file_holds_every_sample_and_what_follows_from_them(measured: dict[str, Any]) -> None:
    assert measured["environment"]["threads"] == 1 and measured["environment"]["quick"]
    assert set(measured["cases"]) == {"step", "optimizer"} and measured["skipped"] == {}
    rows = [row for case in measured["cases"].values() for row in case["rows"]]
    assert len(rows) == 4 + 6
    for row in rows:
        assert len(row["samples"]) == len(row["reference"]) == 2 and min(row["samples"] + row["reference"]) > 0
        ratios = [a / b for a, b in zip(row["samples"], row["reference"], strict=True)]
        assert row["ratio"]["median"] == pytest.approx(statistics.median(ratios))
        assert (row["ratio"]["min"], row["ratio"]["max"]) == (min(ratios), max(ratios))
        assert row["met"] == (None if row["limit"] is None else row["ratio"]["median"] <= row["limit"])
    assert [row["limit"] for row in rows] == [1.15, None, 1.10, None, 2.0, None, 2.0, None, 2.0, None]


def test_the_floor_counts_the_bytes_of_the_winners(measured: dict[str, Any]) -> None:
    data = measured["cases"]["optimizer"]["data"]
    size, lora = data["parameters"], data["lora_parameters"]
    wins = {name: data[name]["winning_parameters"] for name in data if isinstance(data[name], dict)}
    assert wins["the base wins everywhere"] == size - lora and wins["LoRA wins everywhere"] == lora
    assert lora < wins["free choice"] < size - lora
    for name, won in wins.items():
        assert data[name]["ratio"] == pytest.approx((5 * size + 4 * won) / (7 * size))


def test_every_phase_of_the_step_is_timed(measured: dict[str, Any]) -> None:
    for found in measured["cases"]["step"]["data"].values():
        assert set(found["phases"]) == {"fft", "molf", "molf-dense"} and found["model_flops"] > 0
        assert all(len(seconds) == 5 and min(seconds.values()) > 0 for seconds in found["phases"].values())


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([*QUICK, "--only", "efficient-memory", "head", "--into", str(tmp_path), "--name", "t"])
    found = json.loads((tmp_path / "t.json").read_text())
    peak = found["cases"]["efficient-memory"]["rows"][0]
    assert peak["unit"] == "B" and peak["limit"] == 1.05 and 0 < peak["samples"][0] < 1e9
    assert "Gemma 3 270M is not here" in found["skipped"]["head"]
    assert "| MoLF-Efficient peak memory, r=(32, 128)" in capsys.readouterr().out


def test_the_choice_of_layers_is_measured_beside_uniform_lora(tmp_path: Path) -> None:
    run([*QUICK, "--only", "selected", "--into", str(tmp_path), "--name", "t"])
    case = json.loads((tmp_path / "t.json").read_text())["cases"]["selected"]
    told = case["data"]["tiny"]
    assert len(case["rows"]) == len(told["sides"]) == 5 and {row["limit"] for row in case["rows"]} == {None}
    for side, of in told["sides"].items():
        share = float(side.rpartition(" ")[2])
        assert 0.85 * share < of["parameters"] / told["uniform_parameters"] <= share  # narrow layers end at full rank
        assert of["layers"] == ([1] if side.startswith("the upper") else [0])
    assert told["probe_seconds"] > 0


def test_a_row_judges_its_median_from_the_right_side() -> None:
    fast = Row("a", "b", "tokens/s", [30.0, 10.0, 40.0], [10.0, 10.0, 20.0], 1.5, at_least=True)
    slow = Row("c", "b", "s", [1.3, 1.0, 1.3], [1.0, 1.0, 1.0], 1.15)
    assert fast.ratio == 2.0 and fast.met is True and slow.ratio == 1.3 and slow.met is False
    lines = markdown([fast, slow, Row("d", "b", "B", [2e6], [1e6])]).splitlines()
    assert "| 2.000 (1.000 to 3.000)" in lines[2] and "at least 1.50 | yes" in lines[2]
    assert "| 1.300 (1.000 to 1.300)" in lines[3] and "at most 1.15  | NO " in lines[3]
    assert "reported" in lines[4] and "2.0 MB : 1.0 MB" in lines[4]


def test_sides_take_turns() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "AB"}
    seconds = side_by_side(sides, Device("cpu"), rounds=3, warmup=1)
    assert "".join(calls) == "AB" + "AB" + "BA" + "AB"
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}


def test_the_models_are_those_of_the_issue() -> None:
    assert sum(p.numel() for p in build("qwen2-28m").parameters()) == pytest.approx(28e6, rel=0.02)
    linears = gemma_linears(1, 128, "dense", "cpu")
    assert len(molf_modules(linears)) * LAYERS == 126
    assert sum(m * k + 128 * (m + k) for m, k in GEMMA.values()) == sum(p.numel() for p in linears.parameters())


def test_a_steps_flops_are_those_of_its_matrix_products() -> None:
    model, sequences, length = build("tiny"), 3, 8
    from torch.utils.flop_counter import FlopCounterMode

    ids = batch(model, sequences, length, Device("cpu"))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_total_flops()
    # The counter sees all or none of the attention, by the kernel that runs.
    assert step_flops(model, sequences, length) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("kind", ["fft", "molf", "molf-dense", "molf-e", "lora"])
def test_a_trainees_step_moves_the_model_and_records_routing(kind: str) -> None:
    trainee = Trainee(kind, build("tiny"), Device("cpu"))
    before = [p.detach().clone() for p in trainee.params]
    trainee.step(batch(trainee.model, 2, 8, Device("cpu")))
    assert any(not torch.equal(old, new) for old, new in zip(before, trainee.params, strict=True))
    assert (trainee.recorder is not None) == (kind.startswith("molf"))
    if trainee.recorder is not None:
        assert trainee.recorder.summary()["steps"] == 1
    factors = [p for _, m in molf_modules(trainee.model) for p in (*m.lora_A, *m.lora_B)]
    assert trainee.expert_bytes() == 12 * sum(p.numel() for p in factors)


def test_missing_rows_skip_with_their_path(tmp_path: Path) -> None:
    with pytest.raises(Skipped, match=f"{tmp_path}.*--shared"):
        real.rows("fact", tmp_path)


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["--only", "speed"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and all(f"'{name}'" in said for name in cases())


def test_precision_weighs_what_a_real_training_leaves(tmp_path: Path) -> None:
    import pandas as pd

    base, rows = tmp_path / "base", tmp_path / "rows.parquet"
    tiny.build(base, seed=0, layers=1, width=32, heads=2, vocabulary=400, steps=3, progress=False)
    pd.DataFrame({"prompt": ["Who? A", "Who? B"] * 4, "completion": [" one", " two"] * 4}).to_parquet(rows)
    cells = [precision.train_cell(base, rows, "fft", dtype, "float32", 2, None) for dtype in ("float32", "bfloat16")]
    full, half = cells
    assert full["steps"] == half["steps"] == len(full["losses"]) == 2 and math.isfinite(full["final_loss"])
    assert full["weights_bytes"] == 2 * half["weights_bytes"] > 0
    # Two moments of four bytes each, and a step count for each parameter.
    assert full["moments_bytes"] == pytest.approx(2 * full["weights_bytes"], rel=0.02)
    table = precision.lines(cells).splitlines()
    assert "| fft | float32 | float32 |" in table[2] and table[2].endswith("| +0.0000 |")
    assert f"{half['final_loss'] - full['final_loss']:+.4f}" in table[3]
