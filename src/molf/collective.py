"""What processes that train together tell each other; a process on its own needs no process group for it.

Values travel as JSON, since what torch offers for objects unpickles whatever arrives. They come back as JSON has them,
tuples as lists, of one process alone too.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def hosts() -> int:
    """On how many hosts they run, alike on each."""
    return world_size() // int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def barrier() -> None:
    """Waits for the other processes."""
    if world_size() > 1:
        dist.barrier()


def gathered(value: Any) -> list[Any]:
    """Every process's value, by rank; a few kilobytes of plain data, no tensors.

    Raises:
        TypeError: The value is not plain data.
    """
    mine = _encoded(value)
    if world_size() == 1:
        return [_decoded(mine)]
    lengths = [torch.zeros_like(_length(mine)) for _ in range(world_size())]
    dist.all_gather(lengths, _length(mine))
    longest = max(map(int, lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=mine.device)
    padded[: len(mine)] = mine
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [_decoded(text[: int(length)]) for text, length in zip(texts, lengths, strict=True)]


def agreed(work: Callable[[], Any]) -> Any:
    """What `work` returned in the first process, which alone runs it, in all; plain data likewise."""
    text = _encoded(work() if rank() == 0 else None)
    if world_size() > 1:
        length = _length(text)
        dist.broadcast(length, 0)
        if rank() > 0:
            text = torch.empty(int(length), dtype=torch.uint8, device=length.device)
        dist.broadcast(text, 0)
    return _decoded(text)


def anyone(flags: int) -> int:
    """The largest of all processes' numbers; cheap enough for every step."""
    return _reduced(flags, dist.ReduceOp.MAX)


def total(number: int) -> int:
    """The sum of all processes' numbers; likewise."""
    return _reduced(number, dist.ReduceOp.SUM)


def _reduced(number: int, operation: Any) -> int:
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=_device())
    dist.all_reduce(tensor, operation)
    return int(tensor)


def _encoded(value: Any) -> Tensor:
    """JSON as bytes, where the process group can send them from."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())


def _decoded(text: Tensor) -> Any:
    return json.loads(text.cpu().numpy().tobytes())


def _length(text: Tensor) -> Tensor:
    return torch.tensor(len(text), device=text.device)


def _device() -> str:
    return "cuda" if world_size() > 1 and dist.get_backend() == "nccl" else "cpu"
