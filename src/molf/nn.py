"""Linear layers with experts: a full weight and LoRA pairs whose sum is the layer's weight (arXiv 2605.07111).

y = x W^T + b + sum_i s_i (x A_i^T) B_i^T
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Forward = Literal["auto", "effective", "dense"]  # how a target computes its output (DESIGN.md, section 2)


@dataclass(frozen=True)
class MoLFConfig:
    """Which linear layers get experts, and which experts; the words are PEFT's.

    Raises:
        ValueError: A field is out of range, or the fields contradict each other.
    """

    r: tuple[int, ...] = (128,)  # rank of each LoRA expert
    lora_alpha: float = 32.0
    use_rslora: bool = True  # scaling alpha / sqrt(r), else alpha / r
    lora_dropout: float = 0.0  # on the LoRA experts' input
    # Names, or ends of names; "all-linear" leaves out what a transformers model calls its output embeddings.
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    exclude_modules: tuple[str, ...] = ("lm_head",)  # likewise
    train_base: bool = True  # whether the full weight is an expert (MoLF) or frozen (MoLF-Efficient)
    forward: Forward = "auto"

    def __post_init__(self) -> None:
        problems = []
        if not self.r or any(not isinstance(rank, int) or rank < 1 for rank in self.r):
            problems.append(f"r is {self.r!r}; a tuple of ranks of at least 1 is expected")
        if not self.lora_alpha > 0:
            problems.append(f"lora_alpha is {self.lora_alpha}; it must be above 0")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout is {self.lora_dropout}; it must lie in [0, 1)")
        if self.target_modules != "all-linear" and not isinstance(self.target_modules, tuple):
            problems.append(f"target_modules is {self.target_modules!r}; 'all-linear' or a tuple of names is expected")
        if not isinstance(self.exclude_modules, tuple):
            problems.append(f"exclude_modules is {self.exclude_modules!r}; a tuple of names is expected")
        if self.forward not in ("auto", "effective", "dense"):
            problems.append(f"forward is {self.forward!r}; allowed: auto, effective, dense")
        if self.forward == "effective" and not (self.train_base and self.lora_dropout == 0):
            problems.append("forward='effective' needs train_base=True and lora_dropout=0; use 'auto' or 'dense'")
        if not self.train_base and len(self.r) < 2:
            problems.append(f"with a frozen base there is nothing to route between r={self.r}; give two ranks or more")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def effective(self) -> bool:
        """Whether layers keep W + sum_i s_i B_i A_i as their weight."""
        return self.forward == "effective" or (self.forward == "auto" and self.train_base and self.lora_dropout == 0)

    def scaling(self, rank: int) -> float:
        """s_i of an expert of this rank."""
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)


class MoLFLinear(nn.Module):
    """A linear layer with LoRA experts, in one of two forwards of the same mathematics.

    dense: `weight` is W, and the experts run beside it, packed into one pair of matmuls.
    effective: `weight` is W + sum_i s_i B_i A_i and the layer runs as a plain linear. With G the gradient of `weight`,
    the experts' gradients are grad B_i = s_i G A_i^T and grad A_i = s_i B_i^T G; a hook on `weight` derives them after
    each backward, or `derive_lora_gradients` once a step after `defer_lora_gradients`.

    Args:
        linear: Its weight (out x in) and bias (out) become this layer's own.
        config: The experts.
    """

    effective: Tensor  # uint8 scalar, so that a state_dict names the forward that it was written under

    def __init__(self, linear: nn.Linear, config: MoLFConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        like: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.ParameterList(nn.Parameter(torch.empty(r, self.in_features, **like)) for r in config.r)
        self.lora_B = nn.ParameterList(nn.Parameter(torch.zeros(self.out_features, r, **like)) for r in config.r)
        for a in self.lora_A:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.scaling = [config.scaling(r) for r in config.r]
        self.lora_dropout = config.lora_dropout
        self.train_base = config.train_base
        self.is_effective = config.effective
        self.deferred = False
        self.train(linear.training)
        self.register_buffer("effective", torch.tensor(int(config.effective), dtype=torch.uint8))
        if self.is_effective:
            self.weight.requires_grad_(True)  # a hook is refused on a weight that is still frozen
            self.weight.register_post_accumulate_grad_hook(self._after_backward)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self.is_effective:
            return F.linear(x, self.weight, self.bias)
        packed_a = torch.cat(list(self.lora_A))
        packed_b = torch.cat([s * b for s, b in zip(self.scaling, self.lora_B, strict=True)], dim=1)
        rows = x.reshape(-1, self.in_features)
        y = F.linear(rows, self.weight, self.bias)
        h = F.linear(F.dropout(rows, self.lora_dropout, self.training), packed_a)
        # Into the output itself: adding afterwards would pass over it twice more. Autocast leaves in-place ops alone.
        return y.addmm_(h, packed_b.to(y.dtype).T).view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def lora_weight(self) -> Tensor:
        """sum_i s_i B_i A_i (out x in)."""
        return _lora_weight(self.scaling, list(self.lora_A), list(self.lora_B))

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W + sum_i s_i B_i A_i (out x in), under either forward."""
        return self.weight.detach().clone() if self.is_effective else self.weight + self.lora_weight()

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """W (out x in), under either forward."""
        return self.weight - self.lora_weight() if self.is_effective else self.weight.detach().clone()

    @torch.no_grad()
    def derive_gradients(self) -> None:
        """Sets the experts' gradients from that of the effective weight; does nothing while there is none."""
        if self.weight.grad is None or not self.is_effective:
            return
        g = local(self.weight.grad)
        with torch.autocast(g.device.type, enabled=False):  # a gradient is of its parameter's dtype
            for s, a, b in zip(self.scaling, self.lora_A, self.lora_B, strict=True):
                b.grad = like_shard(torch.mm(g, whole(a).T).mul_(s), b)
                # Over the rows that this process holds; summed over the others'.
                a.grad = like_shard(torch.mm(local(b).T, g).mul_(s), a, summed=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's weight is another parameter, and torch copies no hooks."""
        super().__setstate__(state)
        if self.is_effective and self.weight.requires_grad:
            self.weight.register_post_accumulate_grad_hook(self._after_backward)

    def _after_backward(self, _: Tensor) -> None:
        if self.deferred:
            return
        if _of_many() and not hasattr(self.weight, "placements"):
            raise RuntimeError(
                "several processes train this model, and the experts' gradients would be derived before the weights' "
                "are averaged: call defer_lora_gradients(model) once, and derive_lora_gradients(model) after the last "
                "backward of each step, before clipping"
            )
        self.derive_gradients()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Loads weights of either forward: those of the other are converted."""
        written, key = state_dict.get(prefix + "effective"), prefix + "weight"
        if written is not None and bool(written) != self.is_effective and key in state_dict:
            pairs = range(len(self.scaling))
            a = [state_dict[f"{prefix}lora_A.{i}"] for i in pairs]
            b = [state_dict[f"{prefix}lora_B.{i}"] for i in pairs]
            sign = 1 if self.is_effective else -1
            state_dict = state_dict | {
                key: state_dict[key] + sign * _lora_weight(self.scaling, a, b).to(state_dict[key].device),
                prefix + "effective": torch.tensor(int(self.is_effective), dtype=torch.uint8),
            }
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        kind = "effective" if self.is_effective else "dense"
        ranks = ", ".join(str(a.shape[0]) for a in self.lora_A)
        return f"{self.in_features}, {self.out_features}, r=({ranks}), {kind}, bias={self.bias is not None}"


def apply_molf(model: AnyModule, config: MoLFConfig) -> AnyModule:
    """Replaces a model's target linears by `MoLFLinear`, in place; step 0 is the model as it was.

    Args:
        model: Any module with `nn.Linear` layers, `torch.compile`d or not; before it is sharded over processes, each of
            which must draw the same experts (`torch.manual_seed`).
        config: Targets and experts. With `train_base=False` every parameter but the experts' is frozen.

    Returns:
        The same model.

    Raises:
        ValueError: Nothing matches, something matches that is no `nn.Linear` or no plain one (quantized, sharded), a
            target shares its weight with another module, or the model has experts already.
    """
    if any(isinstance(module, MoLFLinear) for module in model.modules()):
        raise ValueError("the model has MoLF experts already; merge_molf(model) first")
    targets = _targets(model, config)
    shared = _shared_weights(model)
    tied = [name for name in targets if f"{name}.weight" in shared]
    if tied:
        raise ValueError(f"{', '.join(tied)}: the weight is shared with another module; add it to exclude_modules")
    for name, linear in targets.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, MoLFLinear(linear, config))
    if not config.train_base:
        model.requires_grad_(False)
    for _, module in molf_modules(model):
        module.weight.requires_grad_(config.train_base)
        if module.bias is not None:
            module.bias.requires_grad_(config.train_base)
        module.lora_A.requires_grad_(True)
        module.lora_B.requires_grad_(True)
    if config.effective:
        # DistributedDataParallel's own name for it. It would wait for gradients that no backward makes: these are
        # derived from the weights', after their reduction (`defer_lora_gradients`).
        derived = {id(p) for _, module in molf_modules(model) for p in [*module.lora_A, *module.lora_B]}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in derived]
        # It goes by a compiled model's own names, whether the model is compiled before or after this.
        model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            prefix + name for prefix in ("", "_orig_mod.") for name in names
        ]
    return model


def merge_molf(model: AnyModule) -> AnyModule:
    """Turns every `MoLFLinear` into a plain `nn.Linear` of weight W + sum_i s_i B_i A_i, in place.

    Returns:
        The same model.
    """
    for name, module in molf_modules(model):
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(module.effective_weight(), requires_grad=module.weight.requires_grad)
        linear.bias = module.bias
        linear.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


def molf_modules(model: nn.Module) -> list[tuple[str, MoLFLinear]]:
    """All layers with experts, by name, in the model's order; the names are those from before `torch.compile`."""
    return [
        (".".join(part for part in name.split(".") if part != "_orig_mod"), module)
        for name, module in model.named_modules()
        if isinstance(module, MoLFLinear)
    ]


def defer_lora_gradients(model: nn.Module, deferred: bool = True) -> None:
    """Turns the derivation after each backward off (or on again), for a loop that derives once a step itself.

    Without it each backward derives the experts' gradients from what its weight has accumulated so far, so that any
    loop and any trainer works unchanged; with N micro-batches a step, N - 1 of the N derivations are for nothing. A
    loop that defers calls `derive_lora_gradients` after the last backward and before clipping. The dense forward needs
    neither. Under DistributedDataParallel deferring is a must: a backward sees one process's gradient only.

    Args:
        model: After `apply_molf`.
        deferred: False gives the derivation back to the backward.
    """
    for _, module in molf_modules(model):
        module.deferred = deferred


def derive_lora_gradients(model: nn.Module) -> None:
    """Derives the experts' gradients of all effective layers: once a step, after the last backward, before clipping."""
    for _, module in molf_modules(model):
        module.derive_gradients()


@torch.no_grad()
def molf_to_peft(model: nn.Module, base_model_name_or_path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model with a frozen base as one ordinary PEFT LoRA adapter of rank sum_i r_i.

    The A_i are stacked and the s_i B_i concatenated; alpha equals the rank, so PEFT's own scaling is 1.

    Args:
        model: With `MoLFLinear`s over a frozen base.
        base_model_name_or_path: What `adapter_config.json` names as the base.

    Returns:
        The adapter's configuration, and its tensors under PEFT's names.

    Raises:
        ValueError: The model has no experts, or its base was trained, so that an adapter cannot hold the change.
    """
    modules = molf_modules(model)
    if not modules:
        raise ValueError("the model has no MoLF experts")
    if any(module.train_base for _, module in modules):
        raise ValueError("the base was trained, an adapter cannot hold that: use merge_molf(model) and save the model")
    rank = sum(a.shape[0] for a in modules[0][1].lora_A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(name for name, _ in modules),
    }
    tensors = {}
    for name, module in modules:
        packed_b = torch.cat([s * b for s, b in zip(module.scaling, module.lora_B, strict=True)], dim=1)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat(list(module.lora_A)).contiguous().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = packed_b.contiguous().cpu()
    return config, tensors


def save_peft_adapter(model: nn.Module, directory: Path, base_model_name_or_path: str) -> None:
    """Writes `molf_to_peft` as adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file

    config, tensors = molf_to_peft(model, base_model_name_or_path)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: itself, or its shard where it is a DTensor (FSDP2)."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor: itself, or its shards gathered where it is a DTensor."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def like_shard(tensor: Tensor, parameter: Tensor, summed: bool = False) -> Tensor:
    """A gradient as its parameter lies: as it is, or as a DTensor of the same placement.

    Args:
        tensor: This process's rows; with `summed` all rows, of which every process has a part of the sum.
        parameter: Plain, or a DTensor that is sharded by rows.
        summed: As above.
    """
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    if summed:
        partial = [Partial() if placement.is_shard() else placement for placement in placements]
        return DTensor.from_local(tensor, mesh, partial, run_check=False).redistribute(placements=placements)
    return DTensor.from_local(
        tensor, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _lora_weight(scaling: list[float], a: list[Tensor], b: list[Tensor]) -> Tensor:
    packed_b = torch.cat([s * bi for s, bi in zip(scaling, b, strict=True)], dim=1)
    return packed_b.detach() @ torch.cat(a).detach()


def _targets(model: nn.Module, config: MoLFConfig) -> dict[str, nn.Linear]:
    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)

    found: dict[str, nn.Linear] = {}
    wrong, unfit = [], []
    output_embeddings = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if callable(output_embeddings) else None
    for name, module in model.named_modules():
        if not name or matches(name, config.exclude_modules):
            continue
        linear = isinstance(module, nn.Linear)
        # transformers' Conv1D is a linear with a transposed weight; GPT-2 is made of them.
        if config.target_modules == "all-linear":
            wanted = (linear and module is not head) or type(module).__name__ == "Conv1D"
        else:
            wanted = matches(name, config.target_modules)
        if wanted and linear:
            found[name] = module  # type: ignore[assignment]
            unfit += [] if _plain(found[name]) else [f"{name} ({_described(found[name])})"]
        elif wanted:
            wrong.append(f"{name} ({type(module).__name__})")
    if wrong:
        raise ValueError(
            f"only nn.Linear can get experts, but these match: {', '.join(wrong[:5])}; leave them out by "
            "target_modules or exclude_modules, or take a model made of nn.Linear (GPT-2 is made of Conv1D)"
        )
    if unfit:
        raise ValueError(
            "only a plain nn.Linear with a floating-point weight can get experts, but these match: "
            f"{', '.join(unfit[:5])}; load the model without quantization or a device map, call apply_molf before "
            "other adapters and before sharding, or add them to exclude_modules"
        )
    if not found:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(f"no module matches {config.target_modules!r}; the model's linears: {', '.join(linears[:20])}")
    return found


def _plain(linear: nn.Linear) -> bool:
    """Whether all that the layer does is x W^T + b with a W that can be trained.

    Quantized layers are subclasses with a forward of their own (bitsandbytes, FP8), or hide packed numbers in a
    tensor subclass that calls itself bfloat16 (torchao). Layers that are moved about at each call have a forward or
    hooks of their own (accelerate's device maps), which a new layer would lose.
    """
    if "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    trainable = linear.weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return type(linear).forward is nn.Linear.forward and type(linear.weight) is nn.Parameter and trainable


def _described(linear: nn.Linear) -> str:
    return f"{type(linear).__name__}, weight {type(linear.weight).__name__} of {linear.weight.dtype}"


def _of_many() -> bool:
    """Whether this process trains together with others."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _shared_weights(model: nn.Module) -> set[str]:
    """Names of all parameters that stand under more than one name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def expert_names(module: MoLFLinear) -> tuple[str, ...]:
    """`full` where the base is trained, then `lora_rR` of each rank, numbered where a rank repeats."""
    names = ["full"] if module.train_base else []
    seen: dict[int, int] = {}
    for a in module.lora_A:
        rank = a.shape[0]
        seen[rank] = seen.get(rank, 0) + 1
        names.append(f"lora_r{rank}" + (f"_{seen[rank]}" if seen[rank] > 1 else ""))
    return tuple(names)


def other_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Trained parameters outside layers with experts, each once."""
    inside = {id(p) for _, module in molf_modules(model) for p in module.parameters()}
    return (p for p in model.parameters() if p.requires_grad and id(p) not in inside)
