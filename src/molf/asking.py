"""What is asked of a cell's model by rows that may have no answer yet, and its answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from molf import cells, data, lineage, memory
from molf.config import Params
from molf.encoding import Chat, encode_prompt
from molf.errors import UserError
from molf.paths import BASE_METHOD, Cell
from molf.readers import Row
from molf.tasks import TASKS, Task, letters
from molf.tasks.columns import NotUnicode

if TYPE_CHECKING:
    from molf.evaluation import LanguageModel

PROMPT = "prompt"  # the column of a prompt that is asked as it is
TEMPLATE_BYTES = 256  # more than a chat template writes around a short conversation


@dataclass
class Question:
    """A row and what is asked by it.

    Attributes:
        place: Its line, or its number, in the file.
        record: Its own columns.
        prompt: What is asked; of a conversation as text to be read.
        messages: The conversation, where it is one.
        choices: The options, where letters are asked for.
        gold: The right answer, where the row has a valid one.
        error: Why it cannot be asked.
    """

    place: int
    record: dict[str, Any]
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    choices: list[str] | None = None
    gold: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a model says: text; or the likeliest letter, its option and its probability among the options."""

    text: str
    option: str | None = None
    probability: float | None = None


class Asked:
    """One or two cells of one kind of task, and what they are asked.

    Args:
        names: Of the cells.
        params: With blocks for their tasks and methods.
        most: Tokens of an answer; None takes `evaluation.max_new_tokens`.
        progress: Whether each chunk of rows shows a bar.

    Raises:
        UserError: There is no such cell here, or their tasks are of two kinds.
    """

    def __init__(self, names: Sequence[str], params: Params, most: int | None, progress: bool = False) -> None:
        self.params, self.progress = params, progress
        self.cells = [lineage.find(name) for name in names]
        for cell in self.cells:
            _require_blocks(cell, params)
        kinds = [params.tasks[cell.task].kind for cell in self.cells]
        if len(set(kinds)) > 1:
            listed = ", ".join(f"{cell.name} ({kind})" for cell, kind in zip(self.cells, kinds, strict=True))
            raise UserError(f"{listed}: two cells are asked the same prompts, so their tasks must be of one kind")
        # The second cell is asked what the first is.
        self.options: Any = params.tasks[self.cells[0].task].options
        self.task: Task = TASKS[kinds[0]]
        self.by_letter = kinds[0] in ("med", "choice")
        self.most: int = getattr(params.evaluation.max_new_tokens, kinds[0]) if most is None else most
        self._weights = [cells.weights(cell) for cell in self.cells]
        self._models: list[LanguageModel] = []

    def questions(self, rows: Sequence[Row]) -> list[Question]:
        """What is asked by each row; where nothing can be, with an `error`."""
        found: list[Question] = []
        by_way: dict[tuple[str, ...], list[Question]] = {}
        ways = self.task.asked(self.options)
        for row in rows:
            question = Question(row.number, {}, error=row.problem)
            found.append(question)
            if row.problem is not None:
                question.record = {"row": json.loads(row.record)}
                continue
            question.record = data.read_record(row.record)
            way = max(ways, key=lambda names: len(set(names) & set(row.columns)))
            if set(way) <= set(row.columns) or PROMPT not in row.columns and set(way) & set(row.columns):
                by_way.setdefault(tuple(way), []).append(question)
            elif PROMPT in row.columns:
                self._as_given(question)
            else:
                question.error = f"has no column {PROMPT}, and none of {', '.join(way)}"
        for names, own in by_way.items():
            self._of_task(list(names), own)
        return found

    def _as_given(self, question: Question) -> None:
        """A prompt of its own is taken to the letter."""
        prompt = question.record[PROMPT]
        if not isinstance(prompt, str) or not prompt.strip():
            question.error = f"{PROMPT}: is {'not UTF-8' if isinstance(prompt, NotUnicode) else 'no text, or empty'}"
            return
        if self.by_letter:
            question.choices = letters.listed(prompt)
            if len(question.choices) < 2:
                question.error = f'{PROMPT}: lists no options, in lines that begin with "A. ", "B. " and so on'
        elif getattr(self.options, "messages", None) is not None:
            question.messages = [{"role": "user", "content": prompt}]
        question.prompt = prompt

    def _of_task(self, way: list[str], questions: list[Question]) -> None:
        """Rows with the task's own columns, as `prepare` reads them.

        Args:
            way: The columns that they must have.
            questions: Get prompt and gold, or an error.
        """
        task, options = self.task, self.options
        whole, asked = task.raw_schema(options), task.question_schema(options)
        wanted = {*way, *chain(*task.columns(options)), *whole.columns, *(name.split(".")[0] for name in whole.columns)}
        there = dict.fromkeys([*way, *(name for question in questions for name in question.record if name in wanted)])
        frame = pd.DataFrame(
            {name: pd.Series([question.record.get(name) for question in questions], dtype=object) for name in there}
        )
        flat = task.normalise(frame, options)
        failed = data.failed_checks(asked, flat)
        for reason in failed.to_dict("records"):
            question, value = questions[reason["index"]], reason["value"]
            shown = f" ({value!r})" if value not in ("None", "nan") and reason["column"] != data.WHOLE_ROW else ""
            question.error = question.error or f"{reason['column']}: {reason['check']}{shown}"
        good = flat.drop(index=failed["index"].tolist())
        if good.empty:
            return
        for at, row in zip(good.index.tolist(), task.questions(good, options).to_dict("records"), strict=True):
            questions[at].prompt = row["prompt"]
            questions[at].messages, questions[at].choices = row.get("messages"), row.get("choices")
        if any(set(names) <= set(there) for names in task.columns(options)):
            wrong = data.failed_checks(whole, good)
            good = good.drop(index=wrong.loc[~wrong["check"].isin(task.tolerated(options)), "index"].tolist())
            if not good.empty:
                completions = task.to_examples(good, options)["completion"]
                for at, completion in zip(good.index.tolist(), completions, strict=True):
                    questions[at].gold = completion.strip()

    def answers(self, questions: Sequence[Question]) -> list[list[Answer]]:
        """Each cell's answers to the questions that have no error; what a model cannot be asked gets one."""
        if not self._models:
            with self._explained():
                self._models = [
                    cells.load(cell, folder, self.params, self.progress)
                    for cell, folder in zip(self.cells, self._weights, strict=True)
                ]
        for lm in self._models:
            mark_long(lm, questions, self.most)
        with self._explained():
            try:
                return [self._ask(lm, questions) for lm in self._models]
            except UserError:  # a chat template refuses a conversation
                for lm in self._models:
                    _refuse(lm, questions)
                return [self._ask(lm, questions) for lm in self._models]

    def _ask(self, lm: "LanguageModel", questions: Sequence[Question]) -> list[Answer]:
        asked = [question for question in questions if question.error is None]
        prompts = [question.prompt or "" for question in asked]
        if not asked:
            return []
        if self.by_letter:
            return by_letter(lm, prompts, [question.choices or [] for question in asked])
        # Conversations and prompts of their own do not mix: a task has the one or the other.
        if asked[0].messages is not None:
            texts = lm.chat([question.messages or [] for question in asked], self.most)
        else:
            texts = lm.generate(prompts, self.most)
        return [Answer(text.strip()) for text in texts]

    def _explained(self) -> Any:
        return memory.explained_by(lambda: f"lower evaluation.batch_size (now {self.params.evaluation.batch_size})")


