"""The estimate of a cell's memory holds against real trainings, and follows its budget."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molf import estimate
from molf.errors import UserError
from molf.estimate import Memory, Shape
from molf.methods import fourbit
from tests.peaks import params_of

ROOT = Path(__file__).parents[1]
CELLS: dict[str, dict[str, Any]] = {
    f"{method}-{rows}": {"method": method, "rows": rows, "length": 96}
    for method in ("fft", "lora", "molf", "molf-e")
    for rows in (4, 8)
}
CELLS["molf-dense-5"] = {"method": "molf", "forward": "dense", "rows": 5, "length": 96}
CELLS["molf-2x3"] = {"method": "molf", "rows": 3, "length": 96, "training": {"gradient_accumulation": 2}}
for _name, _block in (("dora", {"use_dora": True}), ("pissa", {"init_lora_weights": "pissa"})):
    CELLS[_name] = {"method": "lora", "rows": 8, "length": 96, "block": _block}
for _method in ("fft", "molf"):
    CELLS[f"{_method}-8bit-8"] = {"method": _method, "rows": 8, "length": 96, "training": {"moments": "8bit"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 12 million parameters whose tokenizer knows letters."""
    from transformers import Qwen2ForCausalLM

    from molf import tiny

    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny.train_tokenizer(["a"], 300)
    config = tiny.architecture(layers=4, width=512, heads=8, vocabulary=4096)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def peaks(base: Path) -> dict[str, int]:
    """Measured bytes of each cell; those whose library is not installed are left out."""
    cells = {name: cell for name, cell in CELLS.items() if "8bit" not in name or importlib.util.find_spec("torchao")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.peaks", str(base)],
        input=json.dumps(list(cells.values())),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cells, map(int, done.stdout.split()), strict=True))


def memory(base: Path, cell: dict[str, Any]) -> Memory:
    params = params_of(cell)
    shape = Shape(cell["rows"], cell["length"], cell["length"] // 4 + 1)
    return estimate.for_cell(base, params.methods[cell["method"]], params.training, shape)


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="measures Linux's host")
@pytest.mark.parametrize("name", CELLS)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(base: Path, peaks: dict[str, int], name: str) -> None:
    if name not in peaks:
        pytest.skip("torchao is not installed")
    assert peaks[name] > 150e6, "too small a cell to measure"
    assert memory(base, CELLS[name]).total == pytest.approx(peaks[name], rel=0.2)


def test_activations_grow_with_the_batch_and_states_do_not(base: Path) -> None:
    for method in ("fft", "lora", "molf", "molf-e"):
        small, large = (memory(base, {"method": method, "rows": rows, "length": 96}).parts for rows in (6, 12))
        assert large["activations"] == pytest.approx(
            2 * small["activations"], rel=0.1
        )  # at another moment of the backward
        assert {p: small[p] for p in ("weights", "AdamW moments")} == {
            p: large[p] for p in ("weights", "AdamW moments")
        }


