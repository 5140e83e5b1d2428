"""`molf inspect`: looks at a file of rows, guesses its task, and writes the block to paste."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molf.blocks import TaskBlock
from molf.config import PARAMS, Params, check_params, load_params
from molf.errors import UserError, plain
from molf.inspection import files, findings, page, trial
from molf.inspection.forms import Guess
from molf.inspection.guess import group, guesses, refusal
from molf.inspection.profile import Profile, measured
from molf.paths import BASE_METHOD

VALIDATION, TEST = 500, 1000  # rows that a split is given where a tenth of all would be more
WIDTH = 120  # of the page where there is no terminal


@dataclass
class Found:
    """All that is known of some files.

    Attributes:
        profiles: By split.
        guess: The task that is taken, or None.
        others: Further ones that may fit.
        name, block: Of the task.
        lines: The page.
    """

    profiles: dict[str, Profile]
    guess: Guess | None
    others: list[Guess]
    name: str
    block: dict[str, Any] | None
    lines: list[str]

    @property
    def yaml(self) -> str:
        return "" if self.block is None else page.yaml(self.name, self.block, "guessed; look at every line")


def inspect(
    location: str,
    split_of: Mapping[str, str],
    model: str | None = None,
    kind: str | None = None,
    shown: int = 3,
    most: int | None = None,
) -> Found:
    """Looks at files, all of their rows, and puts the task that fits best to the test.

    The rows are read once and kept in a temporary folder, as `fetch` keeps them; there `prepare` itself checks them by
    the guessed block.

    Args:
        location: Path or URL of a file, or path of a folder whose files' names tell their splits.
        split_of: Further files: {split: path or URL}.
        model: Whose tokens are counted; None: the first of the grid.
        kind: That the task must be of; None: any.
        shown: First rows to print.
        most: Rows of each file to look at; None: all.

    Raises:
        UserError: A file cannot be read, an argument names nothing.
    """
    params, mistaken = _params()
    own = files.find(location, dict(split_of))
    with tempfile.TemporaryDirectory(prefix="molf-inspect-") as folder:
        return _inspect(location, own, Path(folder), params, mistaken, model, kind, shown, most)


def _params() -> tuple[Params, str]:
    """The project's params, or the default ones with why."""
    from molf.presets import DEFAULT, differences

    try:
        if PARAMS.is_file():
            return load_params(), ""
        said = "there is no params.yaml here: go to the project's root before you paste"
    except UserError as error:
        said = f"params.yaml has mistakes, such as {error.problems[0]}"
    return check_params(differences(DEFAULT), DEFAULT), said


def _inspect(
    location: str,
    own: dict[str, list[str]],
    folder: Path,
    params: Params,
    mistaken: str,
    model: str | None,
    kind: str | None,
    shown: int,
    most: int | None,
) -> Found:
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    raw = folder / "raw"
    raw.mkdir()
    source = files.spool(own, raw, most)
    profiles = {split: measured(raw / f"{split}.parquet", shown) for split in own}
    train = profiles["train"]
    lines: list[str] = []
    for split, found in profiles.items():
        lines += page.header(split, source["files"][split], found, len(profiles) > 1)
    beside = files.beside(location) if len(profiles) == 1 else []
    if beside:
        lines.append(f"  beside it: {', '.join(map(plain, beside))}; inspect the folder to take all")
    if train.columns:
        lines += ["", "columns:", *page.columns(train, width), "", "rows:", *page.rows(train, width)]
    may = [guess for guess in guesses(train) if kind in (None, guess.kind)]
    name = _name(location, params)
    if not may:
        lines += ["", f"no task is guessed{f' of kind {kind}' if kind else ''}:"]
        lines += [f"  - {plain(text)}" for text in refusal(train)]
        wrong = findings.of_columns(train, list(train.top), None) + findings.of_splits(profiles, None)
        lines += _said("what looks wrong:", wrong)
        return Found(profiles, None, [], name, None, lines)
    guess = may[0]
    kept = {split for split, found in profiles.items() if split == "train" or not findings.hidden(found, guess)}
    files.keep_splits(raw, kept)
    for split in profiles.keys() - kept:
        guess.notes.append(f"the {split} file has no answers and is left out; the split is cut off train instead")
    if guess.kind == "sql" and "db_id" in train.top:
        guess.options["databases"] = files.databases(location)
    named, others = group(train, guess) if len(kept) < 3 else (None, [])
    block = page.block(guess, files.source({split: own[split] for split in own if split in kept}), {}, named)
    block["limits"] = _limits(profiles, kept, guess)
    checked, tried = _tried(guess, name, block, params, folder)
    lines += ["", *_because(guess, may[1:], train)]
    wrong = []
    if tried.first is not None:
        lines += ["", "the first row as the model sees it:", *page.example(tried.first, width)]
    if tried.summary is None:
        wrong += ["prepare will stop:", *(f"    {line.strip()}" for line in tried.stopped)]
    else:
        wrong += findings.of_rows(tried.summary, checked.max_rejected)
        more, about = _lengths(tried, params, name, guess.kind, model or params.grid.models[0], width)
        lines += ["", *more]
        wrong += about
    used = [column for column in train.columns if column in guess.columns() or column == guess.answer]
    wrong += findings.of_columns(train, used, guess.answer)
    wrong += findings.of_splits(profiles, guess)
    wrong += findings.of_groups(named, others, train)
    lines += _said("what looks wrong:", wrong) or ["", "nothing looks wrong"]
    result = Found(profiles, guess, may[1:], name, block, lines)
    lines += ["", *_next(result, mistaken, location)]
    return result


