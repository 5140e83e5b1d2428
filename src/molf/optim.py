"""Routed AdamW: every expert's moments move in every step, only the winners' weights do (arXiv 2605.07111)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from molf.nn import expert_names, molf_modules, other_parameters


class Routing(NamedTuple):
    """One step's choice in every module."""

    step: int  # 1 for the first
    modules: tuple[str, ...]
    experts: tuple[str, ...]
    scores: Tensor  # (modules, experts), on the parameters' device
    winners: Tensor  # (modules, experts), bool
    rates: tuple[float, ...]  # learning rate of each expert


@dataclass
class Expert:
    """The parameters of one expert of one module, all of one group."""

    group: int
    params: list[nn.Parameter]
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
    others = list(other_parameters(model))
    decayed = [p for p in others if p.ndim >= 2]
    plain = [p for p in others if p.ndim < 2]
    if decayed:
        groups.append({"params": decayed, "kind": "other", "lr": lr, "weight_decay": weight_decay})
    if plain:
        groups.append({"params": plain, "kind": "other", "lr": lr, "weight_decay": 0.0})
    return groups


# Elements of a block on the host: what one operation leaves of it is in the cache when the next one needs it.
BLOCK = 1 << 15


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors of one shape: a cacheful at a time on the host, all at once on a device."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= BLOCK:
        yield tensors
    else:
        rows = max(1, BLOCK * len(first) // first.numel())
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def accumulate(gradient: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float]) -> None:
    """m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2, in the moments' precision."""
    gradient = gradient.to(m.dtype)
    m.lerp_(gradient, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])


def epd(m: Tensor, ratio: Tensor) -> Tensor:
    """Sum of m^2 / (sqrt v + eps) over one parameter: expected preconditioned descent, before eta / N."""
    return torch.dot(m.flatten(), ratio.flatten())


def pfn(m: Tensor, ratio: Tensor) -> Tensor:
    """Sum of (m / (sqrt v + eps))^2 over one parameter: preconditioned Frobenius norm, before the root of its mean."""
    return torch.dot(ratio.flatten(), ratio.flatten())


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"epd": epd, "pfn": pfn}


