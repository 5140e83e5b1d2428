"""What processes that train together tell each other; a process on its own needs no process group for it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Waits for the other processes."""
    if world_size() > 1:
        dist.barrier()


def gathered(value: T) -> list[T]:
    """Every process's value, by rank; a few kilobytes of plain data, no tensors."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def agreed(work: Callable[[], T]) -> T:
    """What `work` returned in the first process, which alone runs it, in all."""
    if world_size() == 1:
        return work()
    values = [work() if rank() == 0 else None]
    dist.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


def anyone(flags: int) -> int:
    """The largest of all processes' numbers; cheap enough for every step."""
    return _reduced(flags, dist.ReduceOp.MAX)


def total(number: int) -> int:
    """The sum of all processes' numbers; likewise."""
    return _reduced(number, dist.ReduceOp.SUM)


def _reduced(number: int, operation: Any) -> int:
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, operation)
    return int(tensor)
