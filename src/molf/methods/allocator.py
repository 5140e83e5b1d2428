"""AdaLoRA's rank allocator: PEFT's, with importance in float32 and a budget that is met exactly.

PEFT keeps importance in the weights' dtype and masks everything up to a threshold, ties included. In bfloat16 ties are
common, and what is left then is less than the budget. Here ties go to the triplet that comes first.
"""

from typing import Any

import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

POINTS = 60  # of the trajectory that a summary keeps


class Allocator(RankAllocator):
    """Decides which triplets (a row of A, its singular value, a column of B) stay; a part of every checkpoint.

    Attributes:
        masks: {name of a module's lora_E: which of its triplets stay}, of the last allocation; empty before the first.
        trajectory: (step, fewest, mean, most triplets of a module), one for each allocation.
        steps: Optimizer steps that it was told of.
    """

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str) -> None:
        super().__init__(model, peft_config, adapter_name)
        self.masks: dict[str, list[bool]] = {}
        self.trajectory: list[tuple[int, int, float, int]] = []
        self.steps = 0

    def layers(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """{name of lora_E: (E, A, B)}: r x 1, r x in, out x r."""
        found = dict(model.named_parameters())
        names = [name for name in found if f"lora_E.{self.adapter_name}" in name]
        return {
            name: (found[name], found[name.replace("lora_E", "lora_A")], found[name.replace("lora_E", "lora_B")])
            for name in names
        }

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """Smoothed sensitivity |p dL/dp| of every entry, and how much it wavers (the paper's section 3.2)."""
        for name, parameter in model.named_parameters():
            if "lora_" not in name or self.adapter_name not in name:
                continue
            importance = (parameter.float() * parameter.grad.float()).abs()  # type: ignore[union-attr]
            if name not in self.exp_avg_ipt:
                self.exp_avg_ipt[name] = torch.zeros_like(importance)
                self.exp_avg_unc[name] = torch.zeros_like(importance)
            for kept in (self.exp_avg_ipt, self.exp_avg_unc):  # a checkpoint's are on the host
                kept[name] = kept[name].to(importance.device)
            average, uncertainty = self.exp_avg_ipt[name], self.exp_avg_unc[name]
            average.mul_(self.beta1).add_(importance, alpha=1 - self.beta1)
            uncertainty.mul_(self.beta2).add_((importance - average).abs_(), alpha=1 - self.beta2)

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Sets the singular values of all but the `budget` most important triplets of the model to 0."""
        layers = self.layers(model)
        scores = []
        for name in layers:
            e, a, b = (self._element_score(name.replace("lora_E", part)) for part in ("lora_E", "lora_A", "lora_B"))
            scores.append(e.view(-1) + a.mean(dim=1) + b.mean(dim=0))
        every = torch.cat(scores)
        stays = torch.zeros_like(every, dtype=torch.bool)
        stays[torch.sort(every, descending=True, stable=True).indices[:budget]] = True
        masks = {}
        for (name, (values, _, _)), own in zip(layers.items(), stays.split([len(s) for s in scores]), strict=True):
            values.masked_fill_(~own.view(-1, 1).to(values.device), 0.0)
            masks[name] = own.tolist()
        self.masks = masks
        return masks

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """PEFT's; notes what came of it."""
        budget, masks = super().update_and_allocate(model, global_step, force_mask)
        if masks:
            ranks = [sum(mask) for mask in masks.values()]
            self.trajectory.append((global_step, min(ranks), sum(ranks) / len(ranks), max(ranks)))
        return budget, masks

    def thinned_trajectory(self) -> list[tuple[int, int, float, int]]:
        """At most `POINTS` allocations, evenly spaced, the first and the last among them."""
        last = len(self.trajectory) - 1
        chosen = dict.fromkeys(round(i * last / (POINTS - 1)) for i in range(POINTS)) if last >= POINTS else None
        return [self.trajectory[i] for i in chosen] if chosen else list(self.trajectory)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "sensitivity": self.exp_avg_ipt,
            "uncertainty": self.exp_avg_unc,
            "masks": self.masks,
            "trajectory": self.trajectory,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.exp_avg_ipt, self.exp_avg_unc = dict(state["sensitivity"]), dict(state["uncertainty"])
        self.masks, self.steps = state["masks"], state["steps"]
        self.trajectory = [tuple(point) for point in state["trajectory"]]  # type: ignore[misc]
        self.peft_config.rank_pattern = self.masks or None
