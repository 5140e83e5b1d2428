"""What to do when a training or an evaluation does not fit into memory, with the figure that it needs."""

import contextlib
import os
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from molf.config import Training
from molf.errors import RunError, UserError, first_line
from molf.method_blocks import MethodBlock
from molf.models import ran_out

MICRO_BATCHES = "MOLF_MICRO_BATCHES"  # variable of the environment


def parts_asked() -> int:
    """In how many parts a training takes each of its micro-batches: what `MOLF_MICRO_BATCHES` says, else 1.

    Not a key of params.yaml: it changes no result beyond rounding, so that a cell whose memory ran out is trained with
    it, and counts as the cell that params.yaml asks for.

    Raises:
        UserError: It is no power of two.
    """
    text = os.environ.get(MICRO_BATCHES, "") or "1"
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if number.bit_count() != 1:
        raise UserError(f"{MICRO_BATCHES}={text}: a power of two is needed (1, 2, 4, ...), or unset it")
    return number


def split(training: Training, parts: int) -> Training:
    """The same optimizer steps with less memory: each micro-batch of a process is taken as several, one by one.

    Args:
        training: The budget.
        parts: How many; the largest number up to it that divides the micro-batch's rows is taken.
    """
    rows, accumulation = training.micro_batches()
    parts = next(number for number in range(min(parts, rows), 0, -1) if rows % number == 0)
    if parts == 1:
        return training
    budget = {"batch_size": rows // parts, "gradient_accumulation": training.processes * accumulation * parts}
    return training.model_copy(update=budget)


def advice(training: Training, shared: str | None = None, fsdp_helps: bool = True, parts: int = 1) -> str:
    """Which keys of params.yaml to change, and what they are now.

    Args:
        training: The budget, the task's overrides included.
        shared: How several processes share the cell: `ddp` or `fsdp`; None: not known, or there is one process.
        fsdp_helps: Whether they would need less with `fsdp`.
        parts: In which each micro-batch was taken.
    """
    ways = []
    if training.batch_size > 1:
        ways.append(
            f"halve training.batch_size (now {training.batch_size}) and double training.gradient_accumulation "
            f"(now {training.gradient_accumulation}), which trains alike"
        )
    rows = split(training, parts).micro_batches()[0]
    finer = (2**power for power in range(1, 31) if split(training, 2**power).micro_batches()[0] < rows)
    if (number := next(finer, None)) is not None:
        ways.append(f"or set {MICRO_BATCHES}={number} in the environment, which trains alike too and changes no params")
    ways.append(f"lower training.max_length (now {training.max_length})")
    if training.processes > 1 and shared != "fsdp" and training.moments == "float32" and fsdp_helps:
        ways.append("set training.sharding to fsdp")
    if training.moments == "float32" and shared != "fsdp":  # which has no 8-bit moments
        ways.append("set training.moments to 8bit")
    if training.dtype != "bfloat16":
        ways.append("set training.dtype to bfloat16")
    return f"{'; '.join(ways)}. Where tasks.TASK.training has the key, that one counts"


def needed(base: Path, block: MethodBlock, training: Training, parts: int = 1) -> str:
    """The estimate in a sentence, or where to find it if it cannot be made now, and `advice`."""
    from molf import estimate, sharding

    try:
        memory = estimate.for_cell(base, block, split(training, parts))
        shared = sharding.of(lambda: memory, block, training)
        if shared is None:
            return f"This cell needs {memory.sentence()} above its imports. {advice(training, parts=parts)}"
        ddp, fsdp = (estimate.per_process(memory, training.processes, kind) for kind in ("ddp", "fsdp"))
        return (
            f"Each of this cell's {training.processes} processes needs about "
            f"{(fsdp if shared == 'fsdp' else ddp) / 1e9:.2f} GB above its imports under {shared}. "
            f"{advice(training, shared, fsdp < ddp, parts)}"
        )
    except Exception:  # the message must come in any case, and memory is short
        given = None if training.sharding == "auto" else training.sharding
        return f"`molf estimate` shows what each cell needs. {advice(training, given, parts=parts)}"


@contextlib.contextmanager
def explained(base: Path, block: MethodBlock, training: Training, parts: int = 1) -> Iterator[None]:
    """Turns want of memory within its `with` block into an error that says what to lower in `training`.

    Args:
        base: Folder of the base model.
        block: The method's.
        training: The budget, the task's overrides included.
        parts: In which each of its micro-batches is taken.

    Raises:
        RunError: Memory ran out.
    """
    with explained_by(lambda: needed(base, block, training, parts)):
        yield


@contextlib.contextmanager
def explained_by(say: Callable[[], str]) -> Iterator[None]:
    """Turns want of memory within its `with` block into an error that ends with what `say` returns.

    Raises:
        RunError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # lets go of model and batch
        raise RunError(f"out of memory: {first_line(error)}\n{say()}") from None
