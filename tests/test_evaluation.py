"""Asking a model: the same answers from one run of a prompt as from a plain forward, whatever the batch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from molf import tiny
from molf.config import NewTokens
from molf.encoding import PLAIN_CHAT, Chat, encode_completion, encode_prompt
from molf.errors import RunError, UserError
from molf.evaluation import LanguageModel, Question
from molf.models import load_model, load_tokenizer
from molf.tasks import TASKS
from tests.conftest import talks
from tests.random_models import network, own_tokenizer, plain_rows
from tests.tasks.helpers import EVALUATION

MODELS = ["llama", "qwen2", "gemma3", "lfm2", "bfloat16"]
# Below this the order of two logits is left to chance: sums over another batch are rounded otherwise.
GAP = 1e-4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return own_tokenizer()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return network(request.param, tokenizer)


def forward(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token of a text alone, from one forward without padding or cache: float64."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0].double(), dim=-1)


def plain(model: Any, tokenizer: Any, prompt: str, completion: str) -> list[float]:
    """Log-probabilities of a completion's tokens, from one forward over the pair alone."""
    before, after = encode_prompt(tokenizer, prompt), encode_completion(tokenizer, completion)
    logprobs = forward(model, before + after)
    return [float(logprobs[len(before) - 1 + i, token]) for i, token in enumerate(after)]


def greedy(model: Any, tokenizer: Any, prompt: str, most: int) -> tuple[str, float]:
    """Greedy text token by token, each from a forward over all before it, and how close its closest call was."""
    ids = encode_prompt(tokenizer, prompt)
    start, gap = len(ids), np.inf
    while len(ids) < start + most:
        (best, second), tokens = forward(model, ids)[-1].topk(2)
        gap = min(gap, float(best - second))
        if tokens[0] == tokenizer.eos_token_id:
            break
        ids.append(int(tokens[0]))
    return tokenizer.decode(ids[start:], skip_special_tokens=True), gap


def test_all_answers_are_those_of_plain_forwards(model: Any, tokenizer: Any) -> None:
    """Of prompts that stand twice, completions of one and of several tokens, such with a common start, and text."""
    shared = " SELECT name"
    questions: list[Question] = [
        ("How many birds have a weight above 10?", [" A", " B", shared + " FROM birds", shared], 6),
        ("Name", [" SELECT"], 0),
        ("How many birds have a weight above 10?", [" C", shared + " FROM songs"], 0),
        ("What is it? " * 12, [" A", " the red one"], 9),
        ("Name", [], 3),
        ("The home town of Ada is", [shared, " Arvik"], 0),
    ]
    exact = model.dtype == torch.float32
    for size in (1, 2, 64):
        answers = LanguageModel(model, tokenizer, batch_size=size).answer(questions)
        for (prompt, completions, most), answer in zip(questions, answers, strict=True):
            for completion, logprobs in zip(completions, answer.logprobs, strict=True):
                assert logprobs.dtype == np.float64
                expected = plain(model, tokenizer, prompt, completion)
                assert logprobs == pytest.approx(expected, abs=1e-5 if exact else 0.1)
            text, gap = greedy(model, tokenizer, prompt, most)
            assert answer.text == text or gap < (GAP if exact else 0.1)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "bfloat16"])  # which rounds by more than the gap
def test_predictions_do_not_depend_on_the_batch(name: str, tokenizer: Any, kind: str) -> None:
    """One at a time and 64 together: whatever is decided by more than `GAP` is decided alike."""
    model = network(name, tokenizer)
    rows = plain_rows(kind, 12)
    most = 5
    tokens = NewTokens(sql=most, med=most, fact=most, completion=most, choice=most)
    evaluation = EVALUATION.model_copy(update={"max_new_tokens": tokens})
    one, many = (
        TASKS[kind].predict(LanguageModel(model, tokenizer, batch_size=size), rows, evaluation) for size in (1, 64)
    )
    assert list(one) == list(many)
    numbers = [name for name in one.columns.tolist() if "logprob" in name]
    for column in numbers:
        for left, right in zip(one[column], many[column], strict=True):
            assert left == pytest.approx(right, abs=GAP, nan_ok=True)
    clear = np.array([greedy(model, tokenizer, prompt, most)[1] >= GAP for prompt in rows["prompt"]])
    for left, right in preferences(one):
        clear &= np.abs(np.subtract(left, right)) >= GAP
    assert clear.sum() >= 10  # the test is about something
    rest = one.columns.difference(numbers)
    pd.testing.assert_frame_equal(one.loc[clear, rest], many.loc[clear, rest])


