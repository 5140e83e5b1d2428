"""How much memory a cell's training needs, from its model's config and its budget alone: nothing is run or loaded.

`cell_memory` walks one training step of the cell's own model, adapted by the cell's own method, with fake tensors: they
have shapes and no data. Every allocation and every release is counted while forward and backward run, so that each
architecture, adapter and forward is estimated by its own code. What lies outside forward and backward (AdamW's moments,
the experts' gradients, loading, saving) is added from the parameters' sizes.

    memory = estimate.for_cell(base, block, training)           # a model's folder; the longest examples that may come
    memory.total                                                # bytes of one process above its imports
    memory.sentence()                                           # "about 3.1 GB: weights 1.1, ..." for a message
    estimate.for_cell(base, block, training, shape).total       # of a batch whose shape is known
    estimate.per_process(memory, processes=4, sharding="ddp")   # bytes of each process
"""

import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from molf import kernels
from molf.adamw import WORTH_COMPILING
from molf.config import Training
from molf.errors import UserError
from molf.method_blocks import MethodBlock
from molf.nn import MoLFLinear

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What a process on the CPU takes beside its tensors, fitted to measurements (glibc 2.36, torch 2.13) and held by
# tests/test_estimate.py. The code and buffers of the kernels that run, in bytes:
KERNELS = 60_000_000
# What torch.compile takes in the process that calls it (100 MB when the code is in its cache, 220 MB when not):
COMPILER = 150_000_000
# Torch asks for aligned blocks, and glibc then needs a hole larger than the block that it just freed: of the bytes
# freed in the forward and of those made in the backward, these shares find no second use. Blocks over 32 MiB go back to
# the system at once.
STRANDED = {"forward": 0.26, "backward": 0.12}
LARGE_BLOCK = 32 << 20
# Parts that FSDP divides among the processes.
DIVIDED = ("weights", "experts", "AdamW moments", "gradients", "experts' gradients")


@dataclass(frozen=True)
class Shape:
    """A micro-batch: `rows` examples padded to `length` tokens, the head run on the last `keep` positions."""

    rows: int
    length: int
    keep: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process above what its imports take, by phase of a training and by part, and what follows from it.

    Phases do not add up: the peak is the largest. Parts of a phase do.
    """

    phases: dict[str, dict[str, int]]
    trained: int  # parameters
    parameters: int  # all of them; tied weights once
    saved: int  # bytes of the weights or the adapter that the cell leaves
    checkpoint: int  # bytes of one checkpoint: what is trained, and its moments
    modules: int  # with experts; 0 where nothing is routed
    largest_layer: int  # bytes of the weights of the largest repeated block, which FSDP gathers whole
    cuda: bool = False  # whether the bytes are a GPU's

    @property
    def peak(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """The peak's parts, in bytes."""
        return self.phases[self.peak]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def sentence(self) -> str:
        """`about 3.1 GB (weights 1.1, AdamW moments 1.1, ...)`: the total and its parts of at least 2 %, in GB."""
        large = sorted(((size, part) for part, size in self.parts.items() if size >= 0.02 * self.total), reverse=True)
        return f"about {self.total / 1e9:.2f} GB ({', '.join(f'{part} {size / 1e9:.2f}' for size, part in large)})"


