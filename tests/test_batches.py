"""Examples: how they are encoded, ordered and padded."""

from pathlib import Path

import pytest

from molf.batches import encode_examples
from molf.encoding import left_pad
from molf.errors import UserError
from molf.models import load_tokenizer
from tests.conftest import frame


def test_prompt_and_completion_are_encoded_apart_with_bos_and_eos(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    row = encode_examples(tokenizer, frame(1), 32)[0]
    assert tokenizer.convert_ids_to_tokens(row["prompt"]) == ["<s>", "w0", "w0", "w0"]
    assert tokenizer.convert_ids_to_tokens(row["completion"]) == ["w20", "</s>"]


def test_long_examples_are_dropped_whole_and_counted(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    all_rows, short = encode_examples(tokenizer, frame(), 32), encode_examples(tokenizer, frame(), 7)
    lengths = [len(row["prompt"]) + len(row["completion"]) for row in all_rows.rows]
    assert all_rows.dropped_too_long == 0
    assert short.dropped_too_long == sum(length > 7 for length in lengths) > 0
    assert [row for row in all_rows.rows if len(row["prompt"]) + len(row["completion"]) <= 7] == short.rows
    with pytest.raises(UserError, match="training.max_length: 2 tokens leave none of the 24 examples"):
        encode_examples(tokenizer, frame(), 2)


def test_padding_is_left_and_positions_count_from_the_first_real_token() -> None:
    batch = left_pad([[5, 6, 7], [8]], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
