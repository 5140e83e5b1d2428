"""Text to token ids, alike in training and evaluation: BOS, prompt, completion, left padding."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Positions without a loss, as torch's cross-entropy knows them.
IGNORED = -100


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """BOS, where the tokenizer has one, and the prompt's tokens."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + tokenizer.encode(prompt, add_special_tokens=False)


def encode_completion(tokenizer: "PreTrainedTokenizerBase", completion: str) -> list[int]:
    """The completion's tokens alone: encoded apart from the prompt, so that the border never falls inside a token."""
    return tokenizer.encode(completion, add_special_tokens=False)


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads sequences on the left to the longest.

    Returns:
        `input_ids`, `attention_mask` and `position_ids`, each (sequences, longest) of int64; positions count from each
        sequence's first real token.
    """
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, longest - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        attention_mask[row, longest - len(sequence) :] = 1
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
