"""What lm-evaluation-harness also defines, against it: the likeliest letter, and how likely a text is after another."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tokenizers import processors

from molf.evaluation import LanguageModel
from molf.tasks import TASKS, letters
from molf.tasks.letters import LETTERS
from tests.random_models import network, own_tokenizer, plain_rows
from tests.tasks.helpers import EVALUATION


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """Whatever asks the hub for something fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One that puts a BOS before what it encodes, as the harness leaves that to it."""
    made = own_tokenizer(letters=1000)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", made.bos_token_id)]
    )
    assert {len(made.encode(f" {letter}", add_special_tokens=False)) for letter in "ABCDE"} == {1}
    return made


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def both(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[LanguageModel, Any]:
    """Ours and the harness's view of one model."""
    from lm_eval.models.huggingface import HFLM

    model = network(request.param, tokenizer)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True, batch_size=4, device="cpu", max_length=512)
    return LanguageModel(model, tokenizer, batch_size=7), theirs


def harness(theirs: Any, rows: pd.DataFrame, counts: list[int]) -> tuple[np.ndarray, list[float]]:
    """Log-likelihoods, NaN where a row has no such option, and each row's accuracy, by its multiple-choice task."""
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    asked = [
        {"prompt": prompt, "letters": list(LETTERS[:count]), "gold": LETTERS.index(answer)}
        for prompt, answer, count in zip(rows["prompt"], rows["answer"], counts, strict=True)
    ]
    task = {
        "task": "own_rows",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(asked)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "letters",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    found = simple_evaluate(theirs, tasks=[task], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))
    samples = sorted(found["samples"]["own_rows"], key=lambda sample: sample["doc_id"])
    accuracy = [sample["acc"] for sample in samples]
    assert found["results"]["own_rows"]["acc,none"] == pytest.approx(np.mean(accuracy))
    logprobs = np.full((len(rows), max(counts)), np.nan)
    for row, sample in zip(logprobs, samples, strict=True):
        values = [float(response[0]) for response in sample["filtered_resps"]]
        row[: len(values)] = values
    return logprobs, accuracy


@pytest.mark.parametrize("kind", ["med", "choice"])
def test_letters_are_as_likely_and_as_often_right(both: tuple[LanguageModel, Any], kind: str) -> None:
    ours, theirs = both
    rows = plain_rows(kind, 24)
    counts = rows["options"].tolist() if kind == "choice" else [4] * len(rows)
    # Right about as often as wrong, so that the accuracy says something.
    rows = rows.assign(answer=[LETTERS[i % count] for i, count in enumerate(counts)])
    predictions = TASKS[kind].predict(ours, rows, EVALUATION)
    logprobs, accuracy = harness(theirs, rows, counts)
    columns = [f"logprob_{letter}" for letter in LETTERS[: max(counts)]]
    np.testing.assert_allclose(predictions[columns].to_numpy(), logprobs, rtol=0, atol=1e-5)
    assert predictions["accuracy"].tolist() == accuracy and 0 < np.mean(accuracy) < 1
    assert letters.metrics(predictions)["accuracy"] == pytest.approx(np.mean(accuracy))


def test_texts_of_several_tokens_are_as_likely(both: tuple[LanguageModel, Any]) -> None:
    from lm_eval.api.instance import Instance

    ours, theirs = both
    rows = plain_rows("sql", 10)
    pairs = list(zip(rows["prompt"], rows["completion"], strict=True))
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    expected = [logprob for logprob, _ in theirs.loglikelihood(asked, disable_tqdm=True)]
    answers = ours.answer((prompt, [completion], 0) for prompt, completion in pairs)
    assert [float(answer.logprobs[0].sum()) for answer in answers] == pytest.approx(expected, abs=1e-3)