def _tried(
    guess: Guess, name: str, block: dict[str, Any], params: Params, folder: Path
) -> tuple[TaskBlock, trial.Trial]:
    """What `prepare` makes of the block, which is mended where it would leave nothing, and the guess told so."""
    checked = trial.checked(params, name, block)
    tried = trial.attempt(name, checked, folder / "raw", folder / "prepared")
    if any("no row is left" in line for line in tried.stopped):
        # Rows of one template are all near copies of each other, so that none may lie beside another's split.
        block["duplicates"]["similarity"] = None
        checked = trial.checked(params, name, block)
        tried = trial.attempt(name, checked, folder / "raw", folder / "prepared")
        if tried.summary is not None:
            guess.notes.append(
                "the rows seem to be of one template: each is a near copy of others, and with similarity: 0.85 no "
                "split would be left; with similarity: null only equal rows are copies"
            )
    if guess.kind == "sql":
        _loosen(guess, block, tried)
    return checked, tried


def _because(guess: Guess, others: list[Guess], train: Profile) -> list[str]:
    """The guess with its reasons, and what else it may be."""
    used = {column.split(".")[0] for column in guess.columns()}
    unused = [column for column in train.top if column not in used]
    return [
        f"guess: {guess.kind}, because",
        *(f"  - {plain(text)}" for text in guess.reasons),
        *(f"  note: {plain(text)}" for text in guess.notes),
        *([f"  not used: {', '.join(map(plain, unused))}"] if unused else []),
        *(f"  also possible: --kind {other.kind}: {plain(other.reasons[0])}" for other in others),
    ]


def _said(title: str, texts: list[str]) -> list[str]:
    """Sentences below a title; one that begins with spaces belongs to the one before it."""
    if not texts:
        return []
    return ["", title, *(plain(f"  {text}" if text.startswith("    ") else f"  - {text}") for text in texts)]


def _name(location: str, params: Params) -> str:
    """A name for the task that no other has, from the file's."""
    path = Path(location.rstrip("/"))
    parent = path.parent if files.is_url(location) else path.resolve().parent
    # `train-00000-of-00001` is no name of a task, nor is `dev`; what stands before is.
    stem = next((name for name in map(files.stem, (path, parent)) if name), "mine")
    taken = {*params.tasks, BASE_METHOD}
    return next(name for name in (stem, *(f"{stem}-{i}" for i in range(2, 1000))) if name not in taken)


def _limits(profiles: dict[str, Profile], kept: set[str], guess: Guess) -> dict[str, int | None]:
    """No limit where there are few rows; of many, a validation and test that do not take hours."""
    found: dict[str, int | None] = {"train": None, "validation": None, "test": None}
    for split, most in (("validation", VALIDATION), ("test", TEST)):
        rows = profiles[split].rows if split in kept else profiles["train"].rows / 10
        if rows > most and not (guess.kind == "fact" and split == "test"):
            found[split] = most
    return found


def _loosen(guess: Guess, block: dict[str, Any], tried: trial.Trial) -> None:
    """Lets queries of another dialect in where they alone are too many."""
    from molf.tasks.sql import FILLS, PARSES, RUNS

    if tried.summary is None:
        return
    dialect = sum(reason["rows"] for reason in tried.summary["reasons"] if reason["check"] in (FILLS, PARSES, RUNS))
    raw = sum(count["raw"] for count in tried.summary["rows"].values())
    if dialect > block["max_rejected"] * raw:
        block["options"]["must_run"] = False
        guess.notes.append(
            f"{dialect / raw:.1%} of the queries do not run in SQLite: must_run: false keeps and counts them, and no "
            "score is of them"
        )


def _lengths(
    tried: trial.Trial, params: Params, name: str, kind: str, model: str, width: int
) -> tuple[list[str], list[str]]:
    """The histogram, and what is too long."""
    max_length = params.training.max_length
    try:
        lengths = trial.lengths(tried.prepared, params, model)
    except UserError as error:
        if model not in params.models:
            raise
        return [], [f"length in tokens: {problem}" for problem in error.problems]
    allowed = getattr(params.evaluation.max_new_tokens, kind)
    shares = {
        "over": float(np.mean(lengths.total > max_length)),
        # The token that ends the answer need not be written.
        "cut": float(np.mean(lengths.completions - 1 > allowed)) if kind in ("completion", "sql") else 0.0,
        "allowed": allowed,
    }
    enough = -(-int(np.percentile(lengths.total, 99, method="higher")) // 64) * 64
    about = findings.of_lengths(shares, name, max_length, max(enough, (max_length // 64 + 1) * 64), lengths.model or "")
    return page.histogram(lengths, max_length, width), about


def _next(found: Found, mistaken: str, location: str) -> list[str]:
    """The block, and what to do with it."""
    assert found.block is not None
    lines = ["paste below `tasks:` in params.yaml:", "", *found.yaml.splitlines()[1:], ""]
    lines.append(f"and name it in `grid:` there: tasks: [{found.name}]")
    source = found.block["source"]
    outside = source["kind"] == "file" and (Path(source["path"]).is_absolute() or source["path"].startswith(".."))
    if outside:
        lines.append(
            "the file lies outside the project, where no teammate has it: copy it to data/ and share it with "
            "`dvc add`, or in git if it is small"
        )
    if source["kind"] == "file" and Path.cwd().is_relative_to(Path(source["path"]).resolve()):
        lines.append(
            "the files lie in the project's own root: move them into a folder, such as data/, and correct the path; "
            "DVC watches all of it"
        )
    if mistaken:
        lines.append(plain(mistaken))
    pin = "molf pin && " if source["kind"] == "url" else ""
    lines.append(f"next: {pin}molf check && dvc repro prepare@{found.name}, then molf estimate")
    return lines