class MoLFAdamW(torch.optim.Optimizer):
    """AdamW that moves, in each module, only the experts with the highest scores (DESIGN.md section 2).

    Args:
        params: From `molf_param_groups`.
        betas: Of the moments.
        eps: Added to the root of the second moment.
        top_k: Experts that win in each module and step.
        score: `epd` (S = eta / N sum m^2 / (sqrt v + eps)) or `pfn` (S = sqrt(1 / N sum (m / (sqrt v + eps))^2)).

    Moments are kept in float32 (float64 for float64 parameters). `last_routing` holds the last step's choice, on the
    parameters' device; on CUDA a step reads nothing back to the host.

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
    ) -> None:
        groups = list(params)
        if not groups or not all(isinstance(group, dict) and "kind" in group for group in groups):
            raise ValueError("MoLFAdamW takes the groups of molf_param_groups(model, ...), not bare parameters")
        experts = sum(group["kind"] == "expert" for group in groups)
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k is {top_k}; there are {experts} experts in each module, so 1 to {experts} may win")
        if score not in SCORES:
            raise ValueError(f"score is {score!r}; allowed: {', '.join(SCORES)}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
            raise ValueError(f"betas={betas}, eps={eps}: betas lie in [0, 1) and eps is above 0")
        super().__init__(groups, {"betas": tuple(betas), "eps": eps, "top_k": top_k, "score": score})
        self.last_routing: Routing | None = None
        self._modules = self._layout()

    def _layout(self) -> list[Module]:
        """Modules and their experts, read from the groups' plain data."""
        modules: dict[str, Module] = {}
        for index, group in enumerate(self.param_groups):
            if group["kind"] != "expert":
                continue
            full = group["expert"] == "full"
            for name, parameter, decayed in zip(group["modules"], group["params"], group["decayed"], strict=True):
                module = modules.setdefault(name, Module(name, [], [], name in group["effective"], full))
                if not module.experts or module.experts[-1].group != index:
                    module.experts.append(Expert(index, [], []))
                    if not full:
                        module.scaling.append(group["scaling"][name])
                module.experts[-1].params.append(parameter)
                module.experts[-1].decayed.append(decayed)
        return list(modules.values())

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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_gradients()
        scores = torch.stack([torch.stack([self._score(e) for e in m.experts]) for m in self._modules])
        winners = self.select(scores)
        on_host = winners.device.type == "cpu"
        chosen = winners.tolist() if on_host else None
        for row, module in enumerate(self._modules):
            for index in range(len(module.experts)):
                if chosen is None:
                    self._move(module, index, winners[row, index])
                elif chosen[row][index]:
                    self._move(module, index, None)
        for group in self.param_groups:
            if group["kind"] == "other":
                self._plain_adamw(group)
        expert_groups = [group for group in self.param_groups if group["kind"] == "expert"]
        self.last_routing = Routing(
            step=self.state[self._modules[0].experts[0].params[0]]["step"],
            modules=tuple(module.name for module in self._modules),
            experts=tuple(group["expert"] for group in expert_groups),
            scores=scores,
            winners=winners,
            rates=tuple(float(group["lr"]) for group in expert_groups),
        )
        return loss

    def _require_gradients(self) -> None:
        """Before anything moves, so that a step that cannot be made leaves no trace."""
        for module in self._modules:
            missing = [p.grad is None for expert in module.experts for p in expert.params]
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

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        return state

    def _score(self, expert: Expert) -> Tensor:
        """Moves an expert's moments by its gradient and returns its score (scalar tensor)."""
        group = self.param_groups[expert.group]
        score = SCORES[group["score"]]
        sums = []
        for parameter in expert.params:
            state = self._state(parameter)
            state["step"] += 1
            assert parameter.grad is not None  # _require_gradients saw to it
            for gradient, m, v in blocks(parameter.grad, state["exp_avg"], state["exp_avg_sq"]):
                accumulate(gradient, m, v, group["betas"])
                ratio = v.sqrt().add_(group["eps"])
                sums.append(score(m, torch.div(m, ratio, out=ratio)))
        mean = torch.stack(sums).sum() / sum(parameter.numel() for parameter in expert.params)
        return mean * float(group["lr"]) if group["score"] == "epd" else mean.sqrt()

    def _move(self, module: Module, index: int, wins: Tensor | None) -> None:
        """Moves an expert's weights; with a bool scalar `wins` on a device, only if it holds (no read-back)."""
        expert = module.experts[index]
        group = self.param_groups[expert.group]
        if not module.effective:
            for parameter, decayed in zip(expert.params, expert.decayed, strict=True):
                self._adamw(parameter, group, decayed, wins)
            return
        weight, lora = module.experts[0].params[0], module.experts[1:]
        if index == 0:
            # Decay acts on W = W_eff - sum s B A, so what it took from the experts' part is given back.
            self._adamw(weight, group, True, wins)
            rate = float(group["lr"]) * group["weight_decay"]
            for scale, other in zip(module.scaling, lora, strict=True) if rate else ():
                a, b = other.params
                weight.addmm_(b if wins is None else b * wins, a, alpha=rate * scale)
            for bias in expert.params[1:]:
                self._adamw(bias, group, False, wins)
            return
        a, b = expert.params
        old_a, old_b = a.clone(), b.clone()
        self._adamw(a, group, True, wins)
        self._adamw(b, group, True, wins)
        # s (B'A' - BA) as one product, so that the weight is rounded once; a loser's is zero to rounding, hence masked.
        change = torch.cat([b, -old_b], dim=1)
        scale = module.scaling[index - 1]
        weight.addmm_(change if wins is None else change * wins, torch.cat([a, old_a]), alpha=scale)

    def _adamw(self, parameter: nn.Parameter, group: dict[str, Any], decayed: bool, wins: Tensor | None) -> None:
        """p <- p (1 - eta lambda), then p <- p - eta m_hat / (sqrt v_hat + eps), with bias-corrected moments."""
        state, (beta1, beta2), lr = self.state[parameter], group["betas"], float(group["lr"])
        rate, root = lr / (1 - beta1 ** state["step"]), (1 - beta2 ** state["step"]) ** 0.5
        for old, m, v in blocks(parameter, state["exp_avg"], state["exp_avg_sq"]):
            denominator = v.sqrt().div_(root).add_(group["eps"])
            new = old.to(m.dtype, copy=wins is not None)
            if decayed and group["weight_decay"]:
                new.mul_(1 - lr * group["weight_decay"])
            new.addcdiv_(m, denominator, value=-rate)
            if wins is not None:
                new = torch.where(wins, new, old.to(new.dtype))
            if new is not old:
                old.copy_(new)

    def _plain_adamw(self, group: dict[str, Any]) -> None:
        """Parameters outside the modules: torch's own AdamW, fused where all is of one dtype."""
        params = [p for p in group["params"] if p.grad is not None]
        fused = [p for p in params if p.dtype == torch.promote_types(p.dtype, torch.float32)]
        states = [self._state(p) for p in fused]
        if fused:
            adamw(
                list(fused),
                [p.grad for p in fused],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(state["step"]), device=p.device) for p, state in zip(fused, states, strict=True)],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for state in states:
                state["step"] += 1
        for parameter in params:
            if parameter.dtype != torch.promote_types(parameter.dtype, torch.float32):
                state = self._state(parameter)
                state["step"] += 1
                accumulate(parameter.grad, state["exp_avg"], state["exp_avg_sq"], group["betas"])
                self._adamw(parameter, group, True, None)

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
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(ids, params, strict=True):
            saved = state_dict["state"].get(index, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in saved:
                    dtype = torch.promote_types(parameter.dtype, torch.float32)
                    self.state[parameter][name] = saved[name].to(parameter.device, dtype, copy=True)
