"""The training loop: the loss on supervised positions, the same batches for every method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from molf.batches import Collator, encode_examples
from molf.config import check_params, read_yaml
from molf.encoding import IGNORED, PLAIN_CHAT
from molf.errors import RunError, UserError
from molf.methods import METHODS
from molf.methods.sample import completion_loss
from molf.models import folder_hash, load_model, load_tokenizer
from molf.training import Outcome, train, warmup_steps
from tests.conftest import ROOT, frame, talks


def cell(base: Path, method: str, tmp_path: Path, rows: pd.DataFrame | None = None, **budget: Any) -> Outcome:
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= {"max_length": 32, "batch_size": 4, "epochs": 2, "threads": 1} | budget
    data["methods"]["molf-e"]["r"], data["methods"]["molf"]["r"] = [2, 4], [4]
    params = check_params(data, "test")
    return train(
        base,
        frame() if rows is None else rows,
        params.methods[method],
        params.training,
        3,
        tmp_path / f"weights-{method}",
        tmp_path / "scratch",
    )


@pytest.mark.parametrize("rows", [frame, talks])
def test_the_loss_equals_that_of_the_head_on_every_position(base: Path, rows: Callable[[int], pd.DataFrame]) -> None:
    tokenizer, model = load_tokenizer(base), load_model(base, torch.float32)
    batch = Collator(tokenizer.pad_token_id)(encode_examples(tokenizer, rows(6), 64).rows)
    fields = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**fields).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
    )
    torch.testing.assert_close(completion_loss(model, batch), plain)
    answers = [[completion] for completion in frame(6)["completion"]]
    if rows is talks:
        answers = [[t["content"] for t in turns if t["role"] == "assistant"] for turns in talks(6)["messages"]]
    assert int((batch["labels"] != IGNORED).sum()) == sum(len(x.split()) + 1 for said in answers for x in said)


@pytest.mark.parametrize("rows", [frame, talks])
def test_padding_changes_no_loss(base: Path, rows: Callable[[int], pd.DataFrame]) -> None:
    tokenizer, model = load_tokenizer(base), load_model(base, torch.float32)
    examples, collate = encode_examples(tokenizer, rows(6), 64).rows, Collator(tokenizer.pad_token_id)
    total = int((collate(examples)["labels"] != IGNORED).sum())
    alone = sum(completion_loss(model, collate([row]), total) for row in examples)
    torch.testing.assert_close(completion_loss(model, collate(examples)), alone)


@pytest.mark.parametrize("method", ["molf", "molf-e"])
def test_every_step_of_a_routed_cell_is_recorded(base: Path, tmp_path: Path, method: str) -> None:
    outcome = cell(base, method, tmp_path)
    assert outcome.history["step"].tolist() == list(range(1, 13)) == list(range(1, outcome.summary["steps"] + 1))
    assert (outcome.history["learning_rate"] >= 0).all() and outcome.history["learning_rate"].iloc[0] == 0
    assert (outcome.history[["grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes"]] > 0).all().all()
    assert outcome.routing is not None
    experts = 2
    assert len(outcome.routing) == 12 * 14 * experts
    assert outcome.routing.groupby(["step", "module"])["won"].sum().eq(1).all()
    assert not outcome.routing.loc[outcome.routing["step"] == 1, "counted"].any()
    assert abs(sum(outcome.summary["routing"]["share"].values()) - 1) < 1e-9


def test_peak_memory_counts_what_a_method_needs_before_the_first_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cell(base, "fft", tmp_path / "plain", max_steps=2).summary["peak_memory_bytes"]
    prepare = METHODS["fft"].prepare

    def greedy(*arguments: Any) -> Any:
        # 400 MB, freed at once, where peaks are counted
        torch.ones(100_000_000, device="cuda" if torch.cuda.is_available() else "cpu")
        return prepare(*arguments)

    monkeypatch.setattr(METHODS["fft"], "prepare", greedy)
    outcome = cell(base, "fft", tmp_path / "greedy", max_steps=2)
    assert outcome.summary["peak_memory_bytes"] > plain + 300_000_000
    assert outcome.history["peak_memory_bytes"].iloc[0] > plain + 300_000_000


@pytest.mark.parametrize("method", ["fft", "molf"])
def test_the_same_seed_gives_the_same_weights(base: Path, tmp_path: Path, method: str) -> None:
    hashes = []
    for run in ("first", "second"):
        cell(base, method, tmp_path / run)
        hashes.append(folder_hash(tmp_path / run / f"weights-{method}"))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(("method", "rows"), [("fft", frame), ("molf", frame), ("molf", talks)])
def test_accumulated_micro_batches_equal_one_batch(
    base: Path, tmp_path: Path, method: str, rows: Callable[[], pd.DataFrame]
) -> None:
    budget = {"max_length": 64}
    one = cell(base, method, tmp_path / "one", rows(), **budget, batch_size=4, gradient_accumulation=1)
    four = cell(base, method, tmp_path / "four", rows(), **budget, batch_size=1, gradient_accumulation=4)
    assert one.history["step"].tolist() == four.history["step"].tolist()
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(
            torch.tensor(one.history[name].to_numpy()),
            torch.tensor(four.history[name].to_numpy()),
            rtol=2e-3,
            atol=2e-3,
        )


def test_conversations_are_learnt_and_their_template_is_saved(base: Path, tmp_path: Path) -> None:
    outcome = cell(base, "fft", tmp_path, talks(), max_length=64, epochs=6)
    losses = outcome.history["loss"]
    assert losses.tail(4).mean() < losses.head(4).mean() - 0.2
    assert "no chat template" in outcome.summary["warnings"][0]
    assert load_tokenizer(base).chat_template is None
    assert load_tokenizer(tmp_path / "weights-fft").chat_template == PLAIN_CHAT


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        loss = completion_loss(*arguments)
        return loss * float("nan") if len(calls) == 3 else loss

    monkeypatch.setattr("molf.training.completion_loss", broken)
    with pytest.raises(RunError, match="step 3: loss nan"):
        cell(base, "fft", tmp_path)


def test_warm_up_is_a_share_of_the_steps() -> None:
    training = check_params(read_yaml(ROOT / "params.yaml"), "x").training
    with_steps = training.model_copy(update={"max_steps": 40, "warmup": 0.1})
    assert warmup_steps(with_steps, 1000) == 4
    by_epochs = training.model_copy(update={"epochs": 2, "batch_size": 8, "gradient_accumulation": 4, "warmup": 0.1})
    assert warmup_steps(by_epochs, 1000) == 7  # 2 epochs of ceil(125 / 4) = 32 steps


def test_a_run_that_moved_nothing_fails(base: Path, tmp_path: Path) -> None:
    """The only step of a run is the warm-up's first, whose rate is 0."""
    with pytest.raises(RunError, match="1 optimizer steps, none with a learning rate above 0"):
        cell(base, "fft", tmp_path, max_steps=1, warmup=0.5)


def test_a_model_that_a_method_cannot_adapt_is_a_message(base: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = load_tokenizer(base)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="method molf does not fit this model: only nn.Linear"):
        cell(tmp_path / "gpt2", "molf", tmp_path)
