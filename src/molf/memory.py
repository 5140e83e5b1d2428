"""What to do when a training does not fit into memory, with the figure that it needs."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from molf.config import MethodBlock, Training
from molf.errors import RunError
from molf.models import first_line

# Of RuntimeErrors: torch's host allocator, and CUDA's libraries.
WORDS = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a GPU."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and WORDS.search(str(error)) is not None


def advice(training: Training) -> str:
    """Which keys of params.yaml to change, and what they are now."""
    ways = []
    if training.batch_size > 1:
        ways.append(
            f"halve training.batch_size (now {training.batch_size}) and double training.gradient_accumulation "
            f"(now {training.gradient_accumulation}), which trains alike"
        )
    ways.append(f"lower training.max_length (now {training.max_length})")
    if training.moments == "float32":
        ways.append("set training.moments to 8bit")
    if training.dtype != "bfloat16":
        ways.append("set training.dtype to bfloat16")
    return f"{'; '.join(ways)}. Where tasks.TASK.training has the key, that one counts"


def needed(base: Path, block: MethodBlock, training: Training) -> str:
    """The estimate in a sentence, or where to find it if it cannot be made now."""
    from molf import estimate

    try:
        return f"This cell needs {estimate.for_cell(base, block, training).sentence()} above its imports"
    except Exception:  # the message must come in any case, and memory is short
        return "`molf estimate` shows what each cell needs"


@contextlib.contextmanager
def explained(base: Path, block: MethodBlock, training: Training) -> Iterator[None]:
    """Turns want of memory within its `with` block into an error that says what to lower.

    Args:
        base: Folder of the base model.
        block: The method's.
        training: The budget, the task's overrides included.

    Raises:
        RunError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # lets go of model and batch
        raise RunError(
            f"out of memory: {first_line(error)}\n{needed(base, block, training)}. {advice(training)}"
        ) from None
