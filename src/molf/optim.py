"""Routed AdamW: every expert's moments move in every step, only the winners' weights do (arXiv 2605.07111).

The arithmetic is in kernels.py; here is who owns which parameter, who wins, and what that does to an effective weight.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from molf import kernels, native
from molf.kernels import Moment
from molf.nn import expert_names, local, molf_modules, other_parameters, whole

Precision = Literal["float32", "8bit"]

# Elements of a parameter from which compiling the arithmetic of 8-bit moments pays.
WORTH_COMPILING = 1 << 17
PRODUCT_ROWS = 256  # of a bfloat16 weight that are widened at once


class Routing(NamedTuple):
    """One step's choice in every module."""

    step: int  # 1 for the first
    modules: tuple[str, ...]
    experts: tuple[str, ...]
    scores: Tensor  # (modules, experts), float64, on the parameters' device
    winners: Tensor  # (modules, experts), bool
    rates: tuple[float, ...]  # learning rate of each expert


@dataclass
class Expert:
    """One expert of one module: a run of parameters in a group."""

    group: int
    start: int
    count: int
    decayed: list[bool]


@dataclass
class Module:
    """A module's experts, and what an update of its effective weight needs."""

    name: str
    experts: list[Expert]
    scaling: list[float]
    effective: bool
    full: bool  # whether expert 0 is the full weight


