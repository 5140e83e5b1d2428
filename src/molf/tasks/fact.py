"""CounterFact (Meng et al. 2022): a prompt about a subject; the model is to learn a new, false object."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from molf.tasks.columns import as_list, differ, joined, of_rows, of_text, prepared, text, texts

if TYPE_CHECKING:
    import pandera.pandas as pa

    from molf.blocks import NoOptions
    from molf.config import Evaluation
    from molf.evaluation import LanguageModel

NAME = "fact"
PRIMARY = "score"
COMPONENTS = ["efficacy", "paraphrase", "neighborhood"]
BINARY = "efficacy"
# The flat columns keep the benchmark's own paths, so that a rejected row names the field that a person can look up.
PROMPT = "requested_rewrite.prompt"
SUBJECT = "requested_rewrite.subject"
NEW = "requested_rewrite.target_new.str"
TRUE = "requested_rewrite.target_true.str"
LISTS = ["paraphrase_prompts", "neighborhood_prompts"]


def prompt(template: str, subject: str) -> str:
    """The rewrite prompt with its subject, without a space at the end: the completion brings its own."""
    return template.replace("{}", subject).rstrip()


def completion(target: str) -> str:
    return f" {target}"


def columns(options: "NoOptions") -> list[list[str]]:
    """The raw columns that must be there: one of these lists."""
    return [["requested_rewrite", *LISTS]]


def asked(options: "NoOptions") -> list[list[str]]:
    return [["requested_rewrite"]]


def raw_schema(options: "NoOptions") -> "pa.DataFrameSchema":
    """Checks normalised rows."""
    import pandera.pandas as pa

    return pa.DataFrameSchema(
        {
            **question_schema(options).columns,
            NEW: text(),
            TRUE: text(),
            **{name: texts() for name in LISTS},
        },
        checks=of_rows(lambda frame: differ(frame, [NEW, TRUE]), "new and true object differ"),
    )


def question_schema(options: "NoOptions") -> "pa.DataFrameSchema":
    import pandera.pandas as pa
    import pyarrow.compute as pc

    has_slot = of_text(lambda prompts: pc.equal(pc.count_substring(prompts, "{}"), 1), "has {} once")
    return pa.DataFrameSchema({PROMPT: text(checks=[has_slot]), SUBJECT: text()})


def tolerated(options: "NoOptions") -> frozenset[str]:
    return frozenset()


def normalise(frame: pd.DataFrame, options: "NoOptions") -> pd.DataFrame:
    """CounterFact's nested records as flat columns named by their paths; what a record lacks is None."""

    def at(record: object, path: str) -> Any:
        for key in path.split(".")[1:]:
            record = record.get(key) if isinstance(record, Mapping) else None
        return record

    flat = {path: [at(record, path) for record in frame["requested_rewrite"]] for path in (PROMPT, SUBJECT, NEW, TRUE)}
    rest = frame.drop(columns="requested_rewrite")
    return rest.assign(**{path: pd.Series(values, index=frame.index, dtype=object) for path, values in flat.items()})


def prepared_schema() -> "pa.DataFrameSchema":
    return prepared(target_new=text(), target_true=text(), **{name: texts() for name in LISTS})


def hint(failures: pd.DataFrame, options: "NoOptions") -> str | None:
    return None


def questions(frame: pd.DataFrame, options: "NoOptions") -> pd.DataFrame:
    pairs = zip(frame[PROMPT], frame[SUBJECT], strict=True)
    prompts = [prompt(template.strip(), subject.strip()) for template, subject in pairs]
    return pd.DataFrame({"prompt": prompts}, index=frame.index)


def to_examples(frame: pd.DataFrame, options: "NoOptions") -> pd.DataFrame:
    """Valid normalised rows as prompt, completion, target_new, target_true and the two lists; the index stays."""
    return pd.DataFrame(
        {
            "prompt": questions(frame, options)["prompt"],
            "completion": [completion(target.strip()) for target in frame[NEW]],
            "target_new": [target.strip() for target in frame[NEW]],
            "target_true": [target.strip() for target in frame[TRUE]],
            **{name: [[item.strip() for item in as_list(items)] for items in frame[name]] for name in LISTS},
        },
        index=frame.index,
    )