def _require_blocks(cell: Cell, params: Params) -> None:
    """Raises `UserError` where params.yaml no longer has what tells how the cell is asked."""
    lacking = [f"tasks.{cell.task}"] if cell.task not in params.tasks else []
    if cell.method not in (*params.methods, BASE_METHOD):
        lacking.append(f"methods.{cell.method}")
    if lacking:
        raise UserError(f"{cell.name}: params.yaml has no block {' and '.join(lacking)}; put it back as it was")


def by_letter(lm: "LanguageModel", prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[Answer]:
    """The likeliest of each prompt's own letters, with its probability among them."""
    counts = np.array([len(own) for own in choices])
    names = letters.LETTERS[: counts.max()]
    logprobs, _ = lm.choose(prompts, [letters.completion(letter) for letter in names], max_new_tokens=0)
    logprobs[np.arange(len(names)) >= counts[:, None]] = -np.inf
    shares = np.exp(logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True))
    return [
        Answer(names[best], own[best], float(share[best]))
        for best, own, share in zip(logprobs.argmax(axis=1), choices, shares, strict=True)
    ]


def mark_long(lm: "LanguageModel", questions: Sequence[Question], most: int) -> None:
    """Gives an error to each question that, with its answer, has more tokens than the model has places for."""
    places = lm.places
    chat = None
    for question in questions:
        if places is None or question.error is not None or question.prompt is None:
            continue
        # No tokenizer makes more tokens of a text than it has bytes, so that short ones need not be counted.
        if len(question.prompt.encode()) + TEMPLATE_BYTES + most <= places:
            continue
        if question.messages is None:
            count = len(encode_prompt(lm.tokenizer, question.prompt))
        else:
            chat = chat or Chat(lm.tokenizer)
            try:
                count = len(chat.encode_prompt(question.messages))
            except UserError as error:
                question.error = str(error)
                continue
        if count + most > places:
            question.error = f"is {count:,} tokens long; with {most} of an answer the model has places for {places:,}"


def _refuse(lm: "LanguageModel", questions: Sequence[Question]) -> None:
    """Marks the conversations that the model's chat template refuses."""
    chat = Chat(lm.tokenizer)
    for question in questions:
        if question.error is None and question.messages is not None:
            try:
                chat.encode_prompt(question.messages)
            except UserError as error:
                question.error = str(error)
