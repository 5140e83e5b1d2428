"""The gradient of a task's loss at the pretrained weights, module by module, before anything is trained."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from molf import damage
from molf.encoding import IGNORED
from molf.methods.sample import completion_loss
from molf.modules import place
from molf.probe import spectra

FOLDS = 4
# Three ways to make two halves of four folds, so that what is told of the halves can be told three times.
HALVINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
Batch = dict[str, Tensor]


@dataclass
class Sums:
    """Of one module's weight, float32: what all that is told of its gradient is made from.

    Attributes:
        folds: Sum over the labelled tokens of each fold of batches, (out, in) each.
        squares: Sum over batches of the squared mean gradient of each.
    """

    folds: list[Tensor] = field(default_factory=list)
    squares: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Gradients:
    """Sums by module, and what they were summed over."""

    sums: dict[str, Sums]
    tokens: list[int]  # labelled, of each fold
    batches: int

    def mean(self, module: str, folds: Sequence[int] = range(FOLDS)) -> Tensor:
        """Mean gradient over the labelled tokens of some folds, (out, in)."""
        total = torch.stack([self.sums[module].folds[i] for i in folds]).sum(dim=0)
        return total / sum(self.tokens[i] for i in folds)

    def spread(self, module: str, folds: tuple[int, int]) -> Tensor:
        """The difference of two folds' means, scaled so that its energy is that of their common mean's noise."""
        one, two = (self.tokens[i] for i in folds)
        apart = self.mean(module, folds[:1]) - self.mean(module, folds[1:])
        return apart * (math.sqrt(one * two) / (one + two))

    def errors(self, module: str, share: float) -> Tensor:
        """`spectra.excess_errors`, each half against the other, for each of `HALVINGS`: (halvings, ranks + 1)."""
        found = []
        for first, second in HALVINGS:
            a, b = self.mean(module, first), self.mean(module, second)
            there = spectra.excess_errors(a, b, self.spread(module, second), share)
            back = spectra.excess_errors(b, a, self.spread(module, first), share)
            found.append((there + back) / 2)
        return torch.stack(found)

    def step(self, module: str) -> Tensor:
        """The direction of AdamW once its moments have averaged over the batches: mean over root of the mean square."""
        return self.mean(module) / ((self.sums[module].squares / self.batches).sqrt() + 1e-8)


def targets(model: nn.Module, excluded: Sequence[str] = (), every: int = 1) -> dict[str, nn.Linear]:
    """The linear layers that LoRA and the mixtures adapt, by name: all but the head and what is excluded.

    Args:
        model: A transformers model, or any module.
        excluded: Names, or ends of names.
        every: Of the layers only each so many-th, from the first on.

    Raises:
        ValueError: There are none.
    """
    output = getattr(model, "get_output_embeddings", None)
    head = output() if callable(output) else None
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not any(name == end or name.endswith(f".{end}") for end in excluded)
        and place(name)[1] % every == 0
    }
    if not found:
        raise ValueError("the model has no linear layer but its head and what the methods exclude")
    return found


def measure(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Batch, int], Tensor] = completion_loss,
    watch: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
) -> Gradients:
    """Sums the gradients of the modules' weights over batches; the model's weights stay as they are.

    Each gradient goes into its sums as soon as the backward has it, so that no second copy of all of them exists.

    Args:
        model: Everything but the modules' weights is frozen by this.
        modules: By name.
        batches: On the model's device, a multiple of FOLDS; they are dealt out to the folds in turn.
        loss: Of a batch, its sum over the labelled tokens divided by the given number.
        watch: Wraps the batches, for a progress bar.

    Returns:
        Sums of float32 on the model's device.
    """
    model.requires_grad_(False)
    found = Gradients({}, [0] * FOLDS, len(batches))
    fold, tokens = 0, 1
    hooks = []
    for name, module in modules.items():
        zeros = [torch.zeros_like(module.weight, dtype=torch.float32) for _ in range(FOLDS + 1)]
        own = found.sums[name] = Sums(zeros[:FOLDS], zeros[FOLDS])

        def take(weight: Tensor, own: Sums = own) -> None:
            assert weight.grad is not None
            gradient = weight.grad.float()
            own.folds[fold].add_(gradient)
            own.squares.addcmul_(gradient, gradient, value=tokens**-2)
            weight.grad = None

        module.weight.requires_grad_(True)
        hooks.append(module.weight.register_post_accumulate_grad_hook(take))
    for number, batch in enumerate(watch(batches)):
        fold, tokens = number % FOLDS, int((batch["labels"] != IGNORED).sum())
        found.tokens[fold] += tokens
        loss(model, batch, 1).backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    return found


@dataclass(frozen=True)
class Module:
    """What the probe tells of one module."""

    module: str
    type: str
    layer: int
    shape: tuple[int, int]  # out, in
    effective_rank: float  # of the mean gradient
    stable_rank: float
    energy: dict[int, float]  # share in the top r directions, by rank
    step_effective_rank: float  # of AdamW's step
    step_energy: dict[int, float]
    noise_share: float  # of one batch's gradient
    # Error by rank 0 to min(shape) of each halving, `spectra.excess_errors`, (halvings, ranks + 1).
    errors: Tensor


def look(gradients: Gradients, name: str, ranks: Sequence[int], share: float) -> Module:
    """All that is told of one module, one decomposition after the other.

    Args:
        gradients: Of `measure`.
        name: Of the module.
        ranks: Whose energies are wanted.
        share: As of `spectra.excess_errors`.
    """
    errors = gradients.errors(name, share).cpu()
    mean, step = gradients.mean(name), gradients.step(name)
    values, of_step = spectra.singular_values(mean), spectra.singular_values(step)
    kind, layer = place(name)
    mean_square = float(gradients.sums[name].squares.double().sum()) / gradients.batches
    return Module(
        name,
        kind,
        layer,
        (mean.shape[0], mean.shape[1]),
        damage.effective_rank(mean),
        spectra.stable_rank(values),
        {rank: spectra.energy(values, rank) for rank in ranks},
        damage.effective_rank(step),
        {rank: spectra.energy(of_step, rank) for rank in ranks},
        spectra.noise_share(float(errors[:, 0].mean()), mean_square),
        errors,
    )