def identity(frame: pd.DataFrame, options: "NoOptions") -> pd.Series:
    """The rewrite prompt, its subject and both objects."""
    return joined(frame, [PROMPT, SUBJECT, NEW, TRUE])


def combine(means: dict[str, float]) -> float:
    """The score of Meng et al. 2022: the harmonic mean of the three; 0 if one is 0."""
    values = [means[name] for name in COMPONENTS]
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def predict(lm: "LanguageModel", examples: pd.DataFrame, evaluation: "Evaluation") -> pd.DataFrame:
    """Compares " new" and " true" on the rewrite prompt, its paraphrases and its neighbours.

    An object's log-probability is the mean over its tokens (natural logarithm), as in Meng et al. 2022. A tie prefers
    neither object.

    Returns:
        example_id, prediction (greedy text), target_new, target_true; per prompt group g of rewrite, paraphrase,
        neighborhood the lists g_logprob_new and g_logprob_true, one value a prompt; and the scores: efficacy,
        efficacy_first_token, accuracy (0 or 1), paraphrase, neighborhood (shares of the example's prompts).
    """
    groups = {
        "rewrite": [[prompt] for prompt in examples["prompt"]],
        "paraphrase": [as_list(prompts) for prompts in examples["paraphrase_prompts"]],
        "neighborhood": [as_list(prompts) for prompts in examples["neighborhood_prompts"]],
    }
    targets = list(zip(examples["target_new"], examples["target_true"], strict=True))
    longest = {"rewrite": evaluation.max_new_tokens.fact}
    # One call for everything, so that batches fill and equal prompts are run once.
    answers = iter(
        lm.answer(
            (question, [completion(target) for target in pair], longest.get(group, 0))
            for group, lists in groups.items()
            for questions, pair in zip(lists, targets, strict=True)
            for question in questions
        )
    )
    result: dict[str, list[Any]] = {"first_new": [], "first_true": []}
    generated = []
    for group, lists in groups.items():
        new_means, true_means = [], []
        for questions in lists:
            answered = [next(answers) for _ in questions]
            new_means.append([float(answer.logprobs[0].mean()) for answer in answered])
            true_means.append([float(answer.logprobs[1].mean()) for answer in answered])
            if group == "rewrite":
                generated.append(answered[0].text)
                result["first_new"].append(float(answered[0].logprobs[0][0]))
                result["first_true"].append(float(answered[0].logprobs[1][0]))
        result[f"{group}_logprob_new"], result[f"{group}_logprob_true"] = new_means, true_means
    return pd.DataFrame(
        {
            "example_id": examples["example_id"].to_numpy(),
            "prediction": generated,
            "target_new": [new for new, _ in targets],
            "target_true": [true for _, true in targets],
            **{name: values for name, values in result.items() if not name.startswith("first")},
            "efficacy": _share(result["rewrite_logprob_new"], result["rewrite_logprob_true"]),
            "paraphrase": _share(result["paraphrase_logprob_new"], result["paraphrase_logprob_true"]),
            "neighborhood": _share(result["neighborhood_logprob_true"], result["neighborhood_logprob_new"]),
            "efficacy_first_token": np.greater(result["first_new"], result["first_true"]).astype(float),
            "accuracy": [float(right(text, new)) for text, (new, _) in zip(generated, targets, strict=True)],
        }
    )


def _share(preferred: list[list[float]], other: list[list[float]]) -> list[float]:
    """Per example, the share of its prompts on which the first object is strictly likelier than the second."""
    return [float(np.greater(a, b).mean()) for a, b in zip(preferred, other, strict=True)]


def right(answer: str, gold: str) -> bool:
    """Whether the text begins with the object."""
    return answer.lstrip().startswith(gold)


def metrics(predictions: pd.DataFrame) -> dict[str, Any]:
    """Means over all examples, and their harmonic mean."""
    names = [*COMPONENTS, "accuracy", "efficacy_first_token"]
    means = {name: float(predictions[name].mean()) for name in names}
    score = combine(means)
    return {
        "primary": score,
        "primary_name": PRIMARY,
        "n": len(predictions),
        "left_out": {},
        "score": score,
        **means,
    }
