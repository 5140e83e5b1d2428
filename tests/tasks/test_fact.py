from typing import Any

import pandas as pd
import pytest

from molf.blocks import NoOptions
from molf.tasks import fact
from tests.tasks.helpers import EVALUATION, StandIn, real, rejected, with_ids

OPTIONS = NoOptions()


def record(**changes: Any) -> dict[str, Any]:
    rewrite = {
        "prompt": "The capital of {} is",
        "subject": "Norland",
        "target_new": {"str": "Aville"},
        "target_true": {"str": "Bton"},
    }
    lists = {"paraphrase_prompts": ["Norland is ruled from"], "neighborhood_prompts": ["The capital of Sudland is"]}
    return {
        "requested_rewrite": {**rewrite, **{k: v for k, v in changes.items() if k in rewrite}},
        **{name: changes.get(name, value) for name, value in lists.items()},
    }


def flat(*records: dict[str, Any]) -> pd.DataFrame:
    return fact.normalise(pd.DataFrame(list(records)), OPTIONS)


def test_the_prompt_has_its_subject_and_no_space_at_the_end() -> None:
    assert fact.prompt("The capital of {} is ", "Norland") == "The capital of Norland is"
    assert fact.completion("Aville") == " Aville"


def test_examples_are_flat() -> None:
    frame = flat(record(), record(subject="{odd}")).set_index(pd.Index([5, 2]))
    examples = with_ids(fact.to_examples(frame, OPTIONS))
    fact.prepared_schema().validate(examples, lazy=True)
    assert examples.index.tolist() == [5, 2]
    assert examples.loc[5].drop("example_id").to_dict() == {
        "prompt": "The capital of Norland is",
        "completion": " Aville",
        "target_new": "Aville",
        "target_true": "Bton",
        "paraphrase_prompts": ["Norland is ruled from"],
        "neighborhood_prompts": ["The capital of Sudland is"],
    }
    assert examples.loc[2, "prompt"] == "The capital of {odd} is"


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"prompt": "No slot"}, "has {} once"),
        ({"prompt": "{} and {}"}, "has {} once"),
        ({"prompt": None}, "is given"),
        ({"subject": 5}, "is text"),
        ({"subject": "  "}, "is not empty"),
        ({"target_new": "Aville"}, "is given"),
        ({"target_new": {"str": "Bton "}}, "new and true object differ"),
        ({"target_true": {"str": "B\x00"}}, "has no control characters"),
        ({"paraphrase_prompts": []}, "is a list of texts"),
        ({"paraphrase_prompts": "alone"}, "is a list of texts"),
        ({"neighborhood_prompts": ["x", 3]}, "is a list of texts"),
        ({"neighborhood_prompts": ["x", ""]}, "is a list of texts"),
        ({"neighborhood_prompts": None}, "is given"),
    ],
)
def test_a_bad_row_is_found_with_its_check(changes: dict[str, Any], check: str) -> None:
    assert rejected(fact.raw_schema(OPTIONS), flat(record(), record(**changes), record())) == {(check, 1)}


def test_a_record_without_its_rewrite() -> None:
    frame = flat(record(), {**record(), "requested_rewrite": None})
    assert rejected(fact.raw_schema(OPTIONS), frame) == {("is given", 1)}


def test_lists_survive_parquet(tmp_path: Any) -> None:
    pd.DataFrame([record(), record()]).to_parquet(tmp_path / "raw.parquet")
    frame = fact.normalise(pd.read_parquet(tmp_path / "raw.parquet"), OPTIONS)
    assert rejected(fact.raw_schema(OPTIONS), frame) == set()
    assert fact.to_examples(frame, OPTIONS)["paraphrase_prompts"].tolist() == [["Norland is ruled from"]] * 2


