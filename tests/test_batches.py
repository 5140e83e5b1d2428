"""Examples: how they are encoded, ordered and padded."""

from pathlib import Path

import pytest

from molf.batches import Collator, SeededBatches, SeededOrder, encode_examples, read_examples, total_steps
from molf.config import Training, check_params, read_yaml
from molf.encoding import IGNORED, left_pad
from molf.errors import UserError
from molf.models import load_tokenizer
from tests.conftest import ROOT, frame, talks


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


def test_a_conversation_is_learnt_where_the_assistant_speaks(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    assert tokenizer.chat_template is None
    talks().to_parquet(tmp_path / "train.parquet")
    rows = read_examples(tmp_path / "train.parquet")
    assert list(rows) == ["example_id", "prompt", "completion", "messages"]
    examples = encode_examples(tokenizer, rows, 64)
    assert "no chat template" in examples.warnings[0] and tokenizer.chat_template is not None
    row = examples[1]  # system, and two questions with their answers
    words = tokenizer.convert_ids_to_tokens([i for i in row["labels"] if i != IGNORED])
    answers = [turn["content"].split() for turn in rows["messages"][1] if turn["role"] == "assistant"]
    assert words == [*answers[0], "</s>", *answers[1], "</s>"]
    assert row["labels"][0] != IGNORED and IGNORED in row["labels"] and len(row["labels"]) == len(row["completion"])
    batch = Collator(tokenizer.pad_token_id)([examples[0], row])
    learnt = batch["labels"] != IGNORED
    assert (batch["labels"][learnt] == batch["input_ids"][learnt]).all()
    assert int(learnt[1].sum()) == len(words)
    lengths = [len(example["prompt"]) + len(example["completion"]) for example in examples.rows]
    assert examples.longest() == (max(lengths), max(len(example["completion"]) for example in examples.rows) + 1)
    # A second time nothing is to be said, and what is too long is left out whole.
    again = encode_examples(tokenizer, rows, min(lengths))
    assert not again.warnings and again.dropped_too_long == sum(length > min(lengths) for length in lengths)


def test_rows_of_other_tasks_are_read_without_what_training_needs_not(tmp_path: Path) -> None:
    frame(3).assign(example_id=["a", "b", "c"], answer="A").to_parquet(tmp_path / "train.parquet")
    assert list(read_examples(tmp_path / "train.parquet")) == ["example_id", "prompt", "completion"]


def test_padding_is_left_and_positions_count_from_the_first_real_token() -> None:
    batch = left_pad([[5, 6, 7], [8]], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def budget(**changes: int) -> Training:
    training = check_params(read_yaml(ROOT / "params.yaml"), "x").training
    return Training.model_validate(training.model_dump() | changes)


def steps(size: int, training: Training, epoch: int) -> list[set[int]]:
    """The examples of each optimizer step of an epoch, over all processes."""
    rows, accumulation = training.micro_batches()
    order = SeededOrder(size, seed=5)
    shares = []
    for rank in range(training.processes):
        batches = SeededBatches(order, rows, rank, training.processes)
        batches.set_epoch(epoch)
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
        assert all(len(batch) <= rows for batch in batches)
    rounds = list(zip(*shares, strict=True))  # as many in each process, since they act together
    found = []
    for start in range(0, len(rounds), accumulation):
        examples = [index for batches in rounds[start : start + accumulation] for batch in batches for index in batch]
        assert len(examples) == len(set(examples))
        found.append(set(examples))
    return found


@pytest.mark.parametrize("size", [7, 64, 65, 81])
def test_a_step_sees_the_same_examples_whatever_the_number_of_processes(size: int) -> None:
    for epoch in (0, 3):
        one = steps(size, budget(batch_size=4, gradient_accumulation=4), epoch)
        assert set.union(*one) == set(range(size)) and all(len(step) == 16 for step in one[:-1])
        assert [steps(size, budget(batch_size=4, gradient_accumulation=4, processes=n), epoch) for n in (2, 4)] == [
            one,
            one,
        ]
        assert steps(size, budget(batch_size=16, gradient_accumulation=1, processes=2), epoch) == one


def test_the_total_of_steps_is_what_the_epochs_hold() -> None:
    for size in (7, 21, 64, 65):
        training = budget(batch_size=4, gradient_accumulation=2, epochs=3)
        assert total_steps(training, size) == sum(len(steps(size, training, epoch)) for epoch in range(3))
    assert total_steps(budget(batch_size=4, gradient_accumulation=2, epochs=3, max_steps=5), 21) == 5


def test_an_epoch_follows_from_its_number_alone() -> None:
    batches = SeededBatches(SeededOrder(20, seed=1), 4)
    first, second = list(batches), list(batches)
    assert first != second and sorted(sum(second, [])) == list(range(20))
    batches.set_epoch(1)
    assert list(batches) == second


def test_no_example_makes_a_row_without_a_label() -> None:
    batch = Collator(pad_id=2)([])
    assert batch["input_ids"].shape == (1, 2) and (batch["labels"] == IGNORED).all()
    assert batch["attention_mask"].all()  # a row that attends to nothing would be no number
