"""Routed AdamW: every expert's moments move in every step, only the winners' weights do (arXiv 2605.07111).

The arithmetic is adamw.py's; here is who owns which parameter, who wins, and what that does to an effective weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from molf import kernels
from molf.adamw import AdamW, Precision, evaluate, plain_param_groups
from molf.modules import layer
from molf.nn import expert_names, local, molf_modules, other_parameters, whole

# What a score is taken over, all modules of which then get the same winners; `module` is the paper's.
Scope = Literal["module", "layer", "model"]
# What decides who wins; `scores` is the method, all others are controls of it (docs/methods.md).
Decider = Literal["scores", "shuffled", "random", "full", "lora", "alternate"]


class Routing(NamedTuple):
    """One step's choice in every module."""

    step: int  # 1 for the first
    modules: tuple[str, ...]
    experts: tuple[str, ...]
    scores: Tensor  # (modules, experts), float64, on the parameters' device
    winners: Tensor  # (modules, experts), bool
    rates: tuple[float, ...]  # learning rate of each expert
    decided_by: Decider = "scores"


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
        if expert == "full":
            group |= {"lr": lr, "weight_decay": weight_decay}
        else:
            group |= {"lr": lora_lr, "weight_decay": lora_weight_decay}
            group["scaling"] = {name: module.scaling[index - module.train_base] for name, module in modules}
        group["effective"] = [name for name, module in modules if module.is_effective]
        groups.append(group)
    return groups + plain_param_groups(other_parameters(model), lr, weight_decay)


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
        score_per: `module`; or, as an ablation, `layer` or `model`: sum and N are over an expert's parameters in all
            modules of a layer (by their names: up to the first number) or of the model, which get the same winners.
        winners: `scores`; or, as a control, `shuffled` (those of the scores, dealt out to the modules at random anew
            in each step), `random` (any `top_k`), `full` (always expert 0), `lora` (of the LoRA experts those with the
            highest scores) or `alternate` (expert t mod experts in step t). Scores are taken and kept all the same.
        seed: Of the draws of `shuffled` and `random`, which depend on it and on the step alone.

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
        score_per: Scope = "module",
        winners: Decider = "scores",
        seed: int = 0,
    ) -> None:
        groups = list(params)
        if not groups or not all(isinstance(group, dict) and "kind" in group for group in groups):
            raise ValueError("MoLFAdamW takes the groups of molf_param_groups(model, ...), not bare parameters")
        experts = sum(group["kind"] == "expert" for group in groups)
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k is {top_k}; there are {experts} experts in each module, so 1 to {experts} may win")
        if score not in ("epd", "pfn"):
            raise ValueError(f"score is {score!r}; allowed: epd, pfn")
        for name, value, allowed in (("score_per", score_per, Scope), ("winners", winners, Decider)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(get_args(allowed))}")
        full = any(group.get("expert") == "full" for group in groups)
        if problem := contradiction(winners, top_k, full, experts - full):
            raise ValueError(problem)
        options = {"top_k": top_k, "score": score, "score_per": score_per, "winners": winners, "seed": seed}
        super().__init__(groups, betas, eps, moments, backend, **options)
        own = {(group["betas"], group["eps"]) for group in self.param_groups if group["kind"] == "expert"}
        if len(own) > 1:
            raise ValueError(f"the experts' groups differ in betas or eps: {sorted(own)}; they share one score")
        self.last_routing: Routing | None = None
        self._modules = self._layout()
        self._scopes = self._grouped()

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

    def _grouped(self) -> list[int]:
        """For each module the number of the group that it is scored with; empty where each is scored alone."""
        score_per = self.param_groups[0]["score_per"]
        if score_per == "module":
            return []
        names = ["" if score_per == "model" else layer(module.name) for module in self._modules]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return [numbers[name] for name in names]

    def _params(self, expert: Expert) -> list[nn.Parameter]:
        params: list[nn.Parameter] = self.param_groups[expert.group]["params"]
        return params[expert.start : expert.start + expert.count]

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
        loss = evaluate(closure)
        self._require_gradients()
        scores = self._scores()
        winners = self._decide(scores)
        if winners.device.type == "cpu":
            for module, chosen in zip(self._modules, winners.tolist(), strict=True):
                for index in range(len(module.experts)):
                    if chosen[index]:
                        self._move_expert(module, index)
        else:
            self._move_masked(winners)
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
            decided_by=self.param_groups[0]["winners"],
        )
        return loss

    def _decide(self, scores: Tensor) -> Tensor:
        """Who wins by `winners`: `select` of the scores, or of what a control puts in their place.

        Draws are a function of seed, step and place, so that all processes and a resumed run draw alike; nothing of it
        waits for a device.

        Args:
            scores: (modules, experts).

        Returns:
            (modules, experts), bool.
        """
        first = self.param_groups[0]
        step: int = self.state[first["params"][0]]["step"]
        modules, experts = scores.shape
        match first["winners"]:
            case "shuffled":
                places = kernels.drawn(modules, first["seed"], step, scores.device).argsort(stable=True)
                return self.select(scores).index_select(0, places)
            case "random":
                return self.select(kernels.drawn(modules * experts, first["seed"], step, scores.device).view_as(scores))
            case "lora":
                scores = scores.clone()
                scores[:, 0] = -torch.inf
                return self.select(scores)
            case "full" | "alternate" as decider:
                one = torch.zeros_like(scores)
                one[:, 0 if decider == "full" else step % experts] = 1
                return self.select(one)
        return self.select(scores)

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
        sums.index_add_(0, kernels.to_device(torch.tensor(owners), parts.device), parts)
        _sum_over_shards(params, sums)
        sums = self._pooled(sums.view(len(self._modules), -1))
        counts = self._pooled(torch.tensor(sizes, dtype=torch.float64).view(len(self._modules), -1))
        mean = sums / kernels.to_device(counts, parts.device)
        if groups[0]["score"] == "pfn":
            return mean.sqrt()
        rates = torch.tensor([float(group["lr"]) for group in groups], dtype=torch.float64)
        return mean * kernels.to_device(rates, parts.device)

    def _pooled(self, values: Tensor) -> Tensor:
        """The sum of each module's values over all modules that it is scored with, in an order that is always the same.

        Args:
            values: (modules, experts).

        Returns:
            (modules, experts), equal rows for modules of one group.
        """
        if not self._scopes:
            return values
        members: list[list[int]] = [[] for _ in range(1 + max(self._scopes))]
        for row, group in enumerate(self._scopes):
            members[group].append(row)
        longest = max(map(len, members))
        # A row of zeros behind the others fills up the shorter groups.
        index = torch.tensor([rows + [len(values)] * (longest - len(rows)) for rows in members])
        filled = torch.cat([values, values.new_zeros(1, values.shape[1])])
        each = filled.index_select(0, kernels.to_device(index.flatten(), values.device))
        sums = each.view(len(members), longest, -1).sum(dim=1)
        return sums.index_select(0, kernels.to_device(torch.tensor(self._scopes), values.device))

    def _move_expert(self, module: Module, index: int) -> None:
        """Moves a winner's weights, and the effective weight with them."""
        expert = module.experts[index]
        group, params = self.param_groups[expert.group], self._params(expert)
        if not module.effective:
            self._move(params, expert.decayed, group)
            return
        full = self._params(module.experts[0])[0]
        if index == 0:
            self._move(params, expert.decayed, group)
            # Decay acts on W = W_eff - sum s B A, so what it took from the experts' part is given back.
            rate = float(group["lr"]) * group["weight_decay"]
            for i, (scale, other) in enumerate(zip(module.scaling, module.experts[1:], strict=True) if rate else ()):
                a, b = self._params(other)
                _add_product(local(full), local(b), whole(a), rate * scale, self._seed(full) + 1 + 2 * i)
            return
        a, b = params
        old_a, old_b = whole(a).clone(), local(b).clone()
        self._move(params, expert.decayed, group)
        # s (B'A' - BA) as one product, so that the weight is rounded once.
        change = torch.cat([local(b), -old_b], dim=1)
        scale = module.scaling[index - 1]
        _add_product(local(full), change, torch.cat([whole(a), old_a]), scale, self._seed(full) + 2 * index)

    def _move_masked(self, winners: Tensor) -> None:
        """As `_move_expert` for all winners, which only the device knows: losers' changes are masked to nothing.

        A LoRA winner's old part leaves the effective weight before its new one enters, one rounding more than there.

        Args:
            winners: (modules, experts), bool, on a device.
        """
        full = [(row, module) for row, module in enumerate(self._modules) if module.full]
        effective = [(row, module) for row, module in full if module.effective]
        self._move_where([(module.experts[0], winners[row, 0]) for row, module in full])
        for row, module in effective:
            base = self.param_groups[module.experts[0].group]
            rate = float(base["lr"]) * base["weight_decay"]
            gates = _gates(winners[row], self._params(module.experts[0])[0])
            # What decay took from the experts' part is given back; a winner's own part makes room for its new one.
            self._add_experts(module, rate * gates[0] - gates[1:], 1)
        self._move_where(
            [
                (expert, winners[row, index])
                for row, module in enumerate(self._modules)
                for index, expert in enumerate(module.experts)
                if index or not module.full
            ]
        )
        for row, module in effective:
            gates = _gates(winners[row], self._params(module.experts[0])[0])
            self._add_experts(module, gates[1:], 2)

    def _move_where(self, chosen: list[tuple[Expert, Tensor]]) -> None:
        """Moves experts' weights, each where its scalar of `wins` holds: in one launch where the kernels allow."""
        if not chosen:
            return
        params = [p for expert, _ in chosen for p in self._params(expert)]
        fused = self._fused(params)
        if fused is None:
            for expert, wins in chosen:
                self._move(self._params(expert), expert.decayed, self.param_groups[expert.group], wins)
            return
        numbers = [
            self._numbers(parameter, decays, self.param_groups[expert.group])
            for expert, _ in chosen
            for parameter, decays in zip(self._params(expert), expert.decayed, strict=True)
        ]
        ms, vs = ([self._moment(p, name) for p in params] for name in ("exp_avg", "exp_avg_sq"))
        wins = torch.stack([wins for expert, wins in chosen for _ in range(expert.count)])
        eps = self.param_groups[chosen[0][0].group]["eps"]
        fused.move([local(p) for p in params], ms, vs, *zip(*numbers, strict=True), eps, wins)

    def _add_experts(self, module: Module, factors: Tensor, salt: int) -> None:
        """W_eff <- W_eff + sum_i factor_i s_i B_i A_i, factors (LoRA experts,) on the device."""
        full = self._params(module.experts[0])[0]
        pairs = zip(module.scaling, factors.unbind(), module.experts[1:], strict=True)
        for index, (scale, factor, expert) in enumerate(pairs):
            a, b = self._params(expert)
            left = local(b).to(factor.dtype) * factor
            _add_product(local(full), left, whole(a), scale, self._seed(full) + salt + 2 * index)

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
            for key in ("score_per", "winners", "seed"):  # which an earlier state has not
                group.setdefault(key, self.defaults[key])
        self._scopes = self._grouped()


