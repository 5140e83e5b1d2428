"""What a method may see of the training's data before it begins: its first micro-batches, and their loss."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from molf.encoding import IGNORED


def completion_loss(model: torch.nn.Module, inputs: dict[str, Tensor], items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the labelled tokens, with the head run on no more positions than the longest completion needs.

    Args:
        model: Causal language model that takes `logits_to_keep`.
        inputs: `Collator`'s batch.
        items: Labelled tokens of all micro-batches of the optimizer step, so that the sum over them is a mean; of this
            batch alone when None.

    Returns:
        Scalar.
    """
    labels = inputs["labels"]
    # Left padding puts every completion at the end; the position before its first token predicts it.
    first = max(1, int((labels != IGNORED).any(dim=0).int().argmax()))
    keep = labels.shape[1] - first + 1
    fields = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**fields, logits_to_keep=keep, use_cache=False).logits[:, :-1]
    targets = labels[:, first:]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss / ((targets != IGNORED).sum() if items is None else items)


class Batches(Protocol):
    """`molf.batches.SeededBatches` of one process: each iteration gives the next epoch's rows, by number."""

    def set_epoch(self, epoch: int) -> None: ...

    def __iter__(self) -> Iterator[list[int]]: ...


@dataclass(frozen=True)
class Sample:
    """The training's first micro-batches, whatever the number of processes: the same in each of them."""

    numbers: Batches
    rows: list[dict[str, list[int]]]  # encoded examples
    collate: Callable[[list[dict[str, list[int]]]], dict[str, Tensor]]
    model: torch.nn.Module
    accumulation: int  # micro-batches of one optimizer step of all processes together
    steps: int = 0  # optimizer steps of the training; 0: not known

    def batches(self, count: int) -> list[dict[str, Tensor]]:
        """The first `count` of them, on the device where the model lies now (`models.to_device` moves it).

        They are as small as the training's, which may be asked to split its own: what is meant in optimizer steps is
        `steps * accumulation`. When an epoch's examples are used up the next epoch begins, as in training.
        """
        self.numbers.set_epoch(0)
        epochs = itertools.chain.from_iterable(itertools.repeat(self.numbers))
        device = next(self.model.parameters()).device
        chosen = ([self.rows[number] for number in numbers] for numbers in itertools.islice(epochs, count))
        return [{name: value.to(device) for name, value in self.collate(rows).items()} for rows in chosen]