def for_cell(base: Path, block: MethodBlock, training: Training, shape: Shape | None = None) -> Memory:
    """`cell_memory` of a model's folder.

    Args:
        base: Folder with a transformers checkpoint.
        block: The method's block of params.yaml.
        training: The budget, the task's overrides included.
        shape: Of the largest micro-batch; by default `training.max_length` tokens, a quarter of them supervised.

    Raises:
        UserError: The folder has no readable config.json, or the method does not fit the model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{base} has no config.json that transformers reads: {error}") from None
    stored = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    shape = shape or Shape(training.micro_batches()[0], training.max_length, training.max_length // 4 + 1)
    return cell_memory(config, block, training, shape, cuda=torch.cuda.is_available(), stored=stored)


def cell_memory(
    config: "PretrainedConfig",
    block: MethodBlock,
    training: Training,
    shape: Shape,
    *,
    cuda: bool = False,
    stored: int = 0,
) -> Memory:
    """Bytes that one process needs to train a cell alone, above its imports.

    Args:
        config: The architecture, as transformers describes it.
        block: The method's block of params.yaml.
        training: The budget; its dtype, moments and gradient_accumulation count.
        shape: Of the largest micro-batch.
        cuda: Whether it runs under bfloat16 autocast where `training.dtype` is auto.
        stored: Bytes of the checkpoint's files, which stay mapped while weights are made in another dtype.

    Raises:
        UserError: The method does not fit the model.
    """
    from transformers import AutoModelForCausalLM

    from molf.methods import METHODS, fourbit
    from molf.models import weight_dtype

    dtype = weight_dtype(training.dtype)
    # The caller's random numbers must not depend on whether it asked.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
                model = METHODS[block.kind].prepare(model, block, None)
        except ValueError as error:
            raise UserError(f"method {block.kind} does not fit this model: {error}") from None
        sizes = _sizes(model, training.moments)
        with FakeTensorMode():
            _to_fake(model)
            forward = _Tracker().step(model, shape, cuda and training.dtype == "auto", training.micro_batches()[1])
    loaded = sizes["weights"]
    if getattr(block, "base_bits", None) is not None:
        packed = [module.base_layer.weight for module in model.modules() if hasattr(module, "base_layer")]
        sizes["weights"] -= sum(round(w.numel() * (w.element_size() - fourbit.PER_WEIGHT)) for w in packed)
        forward["unpacked weight"] = max(w.numel() * w.element_size() for w in packed)
    fixed = {"weights": sizes["weights"], "experts": sizes["experts"], "AdamW moments": sizes["moments"]}
    if block.kind == "adalora":  # two averages of each trained number, in float32
        fixed["importance"] = 8 * sizes["trained"]
    deferred = sizes["experts"] if block.kind == "molf" and any(_effective(module) for module in model.modules()) else 0
    if cuda:
        forward.pop("not reused")
    overhead = {} if cuda else {"kernels": KERNELS, "compiler": sizes["compiler"]}
    phases = {
        "loading": {"weights": loaded, "checkpoint file": 0 if config.dtype == dtype else stored},
        "forward and backward": {**fixed, **forward, **overhead},
        "optimizer step": {
            **fixed,
            "gradients": sizes["gradients"],
            "experts' gradients": deferred,
            "temporaries": sizes["temporaries"],
            **overhead,
        },
        "saving": {**fixed, "file's content": sizes["saved"]},
    }
    phases = {name: {part: size for part, size in parts.items() if size} for name, parts in phases.items()}
    modules = sum(isinstance(module, MoLFLinear) for module in model.modules())
    checkpoint = sizes["trained bytes"] + sizes["moments"] + fixed.get("importance", 0) + sizes["start"]
    return Memory(
        phases, sizes["trained"], sizes["parameters"], sizes["saved"], checkpoint, modules, sizes["largest_layer"], cuda
    )


def per_process(memory: Memory, processes: int, sharding: str | None) -> int:
    """Bytes of each of several processes that train one cell together, each with a micro-batch of its own.

    Args:
        memory: Of the cell trained by one process.
        processes: How many.
        sharding: `ddp`: each holds all, and from the first backward on the gradients a second time, in the buckets that
            are reduced. `fsdp`: weights, gradients and moments are divided, but for the block at work and the one
            fetched ahead; on the host each loads the whole model all the same, and the first one makes a whole copy to
            save. None: there is one process.
    """
    if processes == 1:
        return memory.total
    return max(sum(parts.values()) for parts in _shared(memory, processes, sharding == "fsdp").values())


def _shared(memory: Memory, processes: int, sharded: bool) -> dict[str, dict[str, int]]:
    """The phases of the first of several processes."""
    buckets = {"gradient buckets": memory.phases["optimizer step"].get("gradients", 0)}
    if not sharded:
        return {name: parts if name == "loading" else parts | buckets for name, parts in memory.phases.items()}
    phases = {
        name: {part: size // processes if part in DIVIDED else size for part, size in parts.items()}
        for name, parts in memory.phases.items()
    }
    phases["forward and backward"]["gathered layers"] = 2 * memory.largest_layer
    if memory.cuda:  # whole models are the host's then
        del phases["loading"], phases["saving"]
    else:
        phases["loading"] = memory.phases["loading"]
        phases["saving"]["whole copy"] = sum(memory.phases["saving"].get(part, 0) for part in ("weights", "experts"))
    return phases


def _sizes(model: nn.Module, moments: str) -> dict[str, int]:
    """Bytes by kind, and counts, of a prepared model's parameters."""
    from molf.methods import principal

    sizes = dict.fromkeys(
        (
            "weights",
            "experts",
            "gradients",
            "moments",
            "trained",
            "trained bytes",
            "parameters",
            "saved",
            "start",
            "compiler",
        ),
        0,
    )
    adapter = not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
    deferred = {id(p) for module in model.modules() if _effective(module) for p in _experts(module)}
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        expert = "lora_" in name
        sizes["experts" if expert else "weights"] += size
        sizes["parameters"] += parameter.numel()
        sizes["saved"] += size if expert == adapter else 0
        if parameter.requires_grad:
            sizes["trained"] += parameter.numel()
            sizes["trained bytes"] += size
            sizes["gradients"] += 0 if id(parameter) in deferred else size
            coded = moments == "8bit" and kernels.fits_codes(parameter)
            if coded and parameter.numel() >= WORTH_COMPILING:
                sizes["compiler"] = COMPILER
            sizes["moments"] += round(2 * parameter.numel() * (1 + 4 / kernels.CODES_PER_SCALE if coded else 4))
    sizes["weights"] += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    began = (buffer for name, buffer in model.named_buffers() if name.endswith(principal.NAMES))
    sizes["start"] = sum(buffer.numel() * buffer.element_size() for buffer in began)
    sizes["saved"] += sizes["start"]
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    of_layer = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    sizes["largest_layer"] = max(of_layer, default=sizes["weights"])
    # The update of one module at a time; a winning LoRA expert's old and new factors lie side by side.
    pairs = [sum(p.numel() * p.element_size() for p in _experts(module)) for module in model.modules()]
    sizes["temporaries"] = 2 * max(pairs, default=0)
    return sizes


