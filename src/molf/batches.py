"""What a training step is fed: encoded examples, their order, their batches."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset, Sampler

from molf.config import Training
from molf.encoding import IGNORED, Chat, encode_completion, encode_prompt, left_pad
from molf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Examples(Dataset[dict[str, list[int]]]):
    """Encoded examples: `prompt` and `completion` token ids, EOS included; too long ones left out and counted.

    A conversation's completion begins with its first answer, and has `labels` of its own: those of the turns between
    its answers are -100.
    """

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of each row, for messages
    dropped_too_long: int = 0
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest example, and positions on which the longest completion needs the head."""
        return (
            max(len(row["prompt"]) + len(row["completion"]) for row in self.rows),
            max(len(row["completion"]) for row in self.rows) + 1,
        )


def read_examples(path: Path) -> pd.DataFrame:
    """What training reads of prepared rows: example_id, prompt, completion, and messages where they are conversations.

    Args:
        path: The task's train.parquet.
    """
    import pyarrow.parquet

    there = pyarrow.parquet.read_schema(path).names
    wanted = ["example_id", "prompt", "completion", "messages"]
    return pd.read_parquet(path, columns=[name for name in wanted if name in there])


def encode_examples(tokenizer: "PreTrainedTokenizerBase", frame: pd.DataFrame, max_length: int) -> Examples:
    """Encodes each row; an example over `max_length` tokens is dropped, never cut.

    Args:
        tokenizer: The base model's. For conversations it gets a chat template if it has none, and a warning says so.
        frame: Rows with `prompt` and `completion`, or with `messages`, which go before them; named by `example_id`
            where there is one, else by number.
        max_length: Tokens of prompt and completion together.

    Raises:
        UserError: No example is left, or the chat template does not fit the conversations.
    """
    examples = Examples()
    if "messages" in frame and tokenizer.chat_template is None:
        examples.warnings.append(
            "the model's tokenizer has no chat template: one of ours marks the turns (`User: ...`, `Assistant: ...`), "
            "and is saved with the trained model"
        )
    names = frame["example_id"] if "example_id" in frame else range(len(frame))
    for name, row in zip(names, _encoded(tokenizer, frame), strict=True):
        if len(row["prompt"]) + len(row["completion"]) > max_length:
            examples.dropped_too_long += 1
        else:
            examples.rows.append(row)
            examples.names.append(str(name))
    if not examples.rows:
        raise UserError(f"training.max_length: {max_length} tokens leave none of the {len(frame)} examples; raise it")
    return examples


def _encoded(tokenizer: "PreTrainedTokenizerBase", frame: pd.DataFrame) -> Iterator[dict[str, list[int]]]:
    if "messages" not in frame:
        for prompt, completion in zip(frame["prompt"], frame["completion"], strict=True):
            yield {
                "prompt": encode_prompt(tokenizer, prompt),
                "completion": [*encode_completion(tokenizer, completion), tokenizer.eos_token_id],
            }
        return
    chat = Chat(tokenizer)
    for messages in frame["messages"]:
        ids, labels = chat.encode(messages)
        # Nothing predicts a text's first token.
        start = max(1, next(i for i, label in enumerate(labels) if label != IGNORED))
        yield {"prompt": ids[:start], "completion": ids[start:], "labels": labels[start:]}


def optimizer_steps(examples: int, batch: int, accumulation: int) -> int:
    """Optimizer steps of an epoch; the last batch and the last step may be smaller."""
    return math.ceil(math.ceil(examples / batch) / accumulation)


def total_steps(training: Training, examples: int) -> int:
    """Optimizer steps of a cell."""
    per_epoch = optimizer_steps(examples, training.batch_size, training.gradient_accumulation)
    return training.max_steps or math.ceil(training.epochs * per_epoch)


@dataclass(frozen=True)
class SeededOrder:
    """A fresh order in each epoch, by the seed and the epoch alone, so that it is the same for every method."""

    size: int  # number of examples
    seed: int

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


class SeededBatches(Sampler[list[int]]):
    """One process's micro-batches of an epoch.

    The order is cut into rounds of `processes * batch_size` examples, and each process takes its share of every round,
    so that an optimizer step sees the same examples whatever the number of processes. In an epoch's last round a share
    may be smaller than the others, or empty; `Collator` takes that.

    Args:
        order: Of all examples.
        batch_size: Rows of a micro-batch of one process (`Training.micro_batches`).
        rank: This process's number, from 0.
        processes: That train together.
    """

    def __init__(self, order: SeededOrder, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.order, self.batch_size, self.rank, self.processes = order, batch_size, rank, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration; without it, each iteration is the next epoch."""
        self.epoch = epoch

    @property
    def batch_sampler(self) -> "SeededBatches":
        """Itself: the Trainer looks here for the sampler that it tells the epoch, below a wrapper of accelerate's."""
        return self

    def __len__(self) -> int:
        return math.ceil(len(self.order) / (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        indices = self.order.indices(self.epoch)
        self.epoch += 1
        for share in range(self.rank, len(self) * self.processes, self.processes):
            yield indices[share * self.batch_size : (share + 1) * self.batch_size]


class Collator:
    """Left-pads examples and marks the completion's tokens as the labels, or those of them that have one.

    Of no example it makes a row without a label: a process whose share of an epoch's last round is empty still has to
    take part in what all processes do together, and adds nothing to the loss.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        sequences = [row["prompt"] + row["completion"] for row in rows]
        batch = left_pad(sequences or [[self.pad_id, self.pad_id]], self.pad_id)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for i, row in enumerate(rows):
            own = row.get("labels", row["completion"])
            labels[i, -len(own) :] = torch.tensor(own, dtype=torch.long)
        return {**batch, "labels": labels}
