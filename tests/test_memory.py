"""What is said when memory runs out."""

import re
from pathlib import Path

import pytest
import torch

from molf.config import check_params, read_yaml
from molf.errors import RunError
from molf.memory import explained
from tests.conftest import ROOT

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