def preferences(predictions: pd.DataFrame) -> list[tuple[Any, Any]]:
    """Pairs of log-probabilities, one of each example, whose order decides a score."""
    if "logprob_A" in predictions:
        letters = np.sort(np.nan_to_num(predictions.filter(like="logprob_").to_numpy(), nan=-np.inf), axis=1)
        return [(letters[:, -1], letters[:, -2])]
    if "rewrite_logprob_new" in predictions:
        new, true = (
            [np.concatenate(row) for row in predictions.filter(regex=f"_logprob_{which}$").to_numpy().tolist()]
            for which in ("new", "true")
        )
        closest = [np.abs(a - b).min() for a, b in zip(new, true, strict=True)]
        return [(closest, np.zeros(len(closest)))]
    return []


def test_an_answer_in_a_conversation_does_not_depend_on_the_batch(base: Path) -> None:
    asked = [turns[:-1] for turns in talks(7)["messages"]]
    answers = [
        LanguageModel(load_model(base, torch.float32), load_tokenizer(base), batch_size=size).chat(asked, 5)
        for size in (1, 8)
    ]
    assert answers[0] == answers[1] and any(answers[0])


def test_choices_are_told_apart_by_their_last_token(base: Path) -> None:
    network = load_model(base, torch.float32)
    lm = LanguageModel(network, load_tokenizer(base), batch_size=4)
    logprobs, texts = lm.choose(["w1 w2", "w3"], [" w7 w3", " w7 w9"], 2)
    assert logprobs[0] == pytest.approx(
        [plain(network, lm.tokenizer, "w1 w2", choice)[1] for choice in (" w7 w3", " w7 w9")], abs=1e-5
    )
    assert logprobs.shape == (2, 2) and texts == lm.generate(["w1 w2", "w3"], 2)
    assert lm.choose([], [" w3"], 2)[0].shape == (0, 1)
    with pytest.raises(UserError, match="apart"):
        lm.choose(["w1"], [" unknown", " neither"], 2)


@pytest.mark.parametrize("choices", [(" w3 w4", " w5 w6"), (" w3", " w5 w4"), (" w3", " w3 w4")])
def test_choices_of_other_tokens_are_told_apart_by_all_of_them(base: Path, choices: tuple[str, ...]) -> None:
    network = load_model(base, torch.float32)
    lm = LanguageModel(network, load_tokenizer(base), batch_size=4)
    logprobs, _ = lm.choose(["w1 w2"], choices, 0)
    expected = [sum(plain(network, lm.tokenizer, "w1 w2", choice)) for choice in choices]
    assert logprobs[0] == pytest.approx(expected, abs=1e-5)


