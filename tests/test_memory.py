"""What is said when memory runs out."""

import errno
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from molf import estimate, models, sharding
from molf.base import build
from molf.blocks import PathModel
from molf.config import check_params, read_yaml
from molf.errors import RunError, main
from molf.memory import explained
from molf.models import INFO, load_model
from molf.paths import write_json, write_parquet
from molf.tasks import TASKS
from tests.conftest import ROOT, frame

PARAMS = check_params(read_yaml(ROOT / "params.yaml"), "test")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize("error", [HOST, MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")])
def test_want_of_memory_says_what_to_lower_and_what_is_needed(error: Exception, base: Path) -> None:
    with pytest.raises(RunError) as caught, explained(base, PARAMS.methods["molf"], PARAMS.training):
        raise error
    said = str(caught.value)
    assert said.startswith("out of memory: ")
    assert re.search(r"This cell needs about \d+\.\d\d GB \(.*\) above its imports\. ", said), said
    assert "halve training.batch_size (now 8) and double training.gradient_accumulation (now 1)" in said
    assert "training.max_length (now 256)" in said and "training.moments to 8bit" in said


def test_several_processes_are_told_their_share_and_that_sharding_helps(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving what each holds is no way where it is done already, and 8-bit moments cannot be sharded."""

    def said(memory: int, method: str = "fft", **changes: Any) -> str:
        monkeypatch.setattr(sharding, "memory_of", lambda processes: memory)
        training = PARAMS.training.model_copy(update={"processes": 2, **changes})
        whole = estimate.for_cell(base, PARAMS.methods[method], training)
        wanted = {kind: estimate.per_process(whole, 2, kind) / 1e9 for kind in ("ddp", "fsdp")}
        with pytest.raises(RunError) as caught, explained(base, PARAMS.methods[method], training):
            raise MemoryError
        told = str(caught.value)
        kind = "fsdp" if "under fsdp" in told else "ddp"
        assert (
            f"Each of this cell's 2 processes needs about {wanted[kind]:.2f} GB above its imports under {kind}" in told
        )
        return told

    roomy, tight = said(10**12), said(10**6)
    assert "under ddp" in roomy and "set training.sharding to fsdp; set training.moments to 8bit" in roomy
    assert "under fsdp" in tight and "training.sharding" not in tight and "8bit" not in tight
    coded = said(10**6, moments="8bit")
    assert "under ddp" in coded and "training.sharding" not in coded


@pytest.mark.parametrize(
    "error",
    [
        HOST,
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
        SafetensorError("Error: Cannot allocate memory (os error 12)"),
    ],
)
def test_want_of_memory_says_nothing_against_a_model(
    base: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail_with(error))
    with pytest.raises(type(error)):
        load_model(base, torch.float32)
    with pytest.raises(RunError, match="^out of memory: "), explained(base, PARAMS.methods["fft"], PARAMS.training):
        load_model(base, torch.float32)


def fail_with(error: Exception) -> Any:
    """A function that raises it, whatever it is given."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", ["loading", "predicting"])
def test_an_evaluation_without_memory_says_which_key_to_lower(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    from molf.stages import evaluate

    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(base, tmp_path / "models/tiny")
    write_json(tmp_path / "models/tiny" / INFO, {"name": "tiny", "kind": "tiny", "generated": True})
    write_json(tmp_path / "data/prepared/fact/summary.json", {"data_hash": "x"})
    write_parquet(tmp_path / "data/prepared/fact/test.parquet", frame(4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", "tiny", "fact"])
    monkeypatch.setattr(models, "quiet", lambda: None)  # which is for good
    target, name = {"loading": (AutoModelForCausalLM, "from_pretrained"), "predicting": (TASKS["fact"], "predict")}[
        where
    ]
    monkeypatch.setattr(target, name, fail_with(HOST))
    assert main(evaluate.run) == 1
    said = capsys.readouterr().err
    assert "failed: out of memory: " in said
    assert f"lower evaluation.batch_size (now {PARAMS.evaluation.batch_size})" in said


def test_a_base_model_too_large_for_this_machine_is_a_message(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail_with(HOST))
    with pytest.raises(RunError, match=r"(?s)out of memory: .*models\.mine: its weights alone do not fit"):
        build("mine", PathModel(kind="path", path=str(base)), tmp_path / "out")


def test_what_is_done_already_is_not_advised(base: Path) -> None:
    lean = PARAMS.training.model_copy(update={"batch_size": 1, "moments": "8bit", "dtype": "bfloat16"})
    with pytest.raises(RunError) as caught, explained(base / "nowhere", PARAMS.methods["fft"], lean):
        raise MemoryError
    said = str(caught.value)
    assert "`molf estimate` shows what each cell needs. lower training.max_length (now 256). Where" in said


def test_an_allocation_that_fails_for_real_is_recognised(base: Path) -> None:
    with pytest.raises(RunError, match="out of memory"), explained(base, PARAMS.methods["fft"], PARAMS.training):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass(base: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained(base, PARAMS.methods["fft"], PARAMS.training):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