def test_scores_of_hand_made_log_probabilities() -> None:
    examples = with_ids(
        pd.DataFrame(
            {
                "prompt": ["p0", "p1", "p2", "p3"],
                "completion": [" New"] * 4,
                "target_new": ["New"] * 4,
                "target_true": ["True"] * 4,
                "paraphrase_prompts": [["q0", "q1"], ["q0"], ["q1"], ["q0"]],
                "neighborhood_prompts": [["n0", "n1"], ["n0"], ["n0"], ["n1"]],
            }
        )
    )
    logprobs = {
        ("p0", " New"): [-1.0, -1.0],  # mean -1 beats -2, though its sum does not beat the one token's
        ("p0", " True"): [-2.0],
        ("p1", " New"): [-3.0, -0.2],  # preferred by the mean, not by the first token
        ("p1", " True"): [-2.0],
        ("p2", " New"): [-2.0],  # a tie prefers neither
        ("p2", " True"): [-2.0],
        ("p3", " New"): [-1.0, -9.0],  # preferred by the first token, not by the mean
        ("p3", " True"): [-2.0],
        ("q0", " New"): [-1.0],
        ("q0", " True"): [-2.0],
        ("q1", " New"): [-2.0],
        ("q1", " True"): [-1.0],
        ("n0", " New"): [-2.0],
        ("n0", " True"): [-1.0],
        ("n1", " New"): [-1.0],
        ("n1", " True"): [-1.0],
    }
    said = {"p0": " New York", "p1": "New", "p2": " old", "p3": ""}
    lm = StandIn(said.__getitem__, lambda prompt, completion: logprobs[prompt, completion])
    predictions = fact.predict(lm, examples, EVALUATION)  # type: ignore[arg-type]
    assert lm.calls == ["answer"]
    assert predictions["efficacy"].tolist() == [1, 1, 0, 0]
    assert predictions["efficacy_first_token"].tolist() == [1, 0, 0, 1]
    assert predictions["paraphrase"].tolist() == [0.5, 1, 0, 1]
    assert predictions["neighborhood"].tolist() == [0.5, 1, 1, 0]
    assert predictions["accuracy"].tolist() == [1, 1, 0, 0]
    assert predictions["rewrite_logprob_new"].tolist() == [[-1.0], [-1.6], [-2.0], [-5.0]]
    assert predictions["neighborhood_logprob_true"].tolist() == [[-1.0, -1.0], [-1.0], [-1.0], [-1.0]]
    scores = fact.metrics(predictions)
    assert scores.pop("primary_name") == "score" and scores.pop("left_out") == {}
    assert scores.pop("primary") == scores["score"] == pytest.approx(3 / (1 / 0.5 + 1 / 0.625 + 1 / 0.625))
    assert scores == {
        "n": 4,
        "score": scores["score"],
        "efficacy": 0.5,
        "paraphrase": 0.625,
        "neighborhood": 0.625,
        "accuracy": 0.5,
        "efficacy_first_token": 0.5,
    }


def test_the_score_is_0_if_one_part_is() -> None:
    assert fact.combine({"efficacy": 1.0, "paraphrase": 0.0, "neighborhood": 1.0}) == 0.0
    assert fact.combine({"efficacy": 1.0, "paraphrase": 1.0, "neighborhood": 1.0}) == 1.0


def test_real_rows() -> None:
    frame = fact.normalise(real("fact/counterfact.jsonl.gz"), OPTIONS)
    assert rejected(fact.raw_schema(OPTIONS), frame) == set()
    examples = with_ids(fact.to_examples(frame.head(500), OPTIONS))
    fact.prepared_schema().validate(examples, lazy=True)
    # A model that says what is asked of it: the new object everywhere but on the neighbours.
    wanted = dict(zip(examples["prompt"], examples["completion"], strict=True))
    neighbours = {prompt for prompts in examples["neighborhood_prompts"] for prompt in prompts}
    news = set(examples["completion"])
    examples = examples[
        [
            prompt not in neighbours and f" {true}" not in news and wanted[prompt] == completion
            for prompt, completion, true in zip(
                examples["prompt"], examples["completion"], examples["target_true"], strict=True
            )
        ]
    ]
    assert len(examples) > 50
    lm = StandIn(
        wanted.__getitem__,
        lambda prompt, completion: [-0.5 if (completion in news) != (prompt in neighbours) else -5.0],
    )
    scores = fact.metrics(fact.predict(lm, examples, EVALUATION))  # type: ignore[arg-type]
    assert scores["primary"] == scores["accuracy"] == scores["efficacy_first_token"] == 1.0
