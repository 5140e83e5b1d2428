"""What each command of `molf` does."""

import argparse
import configparser
import contextlib
import importlib.util
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from molf import records, secrets
from molf.config import PARAMS, SOURCES_LOCK, Params, load_params
from molf.errors import RunError, UserError
from molf.paths import REPORTS, own_tools
from molf.problems import CREDENTIAL


def repro() -> None:
    """Checks params.yaml and that its files are there, runs `dvc repro`, prints the comparison."""
    params = load_params()
    lacking(params)
    # Only what the comparison needs: blocks that the grid does not name are not fetched or built.
    if _call(["dvc", "repro", "compare"]):
        raise RunError("`dvc repro` did not finish; the message above says why. Fix it and run the same command again")
    show()


def _call(command: list[str]) -> int:
    """Runs a command and waits for it, after Ctrl-C too, which reaches it as well: a training then ends its step."""
    process = subprocess.Popen(command, env=own_tools())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Checks params.yaml and says what it asks for."""
    params = load_params()
    lacking(params)
    grid = params.grid
    print(f"params.yaml is fine: {len(params.cells())} cells")
    for axis in ("models", "tasks", "methods", "seeds"):
        print(f"  {axis}: {', '.join(map(str, getattr(grid, axis)))}")
    if grid.tune:
        factors = ", ".join(map(str, grid.tune))
        print(f"  tune: {factors} times each rate, {len(params.trials())} trainings judged on validation rows")
    print("next: make run")


def lacking(params: Params) -> None:
    """Raises `UserError` with every file, folder and library that the grid needs and that is not there."""
    blocks = {f"models.{name}": params.models[name] for name in params.grid.models}
    sources = {f"tasks.{name}.source": params.tasks[name].source for name in params.grid.tasks}
    problems = [
        f"{key}.path: there is no {block.path}"
        for key, block in {**blocks, **sources, "general": params.general}.items()
        if block.kind in ("path", "file") and not Path(block.path).exists()
    ]
    coded = {
        f"tasks.{name}.training.moments" if "moments" in params.tasks[name].training else "training.moments"
        for name in params.grid.tasks
        if params.training_for(name).moments == "8bit"
    }
    if importlib.util.find_spec("torchao") is None:
        problems += [
            f"{key}: 8bit needs torchao, which is not installed: .venv/bin/pip install '.[eightbit]'; or use float32"
            for key in sorted(coded)
        ]
    if importlib.util.find_spec("bitsandbytes") is None:
        problems += [
            f"methods.{name}.base_bits: 4 needs bitsandbytes, which is not installed: .venv/bin/pip install '.[qlora]'"
            for name in params.grid.methods
            if getattr(params.methods[name], "base_bits", None) is not None
        ]
    problems += remote_credentials(Path(".dvc/config"))
    if problems:
        raise UserError(problems)


def remote_credentials(path: Path) -> list[str]:
    """Problems with credentials of DVC's remotes in the file that git keeps."""
    config = configparser.ConfigParser(interpolation=None, strict=False)
    with contextlib.suppress(configparser.Error):  # which DVC itself explains
        config.read(path, encoding="utf-8")
    return [
        f"{path}: {section} {option}: it holds a credential, and this file is committed; take it out, then "
        f"`dvc remote modify --local NAME {option} VALUE`, or set an environment variable"
        for section in config.sections()
        for option, value in config.items(section)
        if secrets.holds_credential(value) or (secrets.is_secret(option) and value not in ("true", "false"))
    ]