def test_a_question_may_have_options_of_one_token_and_of_two(tokenizer: Any) -> None:
    """The tokenizer of `tiny` knows the letters that its texts have."""
    lengths = {letter: len(encode_completion(tokenizer, f" {letter}")) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert set(lengths.values()) == {1, 2}
    prompts = [f"Which?\n{chr(10).join(f'{letter}. w{i}' for i, letter in enumerate(lengths))}\nAnswer:"] * 2
    rows = pd.DataFrame({"example_id": ["a", "b"], "prompt": prompts, "answer": ["A", "Z"], "subject": None})
    found = TASKS["choice"].predict(
        LanguageModel(network("llama", tokenizer), tokenizer, 4), rows.assign(options=len(lengths)), EVALUATION
    )
    assert found["accuracy"].sum() <= 1 and found["logprob_Z"].notna().all()


class Actor:
    """A model that says by heart what follows a prompt, and notes what it is run on.

    Args:
        lines: Token ids of a prompt -> those that follow.
    """

    device, dtype = "cpu", torch.float32
    config = SimpleNamespace(get_text_config=SimpleNamespace)  # which sets no limit

    def __init__(self, lines: dict[tuple[int, ...], list[int]], vocabulary: int) -> None:
        self.lines, self.vocabulary = lines, vocabulary
        self.shapes: list[tuple[int, int]] = []  # rows and tokens of each forward
        self.layers: list[Any] = []  # of the cache, which this is as well
        self.rows: list[list[int]] = []  # what is still to be said

    def eval(self) -> "Actor":
        return self

    def reorder_cache(self, index: torch.Tensor) -> None:
        self.rows = [self.rows[row] for row in index.tolist()]

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> Any:
        self.shapes.append((input_ids.shape[0], input_ids.shape[1]))
        assert others["position_ids"].max() < attention_mask.sum(dim=1).max()
        if others.get("past_key_values") is None:
            real = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
            self.rows = [[*self.lines[tuple(row)]] for row in real]
        logits = torch.zeros(len(input_ids), 1, self.vocabulary)
        for row, rest in enumerate(self.rows):
            logits[row, 0, rest.pop(0)] = 1
        return SimpleNamespace(logits=logits, past_key_values=self)


def test_a_row_that_is_done_leaves_the_batch(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    texts = {"A": " B", "How many birds?": " A SELECT name", "Name the birds": "", "B": " D" * 20}
    lines = {
        tuple(encode_prompt(tokenizer, prompt)): [*encode_completion(tokenizer, text), end]
        for prompt, text in texts.items()
    }
    actor = Actor(lines, len(tokenizer))
    lm = LanguageModel(actor, tokenizer, batch_size=8)  # type: ignore[arg-type]
    assert lm.generate(texts, 50) == list(texts.values())
    said = sorted((len(line) for line in lines.values()), reverse=True)
    # A prompt's own run says the first token; after that each row is run as often as it still has something to say.
    assert actor.shapes[0][0] == len(texts)
    assert [rows for rows, _ in actor.shapes[1:]] == [sum(n > i for n in said) for i in range(1, said[0])]
    assert {tokens for _, tokens in actor.shapes[1:]} == {1}
    # It never runs on beyond the number of tokens, and not at all where none is wanted.
    actor.shapes.clear()
    first = tokenizer.decode(encode_completion(tokenizer, texts["B"])[:3])
    assert lm.generate(["B"], 3) == [first] and len(actor.shapes) == 3
    assert lm.answer([("A", ["B"], 0)])[0].text == "" and len(actor.shapes) == 4


def test_equal_prompts_are_run_once_and_their_completions_without_them(tokenizer: Any) -> None:
    ids = {text: tuple(encode_prompt(tokenizer, text)) for text in ("How many birds?", "Name the birds")}
    actor = Actor({line: [5] * 9 for line in ids.values()}, len(tokenizer))
    lm = LanguageModel(actor, tokenizer, batch_size=8)  # type: ignore[arg-type]
    lm.answer([(text, ["A", "B"], 0) for text in [*ids, *ids]])
    assert actor.shapes == [(2, max(map(len, ids.values())))]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_model_is_not_scored(tokenizer: Any, kind: str, value: float) -> None:
    model = network("llama", tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(RunError, match="NaN or infinity"):
        TASKS[kind].predict(LanguageModel(model, tokenizer, 4), plain_rows(kind, 4), EVALUATION)


def test_a_prompt_longer_than_the_models_window_is_refused(tokenizer: Any) -> None:
    model = network("llama", tokenizer)
    lm = LanguageModel(model, tokenizer, 4)
    places = len(encode_prompt(tokenizer, "How many birds?")) + 3
    model.config.max_position_embeddings = places
    assert len(lm.generate(["How many birds?"], 3)) == 1
    said = (
        f"1 of 2 prompts need up to {places + 1:,} tokens with their answers, and the model has places for {places:,}"
    )
    with pytest.raises(UserError, match=said):
        lm.answer([("How many birds?", (), 4), ("How?", (), 1)])


def test_a_token_that_a_model_rules_out_is_no_defect(tokenizer: Any) -> None:
    model = network("llama", tokenizer)
    whole = LanguageModel(model, tokenizer, 4)
    [before] = whole.answer([("Name", [" A"], 3)])
    ruled_out = tokenizer.eos_token_id
    forward_hook = model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([ruled_out]), -np.inf)
    )
    try:
        [after] = whole.answer([("Name", [" A"], 3)])
    finally:
        forward_hook.remove()
    assert after.logprobs[0] == pytest.approx(before.logprobs[0], abs=0.5) and len(after.text)


def test_an_answer_ends_with_the_turn_and_has_nothing_of_the_template() -> None:
    tokenizer = tiny.train_tokenizer(["User: Assistant: four and five"], 300)
    tokenizer.add_tokens(["<end>", "<thought>"])  # ordinary ones, which decoding does not leave out
    tokenizer.chat_template = PLAIN_CHAT.replace("eos_token if", "'<end>' if").replace(
        "}}: {{", "}}: {{ '<thought>\\n\\n' if message['role'] == 'assistant' else '' }}{{"
    )
    chat = Chat(tokenizer)
    assert (chat.before, chat.end) == (" <thought>\n\n", tokenizer.convert_tokens_to_ids("<end>"))
    said = tokenizer.encode(" <thought>\n\nfour and<end>five", add_special_tokens=False)
    talk = [{"role": "user", "content": "four"}]
    alone = encode_prompt(tokenizer, "four")
    actor = Actor({tuple(chat.encode_prompt(talk)): said, tuple(alone): said}, len(tokenizer))
    lm = LanguageModel(actor, tokenizer, batch_size=2)  # type: ignore[arg-type]
    assert lm.chat([talk, talk, talk], len(said)) == ["four and"] * 3
    # Asked without a conversation, the template has no part in it.
    assert lm.generate(["four"], len(said)) == [" <thought>\n\nfour and<end>five"]