def molf_param_groups(
    model: nn.Module, lr: float, lora_lr: float, weight_decay: float = 0.1, lora_weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Parameter groups of `MoLFAdamW`: one an expert over all modules, and up to two for parameters outside them.

    All but `params` is plain data, so that an optimizer's state_dict is too.

    Args:
        model: After `apply_molf`.
        lr: Of the full weights and of every parameter outside the target modules.
        lora_lr: Of the LoRA experts.
        weight_decay: Goes with `lr`; biases and norms are not decayed.
        lora_weight_decay: Goes with `lora_lr`.

    Raises:
        ValueError: The model has no experts.
    """
    modules = molf_modules(model)
    if not modules:
        raise ValueError("the model has no MoLF experts; apply_molf(model, MoLFConfig(...)) first")
    groups: list[dict[str, Any]] = []
    for index, expert in enumerate(expert_names(modules[0][1])):
        group: dict[str, Any] = {"params": [], "kind": "expert", "expert": expert, "modules": [], "decayed": []}
        for name, module in modules:
            if expert == "full":
                params = [module.weight] if module.bias is None else [module.weight, module.bias]
            else:
                i = index - module.train_base
                params = [module.lora_A[i], module.lora_B[i]]
            group["params"] += params
            group["modules"] += [name] * len(params)
            group["decayed"] += [p.ndim >= 2 for p in params]
        group |= {"lr": lr, "weight_decay": weight_decay} if expert == "full" else {}
        group |= {} if expert == "full" else {"lr": lora_lr, "weight_decay": lora_weight_decay}
        group["scaling"] = {name: module.scaling[index - module.train_base] for name, module in modules}
        group["effective"] = [name for name, module in modules if module.is_effective]
        groups.append(group)
    return groups + plain_param_groups(other_parameters(model), lr, weight_decay)


def plain_param_groups(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Up to two groups, of decayed parameters and of biases and norms, which are not.

    Args:
        parameters: All that are trained so.
        lr: Learning rate of both.
        weight_decay: Of the first.
    """
    parameters = list(parameters)
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    groups = [(decayed, weight_decay), (plain, 0.0)]
    return [{"params": p, "kind": "other", "lr": lr, "weight_decay": decay} for p, decay in groups if p]


def plain_adamw(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, moments: Precision
) -> torch.optim.Optimizer:
    """AdamW without routing: torch's own fused one where it keeps float32, else ours.

    Args:
        parameters: Those without `requires_grad` are left out.
        lr: Learning rate.
        weight_decay: Biases and norms are not decayed.
        moments: As `AdamW`'s.
    """
    groups = plain_param_groups((p for p in parameters if p.requires_grad), lr, weight_decay)
    if moments == "float32" and all(p.dtype == torch.float32 for group in groups for p in group["params"]):
        return torch.optim.AdamW(groups, eps=1e-8, fused=True)
    return AdamW(groups, eps=1e-8, moments=moments)


class AdamW(torch.optim.Optimizer):
    """AdamW with moments of a precision of their own, whatever the weights'; bfloat16 weights round stochastically.

    Args:
        params: Groups with `params`, `lr` and `weight_decay` (`plain_param_groups`).
        betas: Of the moments.
        eps: Added to the root of the second moment.
        moments: `float32` (float64 for float64 parameters) or `8bit`: codes in blocks of 256 that share a scale, for
            parameters of at least 4,096 elements; needs torchao.
        backend: `auto` takes kernels.cpp on the host where a compiler is; `eager` never does.

    Raises:
        ValueError: A value is out of range, or torchao is needed and lacks.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        moments: Precision = "float32",
        backend: Literal["auto", "eager"] = "auto",
        **defaults: Any,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
            raise ValueError(f"betas={betas}, eps={eps}: betas lie in [0, 1) and eps is above 0")
        if moments not in ("float32", "8bit"):
            raise ValueError(f"moments is {moments!r}; allowed: float32, 8bit")
        if moments == "8bit":
            kernels.codebooks(torch.device("cpu"))
        self.moments, self.backend = moments, backend
        super().__init__(params, {"betas": tuple(betas), "eps": eps, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            self._plain(group)
        return loss

    def init_state(self) -> None:
        """Makes the state of every parameter (zeros), as the first step would: what a checkpoint is read into."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state(parameter)

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            # Codes come in blocks of elements; shards are cut by rows, so theirs stay values.
            coded = self.moments == "8bit" and local(parameter) is parameter and kernels.fits_codes(parameter)
            for name in ("exp_avg", "exp_avg_sq"):
                dtype = torch.uint8 if coded else torch.promote_types(parameter.dtype, torch.float32)
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
                if coded:
                    state[f"{name}_scale"] = torch.zeros(
                        parameter.numel() // kernels.CODES_PER_SCALE, device=parameter.device
                    )
        return state

    def _moment(self, parameter: Tensor, name: str) -> Moment:
        state = self.state[parameter]
        scale = state.get(f"{name}_scale")
        return local(state[name]) if scale is None else (state[name], scale)

    def _books(self, parameter: Tensor) -> kernels.Codebooks | None:
        coded = "exp_avg_scale" in self.state[parameter]
        return kernels.codebooks(parameter.device) if coded else None

    def _plain(self, group: dict[str, Any]) -> None:
        """AdamW on a group: torch's own fused one where it keeps the moments' precision, else ours."""
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._state(p) for p in params]
        own = [p.dtype not in (torch.float32, torch.float64) or "exp_avg_scale" in self.state[p] for p in params]
        fused = [(p, state) for p, state, mine in zip(params, states, own, strict=True) if not mine]
        if fused:
            adamw(
                [local(p) for p, _ in fused],
                [local(p.grad) for p, _ in fused],
                [local(state["exp_avg"]) for _, state in fused],
                [local(state["exp_avg_sq"]) for _, state in fused],
                [],
                [torch.full((), float(state["step"]), device=p.device) for p, state in fused],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for _, state in fused:
                state["step"] += 1
        for parameter, mine in zip(params, own, strict=True):
            if mine:
                self._advance([parameter], group, None)
                self._move([parameter], [True], group)

    def _advance(self, params: Sequence[Tensor], group: dict[str, Any], score: str | None) -> Tensor:
        """Moves the moments of parameters by their gradients.

        Returns:
            Each one's score sum over what this process holds of it, (parameters,) of float64.
        """
        beta1, beta2 = group["betas"]
        constants = (beta1, beta2, group["eps"], score)
        sums: list[Tensor] = [torch.zeros((), dtype=torch.float64)] * len(params)
        together: dict[int, list[int]] = {}
        for index, parameter in enumerate(params):
            assert parameter.grad is not None  # the caller saw to it
            self._state(parameter)["step"] += 1
            weight, gradient = local(parameter), local(parameter.grad)
            m, v = self._moment(parameter, "exp_avg"), self._moment(parameter, "exp_avg_sq")
            kind = self._native(weight, m)
            if kind is not None and gradient.is_contiguous() and gradient.dtype == weight.dtype:
                together.setdefault(kind, []).append(index)
                continue
            books = self._books(parameter)
            parts: list[Tensor] = []
            for slab in kernels.slabs(weight, gradient, m, v):
                for block in kernels.blocks(slab) if books is None else [slab]:
                    assert block.gradient is not None
                    run = self._coded(kernels.advance, block) if books else kernels.advance
                    parts += run([block.gradient], [block.m], [block.v], *constants, books)
            if score is not None:
                sums[index] = torch.cat(parts).double().sum()
        for kind, chosen in together.items():
            gradients = [local(params[i].grad) for i in chosen]  # type: ignore[arg-type]  # none is None
            ms, vs = ([self._moment(params[i], name) for i in chosen] for name in ("exp_avg", "exp_avg_sq"))
            found = native.advance(kind, gradients, ms, vs, *constants)  # type: ignore[arg-type]  # values, not codes
            for i, part in zip(chosen, found, strict=True):
                sums[i] = part
        return torch.stack(sums)

    def _move(
        self,
        params: Sequence[Tensor],
        decayed: Sequence[bool],
        group: dict[str, Any],
        wins: Tensor | None = None,
    ) -> None:
        """p <- p (1 - eta lambda), then p <- p - eta m_hat / (sqrt v_hat + eps), with bias-corrected moments.

        With a bool scalar `wins` on a device, only if it holds: nothing is read back to the host.
        """
        lr, (beta1, beta2), eps = float(group["lr"]), group["betas"], group["eps"]
        for index, (parameter, decays) in enumerate(zip(params, decayed, strict=True)):
            step = self.state[parameter]["step"]
            keep = 1 - lr * group["weight_decay"] if decays else 1.0
            rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
            seed = step * 0x9E3779B1 + index * 0x85EBCA6B
            weight, books = local(parameter), self._books(parameter)
            m, v = self._moment(parameter, "exp_avg"), self._moment(parameter, "exp_avg_sq")
            kind = self._native(weight, m) if wins is None else None
            if kind is not None:
                native.move(kind, [weight], [m], [v], [keep], [rate], [root], eps, [seed])  # type: ignore[list-item]
                continue
            # A view of a strided parameter would be a copy, and the step lost.
            target = weight if weight.is_contiguous() else weight.contiguous()
            old = weight.clone() if wins is not None else weight
            for slab in kernels.slabs(target, None, m, v):
                for block in kernels.blocks(slab) if books is None else [slab]:
                    numbers: list[Any] = [keep, rate, root, seed + block.first]
                    run: Callable[..., Any] = kernels.move
                    if books:
                        run = self._coded(kernels.move, block)
                        numbers = [torch.full((), x, dtype=torch.float64) for x in numbers[:3]]
                        numbers.append(torch.full((), seed + block.first & 0xFFFFFFFF, dtype=torch.int64))
                    run([block.weight], [block.m], [block.v], [numbers[0]], *numbers[1:3], eps, [numbers[3]], books)
            if target is not weight:
                weight.copy_(target)
            if wins is not None:
                weight.copy_(torch.where(wins, weight, old))

    def _native(self, weight: Tensor, moment: Moment) -> int | None:
        """kernels.cpp's number for a parameter that it serves, else None."""
        return native.kind(weight, moment) if self.backend == "auto" and isinstance(moment, Tensor) else None

    def _coded(self, function: Callable[..., Any], slab: kernels.Slab) -> Callable[..., Any]:
        """`function` for 8-bit moments: compiled where there is much to do, since it has many small operations."""
        if self.backend == "eager" or slab.weight.numel() < WORTH_COMPILING:
            return function
        kernels.mark_rows(slab.weight, slab.m, slab.v, *([] if slab.gradient is None else [slab.gradient]))
        return kernels.compiled(function)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state in the precision it was saved in: torch would cast it to the parameters' dtype."""
        super().load_state_dict(state_dict)
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    own = torch.promote_types(parameter.dtype, torch.float32) if value.is_floating_point() else None
                    dtype = torch.float32 if name.endswith("_scale") else own or value.dtype
                    self.state[parameter][name] = value.to(parameter.device, dtype, copy=True)


class MoLFAdamW(AdamW):
    """AdamW that moves, in each module, only the experts with the highest scores (DESIGN.md section 2).

    Args:
        params: From `molf_param_groups`.
        betas: Of the moments.
        eps: Added to the root of the second moment.
        top_k: Experts that win in each module and step.
        score: `epd` (S = eta / N sum m^2 / (sqrt v + eps)) or `pfn` (S = sqrt(1 / N sum (m / (sqrt v + eps))^2)).
        moments: As `AdamW`'s.
        backend: As `AdamW`'s.

    `last_routing` holds the last step's choice, on the parameters' device; on CUDA a step reads nothing back to the
    host. Sharded parameters (DTensor, as FSDP2 makes them) sum their scores over the shards, so that every process
    picks the same winners.

    Raises:
        ValueError: A value is out of range, or the groups are not those of `molf_param_groups`.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        top_k: int = 1,
        score: Literal["epd", "pfn"] = "epd",
        moments: Precision = "float32",
        backend: Literal["auto", "eager"] = "auto",
    ) -> None:
        groups = list(params)
        if not groups or not all(isinstance(group, dict) and "kind" in group for group in groups):
            raise ValueError("MoLFAdamW takes the groups of molf_param_groups(model, ...), not bare parameters")
        experts = sum(group["kind"] == "expert" for group in groups)
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k is {top_k}; there are {experts} experts in each module, so 1 to {experts} may win")
        if score not in ("epd", "pfn"):
            raise ValueError(f"score is {score!r}; allowed: epd, pfn")
        super().__init__(groups, betas, eps, moments, backend, top_k=top_k, score=score)
        self.last_routing: Routing | None = None
        self._modules = self._layout()

    def _layout(self) -> list[Module]:
        """Modules and their experts, read from the groups' plain data: the parameters may be swapped (FSDP2 does)."""
        modules: dict[str, Module] = {}
        for index, group in enumerate(self.param_groups):
            if group["kind"] != "expert":
                continue
            full = group["expert"] == "full"
            for position, (name, decayed) in enumerate(zip(group["modules"], group["decayed"], strict=True)):
                module = modules.setdefault(name, Module(name, [], [], name in group["effective"], full))
                if not module.experts or module.experts[-1].group != index:
                    module.experts.append(Expert(index, position, 0, []))
                    if not full:
                        module.scaling.append(group["scaling"][name])
                module.experts[-1].count += 1
                module.experts[-1].decayed.append(decayed)
        return list(modules.values())

    def _params(self, expert: Expert) -> list[nn.Parameter]:
        found: list[nn.Parameter] = self.param_groups[expert.group]["params"][expert.start :][: expert.count]
        return found

    def select(self, scores: Tensor) -> Tensor:
        """Which experts win: the `top_k` highest of each row, of equals the lower index.

        Args:
            scores: (modules, experts).

        Returns:
            (modules, experts), bool.
        """
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, : self.param_groups[0]["top_k"]]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update: moments of all experts, scores, winners, weights of the winners.

        Raises:
            RuntimeError: A module has no gradient, or its experts' were deferred and never derived.
        """
        loss = _evaluate(closure)
        self._require_gradients()
        scores = self._scores()
        winners = self.select(scores)
        chosen = winners.tolist() if winners.device.type == "cpu" else None
        for row, module in enumerate(self._modules):
            for index in range(len(module.experts)):
                if chosen is None:
                    self._move_expert(module, index, winners[row, index])
                elif chosen[row][index]:
                    self._move_expert(module, index, None)
        groups = [group for group in self.param_groups if group["kind"] == "expert"]
        for group in self.param_groups:
            if group["kind"] == "other":
                self._plain(group)
        self.last_routing = Routing(
            step=self.state[groups[0]["params"][0]]["step"],
            modules=tuple(module.name for module in self._modules),
            experts=tuple(group["expert"] for group in groups),
            scores=scores,
            winners=winners,
            rates=tuple(float(group["lr"]) for group in groups),
        )
        return loss

    def _require_gradients(self) -> None:
        """Before anything moves, so that a step that cannot be made leaves no trace."""
        for module in self._modules:
            missing = [p.grad is None for expert in module.experts for p in self._params(expert)]
            if module.full and module.effective and any(missing) and not missing[0]:
                raise RuntimeError(
                    f"{module.name}: the experts' gradients were not derived from the weight's; call "
                    "derive_lora_gradients(model) after the last backward and before clipping"
                )
            if any(missing):
                raise RuntimeError(
                    f"{module.name} got no gradient in this step; if the model does not use it, add it to "
                    "exclude_modules"
                )

    def _scores(self) -> Tensor:
        """Moves all moments; returns every expert's score, (modules, experts) of float64."""
        groups = [group for group in self.param_groups if group["kind"] == "expert"]
        experts = [expert for module in self._modules for expert in module.experts]
        params = [p for expert in experts for p in self._params(expert)]
        owners = [index for index, expert in enumerate(experts) for _ in range(expert.count)]
        sizes = [sum(p.numel() for p in self._params(expert)) for expert in experts]
        parts = self._advance(params, groups[0], groups[0]["score"])
        sums = torch.zeros(len(experts), dtype=torch.float64, device=parts.device)
        sums.index_add_(0, _on(torch.tensor(owners), parts.device), parts)
        _sum_over_shards(params[0], sums)
        mean = (sums / _on(torch.tensor(sizes), parts.device)).view(len(self._modules), -1)
        if groups[0]["score"] == "pfn":
            return mean.sqrt()
        rates = torch.tensor([float(group["lr"]) for group in groups], dtype=torch.float64)
        return mean * _on(rates, parts.device)

    def _move_expert(self, module: Module, index: int, wins: Tensor | None) -> None:
        """Moves an expert's weights; with a bool scalar `wins` on a device, only if it holds (no read-back)."""
        expert = module.experts[index]
        group, params = self.param_groups[expert.group], self._params(expert)
        if not module.effective:
            self._move(params, expert.decayed, group, wins)
            return
        weight = local(self._params(module.experts[0])[0])
        seed = self.state[params[0]]["step"] * 0x632BE5AB + index
        if index == 0:
            self._move(params, expert.decayed, group, wins)
            # Decay acts on W = W_eff - sum s B A, so what it took from the experts' part is given back.
            rate = float(group["lr"]) * group["weight_decay"]
            for scale, other in zip(module.scaling, module.experts[1:], strict=True) if rate else ():
                a, b = self._params(other)
                _add_product(weight, local(b), whole(a), rate * scale, wins, seed)
            return
        a, b = params
        old_a, old_b = whole(a).clone(), local(b).clone()
        self._move(params, expert.decayed, group, wins)
        # s (B'A' - BA) as one product, so that the weight is rounded once; a loser's is zero to rounding, hence masked.
        change = torch.cat([local(b), -old_b], dim=1)
        _add_product(weight, change, torch.cat([whole(a), old_a]), module.scaling[index - 1], wins, seed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores moments in the precision they were saved in: torch would cast them to the parameters' dtype.

        A state written under the other forward is taken: the moments are the same, and which forward the layers run
        stays what it is here.

        Raises:
            ValueError: The state is of other modules or experts than this optimizer's.
        """
        keys = ("kind", "expert", "modules", "decayed", "scaling")
        mine = [{key: group.get(key) for key in (*keys, "effective")} for group in self.param_groups]
        for saved, group in zip(state_dict["param_groups"], mine, strict=False):
            for key in keys:
                if saved.get(key) != group[key]:
                    raise ValueError(
                        f"the saved optimizer state has another {key}: {saved.get(key)}; here {group[key]}"
                    )
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, mine, strict=True):
            if own["kind"] == "expert":
                group["effective"] = own["effective"]


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float, wins: Tensor | None, seed: int) -> None:
    """weight <- weight + scale left right, only if `wins`; bfloat16 is added up in float32 and rounded stochastically.

    Args:
        weight: (out, in).
        left: (out, k).
        right: (k, in).
        scale: Of the product.
        wins: bool scalar, or None for yes.
        seed: Of the rounding.
    """
    if wins is not None:
        left = left * wins
    if weight.dtype != torch.bfloat16:
        weight.addmm_(left, right, alpha=scale)
        return
    for start in range(0, len(weight), PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        total = torch.addmm(weight[rows].float(), left[rows].float(), right.float(), alpha=scale)
        weight[rows] = kernels.round_stochastically(total, seed + start * weight.shape[1])


def _sum_over_shards(parameter: Tensor, sums: Tensor) -> None:
    """Adds up, over the processes that hold a parameter's shards, what each summed over its own."""
    mesh = getattr(parameter, "device_mesh", None)
    for dim, placement in enumerate(getattr(parameter, "placements", ())):
        if mesh is not None and placement.is_shard():
            torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