def test_parts_are_those_of_the_method(base: Path) -> None:
    cell = {"rows": 2, "length": 64}
    fft, lora, molf, efficient = (memory(base, cell | {"method": name}) for name in ("fft", "lora", "molf", "molf-e"))
    assert fft.trained == fft.parameters == molf.parameters - molf.parts["experts"] // 4
    assert 0 <= fft.parts["weights"] - 4 * fft.parameters < 1000  # the rotary frequencies are a buffer
    assert fft.parts["AdamW moments"] == 8 * fft.parameters and "experts" not in fft.parts
    assert molf.phases["optimizer step"]["experts' gradients"] == molf.parts["experts"]
    for adapter in (lora, efficient):
        assert adapter.trained * 4 == adapter.parts["experts"] == adapter.saved
        assert adapter.parts["AdamW moments"] == 2 * adapter.parts["experts"]
        assert adapter.checkpoint == 3 * adapter.saved
    packed = memory(base, cell | {"method": "lora", "block": {"base_bits": 4}})
    linears = lora.phases["loading"]["weights"] - 4 * 4096 * 512  # the embedding is the head
    assert packed.phases["loading"]["weights"] == lora.phases["loading"]["weights"] and packed.trained == lora.trained
    assert lora.phases["saving"]["weights"] - packed.phases["saving"]["weights"] == pytest.approx(
        (1 - fourbit.PER_WEIGHT / 4) * linears, rel=0.1
    )
    pissa = memory(base, cell | {"method": "lora", "block": {"init_lora_weights": "pissa"}})
    assert (pissa.trained, pissa.saved, pissa.checkpoint) == (lora.trained, 2 * lora.saved, 4 * lora.saved)
    assert efficient.modules == molf.modules == 7 * 4 and not fft.modules and not lora.modules
    coded = memory(base, cell | {"method": "fft", "training": {"moments": "8bit"}})
    assert 0.25 < coded.parts["AdamW moments"] / fft.parts["AdamW moments"] < 0.26
    half = memory(base, cell | {"method": "fft", "training": {"dtype": "bfloat16"}})
    assert half.parts["weights"] < 0.51 * fft.parts["weights"]
    assert half.parts["AdamW moments"] == fft.parts["AdamW moments"]


def test_several_processes_hold_all_or_a_share_each(base: Path) -> None:
    whole = memory(base, {"method": "fft", "rows": 2, "length": 64})
    assert estimate.per_process(whole, 1, "fsdp") == whole.total
    ddp, fsdp = (estimate.per_process(whole, 2, sharding) for sharding in ("ddp", "fsdp"))
    assert ddp == whole.total + 4 * whole.parameters
    assert fsdp < whole.total - 0.4 * (whole.parts["weights"] + whole.parts["AdamW moments"]) + 2 * whole.largest_layer


def test_each_phase_is_shared_in_its_own_way() -> None:
    step = {"weights": 400, "AdamW moments": 800, "gradients": 400}
    phases = {
        "loading": {"weights": 400, "checkpoint file": 200},
        "forward and backward": {**step, "activations": 100},
        "optimizer step": step,
        "saving": {"weights": 400, "AdamW moments": 800, "file's content": 400},
    }
    host = Memory(phases, 100, 100, 400, 1200, 0, 10)
    # The forward with buckets; the first process's shards beside the whole model and the file's content.
    assert estimate.per_process(host, 4, "ddp") == 1700 + 400
    assert estimate.per_process(host, 4, "fsdp") == 300 + 400 + 400
    # The forward and two gathered layers: on a GPU nothing whole is ever held.
    assert estimate.per_process(replace(host, cuda=True), 4, "fsdp") == 400 + 100 + 2 * 10
    # A frozen model: to load it is the most, and neither shards nor buckets change that.
    adapter = {"weights": 400, "experts": 4, "AdamW moments": 8}
    frozen = {
        "loading": phases["loading"],
        "forward and backward": {**adapter, "activations": 10},
        "optimizer step": {**adapter, "gradients": 4},
        "saving": {**adapter, "file's content": 4},
    }
    loaded = Memory(frozen, 1, 101, 4, 12, 0, 10)
    assert estimate.per_process(loaded, 4, "ddp") == loaded.total == 600
    assert estimate.per_process(loaded, 4, "fsdp") == 600


def test_asking_changes_no_random_number_and_says_the_parts(base: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sentence = memory(base, {"method": "lora", "rows": 2, "length": 64}).sentence()
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert sentence.startswith("about 0.") and "weights 0.0" in sentence and sentence.count(",") >= 3


def test_a_folder_that_is_no_model_is_a_message(tmp_path: Path) -> None:
    params = params_of({"method": "fft", "rows": 2, "length": 64})
    with pytest.raises(UserError, match=r"has no config\.json that transformers reads"):
        estimate.for_cell(tmp_path, params.methods["fft"], params.training)
