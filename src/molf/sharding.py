"""How several processes share a cell: each with all of it (DDP), or each with a shard (FSDP2).

Both are accelerate's. Every process computes on its own examples; gradients are averaged over all of them.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from molf import estimate
from molf.collective import agreed, gathered, hosts, rank, world_size
from molf.config import Training
from molf.errors import RunError
from molf.method_blocks import MethodBlock
from molf.models import load_model, weight_dtype

if TYPE_CHECKING:
    from accelerate import FullyShardedDataParallelPlugin

# Of a process's memory, what `auto` lets DDP take: its imports and what else runs there need some too.
SHARE = 0.85


def choose(base: Path, block: MethodBlock, training: Training, shape: estimate.Shape) -> str | None:
    """`ddp` or `fsdp`, the same in every process; None for one process alone.

    Args:
        base: Folder of the base model.
        block: The method's block of params.yaml.
        training: The budget, the task's overrides included.
        shape: Of a process's largest micro-batch.
    """
    return agreed(lambda: of(lambda: estimate.for_cell(base, block, training, shape), block, training))


def of(memory: Callable[[], estimate.Memory], block: MethodBlock, training: Training) -> str | None:
    """`ddp` or `fsdp`, by the budget and this machine; None for one process alone.

    Args:
        memory: Estimates the cell as one process alone would train it; asked only where the choice depends on it.
        block: The method's block of params.yaml.
        training: The budget, the task's overrides included.
    """
    if training.processes == 1:
        return None
    if training.sharding != "auto":
        return training.sharding
    if training.moments == "8bit" or "fsdp" in block.unfit():
        return "ddp"  # 8-bit codes are in blocks that know no rows
    needed = estimate.per_process(memory(), training.processes, "ddp")
    return "ddp" if needed <= SHARE * memory_of(training.processes) else "fsdp"


def memory_of(processes: int) -> int:
    """Bytes that each of so many processes has: a GPU's, or its part of its host's, all being alike."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            total = min(total, int(limit))
    return total // max(1, processes // hosts())


def use_fsdp(accelerator: Any) -> None:
    """Makes an Accelerator shard what it prepares.

    accelerate itself does so on accelerators only (`AcceleratorState` looks for MULTI_GPU and its like); on the host
    FSDP2 works as well, which is how the tests hold it against one process. So it is told here, alike for both.
    """
    from accelerate.utils import DistributedType

    accelerator.state.fsdp_plugin = plugin()
    accelerator.state.distributed_type = DistributedType.FSDP


def plugin() -> "FullyShardedDataParallelPlugin":
    """FSDP2, each decoder layer a unit of its own, and the rest one more."""
    from accelerate import FullyShardedDataParallelPlugin

    # No mixed precision of FSDP's own, though gathering bfloat16 would need less memory: it would run norms and
    # embeddings in bfloat16 too, and `auto` may shard one method of a grid and not another. Under autocast
    # (`CellTrainer.compute_loss`) all compute in one precision.
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=None,
    )


def require_same(tensors: Iterable[torch.Tensor], what: str) -> None:
    """Checks that every process holds the same bits.

    Raises:
        RunError: They differ.
    """
    if world_size() > 1 and len({tuple(sums) for sums in gathered([_bits(tensor) for tensor in tensors])}) > 1:
        raise RunError(f"the processes of this cell hold different {what}: they would train different models")


def _bits(tensor: torch.Tensor) -> int:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().flatten().view(whole).sum(dtype=torch.int64))


def whole_model(
    sharded: torch.nn.Module, method: ModuleType, block: MethodBlock, base: Path, training: Training
) -> PreTrainedModel | None:
    """The trained model as one process would hold it, on the host: in the first process, None in the others.

    Raises:
        RuntimeError: The model prepared anew is not the one that was trained.
    """
    whole = None
    if rank() == 0:
        whole = method.prepare(load_model(base, weight_dtype(training.dtype)), block, None)
    own = dict(whole.named_parameters()) if whole is not None else {}
    for name, parameter in sharded.named_parameters():
        full = full_tensor(parameter)
        if whole is not None:
            if name not in own or own[name].shape != full.shape:
                raise RuntimeError(f"{name} is not in the model that is to be saved")
            own.pop(name).data.copy_(full)
    if own:
        raise RuntimeError(f"{', '.join(sorted(own)[:3])}: not in the model that was trained")
    return whole


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process may hold a shard; every process must ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