def _effective(module: nn.Module) -> bool:
    return isinstance(module, MoLFLinear) and module.is_effective


def _experts(module: nn.Module) -> list[nn.Parameter]:
    """The experts' parameters of a MoLF linear; of any other module none."""
    return [*module.lora_A, *module.lora_B] if isinstance(module, MoLFLinear) else []


def _to_fake(model: nn.Module) -> None:
    """Gives a model of the meta device parameters and buffers of the CPU, fake ones, tied where they were."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                data = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                module._parameters[name] = made.setdefault(id(old), nn.Parameter(data, old.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


@dataclass
class _Tracker(TorchDispatchMode):
    """Counts the bytes of every storage that is alive, by the part that was at work when it was made."""

    part: str = ""
    live: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    storages: dict[int, tuple[str, int]] = field(default_factory=dict)
    allocated: int = 0  # bytes of all blocks, dead ones too, that glibc keeps for itself

    def __post_init__(self) -> None:
        super().__init__()

    def step(self, model: nn.Module, shape: Shape, autocast: bool, rounds: int) -> dict[str, int]:
        """Peak of forward and backward by part, in bytes, without what exists before them.

        Args:
            model: Prepared by its method, its parameters fake.
            shape: Of each micro-batch.
            autocast: To bfloat16.
            rounds: Micro-batches before the gradients are cleared.
        """
        for parameter in model.parameters():
            self.storages[parameter.untyped_storage()._cdata] = ("", 0)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
        targets = torch.zeros(shape.rows, shape.keep - 1, dtype=torch.long)
        body: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        hook = body.register_forward_hook(lambda *_: setattr(self, "part", "logits"))
        with self:
            for _ in range(min(2, rounds)):
                self.part, self.allocated = "activations", 0
                before = sum(self.live.values())
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = _loss(model, ids, targets, shape.keep)
                forward = self.allocated
                freed = forward - (sum(self.live.values()) - before)
                self.part = "temporaries"
                loss.backward()
                del loss
        hook.remove()
        stranded = STRANDED["forward"] * max(0, freed) + STRANDED["backward"] * (self.allocated - forward)
        return {**self.peak, "not reused": round(stranded)}

    def _accumulated(self, parameter: torch.Tensor) -> None:
        """A gradient that stays is no temporary any more."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        part, size = self.storages.get(key, ("", 0))
        if size and part != "gradients":
            self.storages[key] = ("gradients", size)
            self.live[part] -= size
            self.live["gradients"] = self.live.get("gradients", 0) + size

    def _released(self, key: int) -> None:
        part, size = self.storages.pop(key)
        self.live[part] -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return
        size = storage.nbytes()
        self.storages[key] = (self.part, size)
        weakref.finalize(storage, self._released, key)
        self.live[self.part] = self.live.get(self.part, 0) + size
        self.allocated += size * (size < LARGE_BLOCK)
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)


def _loss(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor, keep: int) -> torch.Tensor:
    """`completion_loss` where the completions' lengths are known, since fake labels cannot be read."""
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.zeros_like(ids),
        logits_to_keep=keep,
        use_cache=False,
    ).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