def contradiction(winners: str, top_k: int, full: bool, lora: int) -> str:
    """Why a control cannot be had of such experts, in words; empty where it can.

    Args:
        winners: As `MoLFAdamW`'s.
        top_k: Likewise.
        full: Whether the full weight is an expert.
        lora: How many LoRA experts there are.
    """
    if winners in ("full", "lora") and not full:
        meant = "full needs the full weight as an expert" if winners == "full" else "lora would change nothing"
        return f"winners is {winners}, but over a frozen base all experts are LoRA's: {meant}; choose another"
    if winners in ("full", "alternate") and top_k > 1:
        return f"winners is {winners}, which lets one expert win in each step, but top_k is {top_k}; set top_k to 1"
    if winners == "lora" and top_k > lora:
        return f"winners is lora and top_k is {top_k}, but LoRA's experts are {lora}; lower top_k or add ranks to r"
    return ""


def _gates(winners: Tensor, weight: Tensor) -> Tensor:
    """A module's winners as factors, (experts,): float32 at least, since 1 - eta lambda is 1 in bfloat16."""
    return winners.to(torch.promote_types(weight.dtype, torch.float32))


def _add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float, seed: int) -> None:
    """weight <- weight + scale left right; bfloat16 is added up in float32 and rounded stochastically.

    Args:
        weight: (out, in).
        left: (out, k).
        right: (k, in).
        scale: Of the product.
        seed: Of the rounding.
    """
    if weight.dtype != torch.bfloat16:
        weight.addmm_(left, right, alpha=scale)
        return
    widened = 1 << (18 if weight.device.type == "cpu" else 24)  # elements that are float32 at once
    right, at_once = right.float(), max(1, widened // weight.shape[1])
    for start in range(0, len(weight), at_once):
        rows = slice(start, start + at_once)
        total = torch.addmm(weight[rows].float(), left[rows].float(), right, alpha=scale)
        weight[rows] = kernels.round_stochastically(total, seed + start * weight.shape[1])


def _sum_over_shards(parameters: Sequence[Tensor], sums: Tensor) -> None:
    """Adds up, over the processes that hold the parameters' shards, what each summed over its own.

    Raises:
        ValueError: They are not all cut alike.
    """
    if len({(getattr(p, "device_mesh", None), getattr(p, "placements", ())) for p in parameters}) > 1:
        raise ValueError("some of the experts are sharded and others not, or otherwise: shard all layers in one way")
    parameter = parameters[0]
    mesh = getattr(parameter, "device_mesh", None)
    for dim, placement in enumerate(getattr(parameter, "placements", ())):
        if mesh is not None and placement.is_shard():
            torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
