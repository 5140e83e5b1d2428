"""What to do when a training or an evaluation does not fit into memory, with the figure that it needs."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from molf.blocks import MethodBlock
from molf.config import Training
from molf.errors import RunError, first_line
from molf.models import ran_out


def advice(training: Training, shared: str | None = None, fsdp_helps: bool = True) -> str:
    """Which keys of params.yaml to change, and what they are now.

    Args:
        training: The budget, the task's overrides included.
        shared: How several processes share the cell: `ddp` or `fsdp`; None: not known, or there is one process.
        fsdp_helps: Whether they would need less with `fsdp`.
    """
    ways = []
    if training.batch_size > 1:
        ways.append(
            f"halve training.batch_size (now {training.batch_size}) and double training.gradient_accumulation "
            f"(now {training.gradient_accumulation}), which trains alike"
        )
    ways.append(f"lower training.max_length (now {training.max_length})")
    if training.processes > 1 and shared != "fsdp" and training.moments == "float32" and fsdp_helps:
        ways.append("set training.sharding to fsdp")
    if training.moments == "float32" and shared != "fsdp":  # which has no 8-bit moments
        ways.append("set training.moments to 8bit")
    if training.dtype != "bfloat16":
        ways.append("set training.dtype to bfloat16")
    return f"{'; '.join(ways)}. Where tasks.TASK.training has the key, that one counts"


def needed(base: Path, block: MethodBlock, training: Training) -> str:
    """The estimate in a sentence, or where to find it if it cannot be made now, and `advice`."""
    from molf import estimate, sharding

    try:
        memory = estimate.for_cell(base, block, training)
        shared = sharding.of(lambda: memory, training)
        if shared is None:
            return f"This cell needs {memory.sentence()} above its imports. {advice(training)}"
        ddp, fsdp = (estimate.per_process(memory, training.processes, kind) for kind in ("ddp", "fsdp"))
        return (
            f"Each of this cell's {training.processes} processes needs about "
            f"{(fsdp if shared == 'fsdp' else ddp) / 1e9:.2f} GB above its imports under {shared}. "
            f"{advice(training, shared, fsdp < ddp)}"
        )
    except Exception:  # the message must come in any case, and memory is short
        given = None if training.sharding == "auto" else training.sharding
        return f"`molf estimate` shows what each cell needs. {advice(training, given)}"


@contextlib.contextmanager
def explained(base: Path, block: MethodBlock, training: Training) -> Iterator[None]:
    """Turns want of memory within its `with` block into an error that says what to lower in `training`.

    Args:
        base: Folder of the base model.
        block: The method's.
        training: The budget, the task's overrides included.

    Raises:
        RunError: Memory ran out.
    """
    with explained_by(lambda: needed(base, block, training)):
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