def inspect_file(options: argparse.Namespace) -> None:
    """Prints what a data file holds and the block that it may have in params.yaml."""
    from molf import inspection

    others = dict(pair.partition("=")[::2] for pair in options.split_of)
    wrong = [split for split, file in others.items() if split not in ("validation", "test") or not file]
    if wrong:
        raise UserError(f"--split-of {wrong[0]}: write validation=FILE or test=FILE")
    for file in (options.file, *others.values()):
        if secrets.holds_credential(file):
            raise UserError(f"{file}: {CREDENTIAL}")
    for name in ("rows", "first"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise UserError(f"--{name} {given}: at least 1")
    found = inspection.inspect(options.file, others, options.model, options.kind, options.rows, options.first)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know the file's letters
    if not options.yaml:
        print("\n".join(found.lines))
    elif found.block is not None:
        print(found.yaml)
    else:
        raise UserError(f"{options.file}: no task is guessed; without --yaml the reasons are printed")


def estimate_grid(steps: int | None, as_json: bool) -> None:
    """Prints what the grid needs.

    Args:
        steps: Optimizer steps to time in each model, task and method; None times nothing.
        as_json: Whether to print all numbers as JSON instead of a table.
    """
    if steps is not None and steps < 1:
        raise UserError(f"--probe {steps}: at least 1 step is timed; --no-probe times none")
    params = load_params()
    lacking(params)

    from molf import models

    models.quiet()  # before the libraries that it quiets are imported
    from tqdm import tqdm

    from molf import forecast

    def watch(trainings: list[Any]) -> Iterable[Any]:
        return tqdm(trainings, desc="timing a few steps", unit="training", disable=None, leave=False)

    result = forecast.forecast(params, steps, watch)
    if as_json:
        print(json.dumps(forecast.plain(result), indent=2))
        return
    print(forecast.table(result))
    first = f"dvc repro {' '.join(result.run_first)} && molf estimate" if result.run_first else "make run"
    print(f"next: {first}")


def probe_grid(options: argparse.Namespace) -> None:
    """Prints a forecast from the gradients, or how often forecasts hit."""
    from molf.probe import command

    print(command.check(options.check, options.json) if options.check is not None else command.forecasts(options))


def show() -> None:
    """Prints the last comparison."""
    from molf.report.page import terminal_table

    print(terminal_table(last_comparison()))


def last_comparison() -> dict[str, Any]:
    """reports/comparison.json.

    Raises:
        UserError: There is none, or an earlier molf made it.
    """
    path = REPORTS / "comparison.json"
    found = records.read_any(path)
    if found is None:
        raise UserError(f"there is no {path} yet; `make run` makes it")
    wrong = records.flaw(path.name, found)
    if not wrong and not all("recommendation" in group for group in found["groups"]):
        wrong = "recommends no method"
    if wrong:
        raise UserError(f"{path} {wrong}: an earlier molf made it; `make run` makes it anew")
    return found


def compare_with(revision: str | None, as_json: bool) -> None:
    """Compares the results here with those of a git revision.

    Raises:
        RunError: A score fell, or a cell that had one lacks.
    """
    if revision is None:
        raise UserError(
            "compare needs --against REVISION, whose results those here are held against; `molf run` compares the "
            "grid's methods with one another, `molf show` prints that"
        )
    params = load_params()

    from molf import gate

    result = gate.against(Path.cwd(), revision, params)
    print(json.dumps(result, indent=2) if as_json else gate.table(result))
    said = gate.verdict(result)
    if result["fell"]:
        raise RunError(
            f"{', '.join(result['fell'])} fell beyond the interval, which is exit code 1; {said}\n"
            f"next: git diff {revision} -- params.yaml src; molf predict CELL FILE shows answers"
        )
    if result["lacking"]:
        raise RunError(
            f"{', '.join(result['lacking'])}: scored at {revision} and lacking here, so that nobody can say that no "
            f"score fell, which is exit code 1; {said}\nnext: dvc repro compare, which tries them again"
        )
    if not as_json:
        print(f"no score fell beyond its interval, which is exit code 0; {said}")
        print("next: molf show")


def apply_preset(name: str | None, dry_run: bool) -> None:
    """Writes a preset into params.yaml and prints the changed lines; without a name, lists the presets."""
    from molf import presets

    if name is None:
        for preset, description in presets.descriptions().items():
            print(f"  {preset:8} {description}")
        print("next: molf preset NAME")
        return
    changes = presets.apply(name, PARAMS, dry_run)
    print("\n".join(changes) if changes else f"params.yaml holds preset {name} already")
    print(f"next: molf preset {name}" if dry_run else "next: molf check")


def pin() -> None:
    """Refreshes sources.lock."""
    from molf import sources

    changes = sources.pin(load_params(), sources.hub_commit, sources.url_sha256)
    for key, (before, now) in changes.items():
        print(f"  {key}: {now} ({'unchanged' if before == now else 'new' if before is None else f'was {before}'})")
    print(f"{len(changes)} entries in {SOURCES_LOCK}; commit it, then make run")


def show_lineage(name: str, as_json: bool) -> None:
    """Prints the chain from a cell's score to its source.

    Args:
        name: The cell.
        as_json: Whether to print it as JSON.

    Raises:
        RunError: A link is not what it was when the score was made.
    """
    from molf import lineage

    chain = lineage.trace(lineage.find(name), load_params())
    print(json.dumps(lineage.plain(chain), indent=2) if as_json else lineage.render(chain))
    if chain.differing():
        names = ", ".join(link.name for link in chain.differing())
        raise RunError(f"{names}: not as it was when {chain.cell.name} was made")


def export_cell(name: str, directory: Path, merge: bool, force: bool) -> None:
    """Writes a cell's model into a folder."""
    from molf import models

    models.quiet()  # before the libraries that it quiets are imported
    from molf import lineage
    from molf.export import export

    print("\n".join(export(lineage.find(name), directory, load_params(), merge, force)))


def predict_file(options: argparse.Namespace) -> None:
    """Answers a file of prompts with one cell's model, or with two."""
    for name in ("rows", "max_new_tokens"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} {given}: at least 1")
    params = load_params()

    from molf import models

    models.quiet()  # before the libraries that it quiets are imported
    from molf import predict
    from molf.asking import Asked

    readable = options.out is None and sys.stdout.isatty()
    names = [options.cell, *([options.other] if options.other else [])]
    asked = Asked(names, params, options.max_new_tokens, sys.stderr.isatty() and not readable)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # JSON lines are UTF-8 wherever they go; a terminal may not know the rows' letters.
        sys.stdout.reconfigure(encoding=None if readable else "utf-8", errors="backslashreplace")
    counts = predict.predict(asked, options.file, options.out, options.rows, readable)
    if counts is not None:
        print("\n".join(predict.summary(asked, counts, options.out)), file=sys.stderr)


def promote_models(task: str | None, dry_run: bool) -> None:
    """Promotes the best model of each task, or of one, and prints what was looked at.

    Raises:
        RunError: Of no task anything passed the gate, or a task failed.
    """
    params = load_params()

    from molf import models

    models.quiet()  # before the libraries that it quiets are imported
    from molf import champions
    from molf.promotion import Action

    actions, failed = [], []
    for result in champions.promote(params, [task] if task else params.grid.tasks, dry_run):
        print("\n".join([*result.lines, ""]), flush=True)
        actions.append(result.decision.action)
        if result.decision.action is Action.FAILED:
            failed.append(f"{result.task}: {result.decision.sentence}")
    if failed:
        raise RunError("\n".join(failed))
    if all(action is Action.NONE for action in actions):
        raise RunError("nothing passed the gate (`promotion` in params.yaml), which is exit code 1; the table says why")
    shown = f" --task {task}" if task else ""
    if dry_run:
        print(f"next: molf promote{shown}")
    else:
        print("next: molf champion --task TASK --out FOLDER; `dvc push`, so that others have the weights too")


def show_champion(task: str, previous: bool, out: Path | None, force: bool) -> None:
    """Prints which model is a task's champion, or the one before, and writes it into a folder if one is given."""
    params = load_params()

    from molf import models

    models.quiet()  # before the libraries that it quiets are imported
    from molf import champions

    found = champions.find(params, task, previous)
    print("\n".join(champions.describe(found, champions.PREVIOUS if previous else champions.CHAMPION)))
    if out is None:
        print(f"next: molf champion --task {task}{' --previous' if previous else ''} --out FOLDER")
    else:
        print("\n".join(champions.write(found, out, force)))


def track() -> None:
    """Rebuilds what MLflow lacks."""
    from molf import tracking

    counts = tracking.track(Path.cwd(), load_params())
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    print("next: make ui")


def open_ui(port: int) -> None:
    """Serves MLflow's page until interrupted."""
    from molf import mlflow_server, tracking

    root, experiment = Path.cwd(), load_params().tracking.experiment
    tracking.initialise(root, experiment)
    mlflow_server.serve(root, port, tracking.address(root, experiment))


def join_head(meet: str, minutes: float) -> None:
    """Trains cells together with the host that runs them, until interrupted."""
    from molf import joining

    joining.join(meet, minutes)


def diff_data(revision: str, to: str | None, task: str | None, key: str | None, as_json: bool) -> None:
    """Prints what changed in the data sets since a git revision.

    Raises:
        RunError: The rows of a data set could not be read; the others are printed.
    """
    from molf import changes

    result = changes.changes(Path.cwd(), revision, to, load_params().tasks, task, key)
    print(json.dumps(result, indent=2, default=str) if as_json else changes.table(result))
    unread = [name for name, entry in result["tasks"].items() if "unavailable" in changes.states(entry).values()]
    if unread:
        raise RunError(f"rows of {', '.join(unread)} could not be read; the lines above say what to type")


def publish_results(directory: Path) -> None:
    """Copies the comparison, its figures, the params that made it, and the time of each cell."""
    from molf.report.page import published_readme

    comparison = last_comparison()
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("comparison.json", "comparison.csv"):
        shutil.copyfile(REPORTS / name, directory / name)
    # Not the SVG files: megabytes, which git would keep for ever.
    shutil.copytree(
        REPORTS / "figures", directory / "figures", ignore=shutil.ignore_patterns("*.svg"), dirs_exist_ok=True
    )
    if (REPORTS / "probe").is_dir():
        shutil.copytree(
            REPORTS / "probe", directory / "probe", ignore=shutil.ignore_patterns("*.svg"), dirs_exist_ok=True
        )
    shutil.copyfile(PARAMS, directory / "params.yaml")
    (directory / "tables.md").write_text(published_readme(comparison), encoding="utf-8")
    print(f"{directory} holds the comparison; add a README.md that says what it shows, and commit it")
