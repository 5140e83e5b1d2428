"""What a training step is fed: encoded examples, their order, their batches."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset, Sampler

from molf.encoding import IGNORED, encode_completion, encode_prompt, left_pad
from molf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Examples(Dataset[dict[str, list[int]]]):
    """Encoded examples: `prompt` and `completion` token ids, EOS included; too long ones left out and counted."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of each row, for messages
    dropped_too_long: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def encode_examples(tokenizer: "PreTrainedTokenizerBase", frame: pd.DataFrame, max_length: int) -> Examples:
    """Encodes prompt and completion of each row; an example over `max_length` tokens is dropped, never cut.

    Args:
        tokenizer: The base model's.
        frame: Rows with `prompt` and `completion`, named by `example_id` where there is one, else by number.
        max_length: Tokens of prompt and completion together.

    Raises:
        UserError: No example is left.
    """
    examples = Examples()
    names = frame["example_id"] if "example_id" in frame else range(len(frame))
    for name, prompt, completion in zip(names, frame["prompt"], frame["completion"], strict=True):
        row = {
            "prompt": encode_prompt(tokenizer, prompt),
            "completion": [*encode_completion(tokenizer, completion), tokenizer.eos_token_id],
        }
        if len(row["prompt"]) + len(row["completion"]) > max_length:
            examples.dropped_too_long += 1
        else:
            examples.rows.append(row)
            examples.names.append(str(name))
    if not examples.rows:
        raise UserError(f"training.max_length: {max_length} tokens leave none of the {len(frame)} examples; raise it")
    return examples


class SeededOrder(Sampler[int]):
    """A fresh order in each epoch, by the seed and the epoch alone, so that it is the same for every method."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def indices(self, epoch: int) -> list[int]:
        """Numbers of the examples, as an epoch takes them."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator).tolist()

    def digest(self, epochs: int) -> str:
        """Hash of the order of the first so many epochs: 16 hexadecimal digits."""
        orders = np.asarray([self.indices(epoch) for epoch in range(epochs)], dtype=np.int64)
        return hashlib.sha256(orders.tobytes()).hexdigest()[:16]

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(self.indices(self.epoch - 1))


class Collator:
    """Left-pads examples and marks the completion's tokens as the labels."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = left_pad([row["prompt"] + row["completion"] for row in rows], self.pad_id)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for i, row in enumerate(rows):
            count = len(row["completion"])
            labels[i, -count:] = batch["input_ids"][i, -count:]
        return {**batch, "labels": labels}
