"""A record of every step's routing: kept on the device, drained now and then, refused where it cannot be true."""

from typing import Any

import torch

from molf.optim import Routing

# Controls under which one expert wins all, or all experts win alike, whatever the scores say.
PINNED = ("full", "lora", "alternate")


class RoutingError(Exception):
    """The routing did not happen as claimed: scores missing, not finite, or zero while the rate is above 0."""


class RoutingRecorder:
    """Collects `MoLFAdamW.last_routing` after every step.

    Args:
        drain_every: Steps whose scores stay on the device before they are read in one go.
    """

    def __init__(self, drain_every: int = 64) -> None:
        self.drain_every = drain_every
        self.modules: tuple[str, ...] = ()
        self.experts: tuple[str, ...] = ()
        self.decided_by = "scores"
        self._pending: list[Routing] = []
        self._steps: list[int] = []
        self._counted: list[bool] = []
        self._scores: list[torch.Tensor] = []  # (steps, modules, experts) each, on the host
        self._winners: list[torch.Tensor] = []

    def record(self, routing: Routing | None) -> None:
        """Takes one step's routing.

        Raises:
            RoutingError: There is none, or a drained step's cannot be true.
        """
        if routing is None:
            raise RoutingError("the optimizer made a step and left no routing scores")
        self.modules, self.experts, self.decided_by = routing.modules, routing.experts, routing.decided_by
        self._pending.append(routing)
        if len(self._pending) >= self.drain_every:
            self.drain()

    def drain(self) -> None:
        """Reads the collected steps to the host and checks them.

        Raises:
            RoutingError: A score is not finite, or zero while its expert's rate is above 0, or a control's winners are
                not what it claims of them.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        scores = torch.stack([routing.scores for routing in pending]).double().cpu()
        winners = torch.stack([routing.winners for routing in pending]).cpu()
        rates = torch.tensor([routing.rates for routing in pending], dtype=torch.float64)
        self._steps += [routing.step for routing in pending]
        self._counted += (rates > 0).any(dim=1).tolist()
        self._scores.append(scores)
        self._winners.append(winners)
        wrong = ~torch.isfinite(scores) | ((scores == 0) & (rates > 0)[:, None, :])
        if wrong.any():
            step, module, expert = wrong.nonzero()[0].tolist()
            raise RoutingError(
                f"step {pending[step].step}, module {self.modules[module]}, expert {self.experts[expert]}: the score "
                f"is {scores[step, module, expert]} at a rate of {rates[step, expert]}; no update can be routed by it"
            )
        belied = _belied(self.decided_by, torch.tensor([routing.step for routing in pending]), scores, winners)
        if belied.any():
            step = pending[int(belied.nonzero()[0])].step
            raise RoutingError(f"step {step}: winners is {self.decided_by}, but others won than that says")

    def columns(self) -> dict[str, Any]:
        """The record as columns, a row for each step, module and expert: step, module, expert, score, won, counted.

        `counted` is False in steps whose rate is 0 (the first of a warm-up): they move nothing and leave the shares.

        Raises:
            RoutingError: As `drain`, or nothing was recorded.
        """
        scores, winners, counted = self._all()
        steps, modules, experts = scores.shape
        each = modules * experts
        return {
            "step": torch.tensor(self._steps, dtype=torch.int32).repeat_interleave(each).numpy(),
            "module": [name for name in self.modules for _ in range(experts)] * steps,
            "expert": list(self.experts) * (steps * modules),
            "score": scores.flatten().numpy(),
            "won": winners.flatten().numpy(),
            "counted": counted.repeat_interleave(each).numpy(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The record so far, as plain data and tensors.

        Raises:
            RoutingError: As `drain`.
        """
        self.drain()
        return {
            "modules": self.modules,
            "experts": self.experts,
            "decided_by": self.decided_by,
            "steps": self._steps,
            "counted": self._counted,
            "scores": torch.cat(self._scores) if self._scores else torch.zeros(0),
            "winners": torch.cat(self._winners) if self._winners else torch.zeros(0),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        self.modules, self.experts = state["modules"], state["experts"]
        self.decided_by = state.get("decided_by", "scores")
        self._pending, self._steps, self._counted = [], list(state["steps"]), list(state["counted"])
        self._scores, self._winners = ([state[key]] if self._steps else [] for key in ("scores", "winners"))

    def winners(self) -> torch.Tensor:
        """Who won: (steps, modules, experts), bool, on the host.

        Raises:
            RoutingError: As `columns`.
        """
        return self._all()[1]

    def summary(self) -> dict[str, Any]:
        """Shares of the counted steps that each expert won, over all and by module, and whether one side won all.

        Returns:
            experts, share {expert: float}, share_by_module {module: {expert: float}}, one_sided (bool), steps,
            decided_by (as `MoLFAdamW`'s `winners`: a control that pins its winners is never one-sided).

        Raises:
            RoutingError: As `columns`.
        """
        _, winners, counted = self._all()
        won = winners[counted].double()
        by_module = won.mean(dim=0) if len(won) else torch.zeros(winners.shape[1:], dtype=torch.float64)
        share = by_module.mean(dim=0).tolist()
        return {
            "experts": list(self.experts),
            "steps": len(won),
            "share": dict(zip(self.experts, share, strict=True)),
            "share_by_module": {
                module: dict(zip(self.experts, row, strict=True))
                for module, row in zip(self.modules, by_module.tolist(), strict=True)
            },
            # With as many winners as experts every share is 1: then nothing is routed, and nothing is one-sided.
            "one_sided": bool(len(won)) and max(share) == 1.0 and min(share) == 0.0 and self.decided_by not in PINNED,
            "decided_by": self.decided_by,
        }

    def _all(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.drain()
        if not self._scores:
            raise RoutingError("no step was routed")
        return torch.cat(self._scores), torch.cat(self._winners), torch.tensor(self._counted)


def _belied(decided_by: str, steps: torch.Tensor, scores: torch.Tensor, winners: torch.Tensor) -> torch.Tensor:
    """In which steps a control's winners are not what it claims of them; what is drawn claims nothing.

    Args:
        decided_by: As `MoLFAdamW`'s `winners`.
        steps: (steps,), from 1 on.
        scores: (steps, modules, experts).
        winners: (steps, modules, experts), bool.

    Returns:
        (steps,), bool.
    """
    experts = winners.shape[2]
    match decided_by:
        case "full" | "alternate":
            alone = torch.zeros_like(steps) if decided_by == "full" else steps % experts
            return (winners != torch.nn.functional.one_hot(alone, experts).bool()[:, None]).any(dim=2).any(dim=1)
        case "lora":
            return winners[:, :, 0].any(dim=1)
        case "shuffled":  # as many of each expert as the scores choose
            order = scores.sort(dim=2, descending=True, stable=True).indices[:, :, : int(winners[0, 0].sum())]
            chosen = torch.zeros_like(winners).scatter_(2, order, True)
            return (chosen.sum(dim=1) != winners.sum(dim=1)).any(dim=1)
    return torch.zeros(len(steps), dtype=torch.bool)
