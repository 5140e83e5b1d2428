"""The tasks by kind: each a module that defines the same things in the same order."""

from typing import TYPE_CHECKING, Any, Protocol

from molf.tasks import choice, completion, fact, med, sql

if TYPE_CHECKING:
    import pandas as pd
    import pandera.pandas as pa

    from molf.config import Evaluation
    from molf.evaluation import LanguageModel


class Task(Protocol):
    """What a task's module holds.

    Attributes:
        NAME: Its kind in params.yaml.
        PRIMARY: Name of the score that methods are compared by.
        COMPONENTS: Per-example columns of the predictions whose means make the primary.
        BINARY: Per-example column of zeros and ones for paired tests, or None.
    """

    NAME: str
    PRIMARY: str
    COMPONENTS: list[str]
    BINARY: Any  # str | None; a module's constant has the narrower type, which a mutable attribute may not

    def columns(self, options: Any) -> list[list[str]]:
        """The raw columns that must be there: one of these lists."""

    def asked(self, options: Any) -> list[list[str]]:
        """Of these, the columns that a question needs whose answer nobody knows yet: one of these lists."""

    def raw_schema(self, options: Any) -> "pa.DataFrameSchema":
        """Checks `normalise`d rows, lazily: every bad value with its row, column and check."""

    def question_schema(self, options: Any) -> "pa.DataFrameSchema":
        """Of these, the checks that a question must pass without its answer."""

    def tolerated(self, options: Any) -> frozenset[str]:
        """Names of checks whose failing rows are kept, and only counted."""

    def normalise(self, frame: "pd.DataFrame", options: Any) -> "pd.DataFrame":
        """The benchmark's own rows as flat columns, with the index kept; answers may be lacking."""

    def prepared_schema(self) -> "pa.DataFrameSchema":
        """Checks prepared rows."""

    def hint(self, failures: "pd.DataFrame", options: Any) -> str | None:
        """What most likely went wrong when too many rows are rejected; None where nothing can be said.

        Args:
            failures: Rejected rows: column, check, value.
            options: The task's.
        """

    def questions(self, frame: "pd.DataFrame", options: Any) -> "pd.DataFrame":
        """Normalised rows that pass `question_schema` as prompt, with the index kept.

        Besides where a model is asked by them: `choices` (texts of the options that go by letters), `messages` (the
        conversation up to the turn of the assistant that is asked for).
        """

    def to_examples(self, frame: "pd.DataFrame", options: Any) -> "pd.DataFrame":
        """Valid normalised rows as prompt, completion and the task's own columns, with the index kept."""

    def identity(self, frame: "pd.DataFrame", options: Any) -> "pd.Series":
        """What tells a valid normalised row from others: its own text, without what all rows of the task share."""

    def combine(self, means: dict[str, float]) -> float:
        """The primary score from the means of COMPONENTS."""

    def predict(self, lm: "LanguageModel", examples: "pd.DataFrame", evaluation: "Evaluation") -> "pd.DataFrame":
        """A row per prepared example, in their order: example_id, prediction, and every per-example score."""

    def right(self, answer: str, gold: str) -> bool:
        """Whether an answer is the right one, as the strictest score says that needs nothing but the two texts.

        Args:
            answer: What the model says; of options the likeliest letter.
            gold: An example's completion, stripped.
        """

    def metrics(self, predictions: "pd.DataFrame") -> dict[str, Any]:
        """The scores: primary, primary_name, n, left_out ({reason: count}), and every metric by name."""


TASKS: dict[str, Task] = {"sql": sql, "med": med, "fact": fact, "completion": completion, "choice": choice}
