"""From a score back to its source: every hash checked against the files that are here."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from molf import tuning
from molf.cli import run
from molf.config import fingerprint, load_params
from molf.lineage import Chain, State, find, plain, render, trace
from molf.models import folder_hash
from molf.paths import RATES, file_hash, read_json, write_json, write_parquet
from tests.report.fake import write_trial

CELL = "tiny/fact/molf/seed-0"
TRAIN, EVALUATION = Path("results") / CELL / "train", Path("results") / CELL / "evaluation"


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, without an MLflow store."""
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "project"


def chain(name: str = CELL) -> Chain:
    return trace(find(name), load_params())


def states(found: Chain) -> dict[str, State]:
    return {link.name: link.state for link in found.links}


def differing(found: Chain) -> set[str]:
    return {link.name for link in found.differing()}


def test_training_and_evaluation_note_what_they_know(project: Path) -> None:
    noted = read_json(TRAIN / "summary.json")["lineage"]
    assert noted["weights"] == {
        "path": f"weights/{CELL}",
        "hash": folder_hash(Path("weights") / CELL),
        "kept": True,
    }
    record = read_json(TRAIN / "run.json")
    assert noted["data"]["hash"] == record["data"]["hash"]
    assert noted["data"]["files"] == {"train.parquet": file_hash(Path("data/prepared/fact/train.parquet"))}
    assert noted["source"] == read_json(Path("data/raw/fact/source.json"))
    assert (noted["model"]["name"], noted["model"]["hash"]) == ("tiny", folder_hash(Path("models/tiny")))
    assert set(noted["records"]) == {"history.parquet", "routing.parquet"}
    seen = read_json(EVALUATION / "metrics.json")["lineage"]
    assert seen["predictions"]["sha256"] == file_hash(EVALUATION / "predictions.parquet")
    assert seen["weights"]["hash"] == noted["weights"]["hash"]
    assert seen["training"] == {name: file_hash(TRAIN / name) for name in ("run.json", "summary.json")}
    # What describes the data stands in the run, whole; its licence does not stand in the data.
    summary = read_json(Path("data/prepared/fact/summary.json"))
    assert "license" not in summary
    assert record["data"] == {"hash": summary.pop("data_hash"), "license": "apache-2.0", **summary}


def test_an_untouched_chain_holds(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = chain()
    assert not found.differing()
    here = {name for name, state in states(found).items() if state is State.OK}
    assert here >= {
        *("report", "score", "predictions", "evaluation", "evaluation params", "weights", "training", "history"),
        *("routing", "params", "base model", "data", "train rows", "test rows", "source", "training code"),
        *("evaluation code", "general text", "general losses", "moves of weights"),
    }
    assert states(found)["MLflow run"] is State.AWAY  # and looking for it made no store
    assert not Path("mlflow.db").exists()
    assert run(["lineage", CELL]) == 0
    printed = capsys.readouterr().out
    assert re.match(rf"{CELL}: score 0\.\d{{4}} on 20 examples", printed)
    assert f"sha256 {file_hash(EVALUATION / 'predictions.parquet')[:16]}...  {EVALUATION}" in printed
    assert "file: rows.jsonl" in printed
    assert run(["lineage", f"results/{CELL}/", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == plain(found) and told["ok"]
    assert f"sha256 {file_hash(EVALUATION / 'predictions.parquet')}" in [link["value"] for link in told["links"]]


def test_the_untrained_models_row_has_a_chain(project: Path) -> None:
    found = chain("tiny/fact/base/seed-0")
    assert not found.differing()
    assert {"score", "predictions", "base model", "data", "source"} <= set(states(found))
    assert "training" not in states(found)
    (Path("models/tiny") / "config.json").write_text("{}")
    assert differing(chain("tiny/fact/base/seed-0")) == {"base model"}


def tamper_rows(path: Path, column: str, value: str | float) -> None:
    write_parquet(path, pd.read_parquet(path).assign(**{column: value}))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    write_json(path, change(read_json(path)))


def set_rank(params: Any) -> Any:
    params["methods"]["molf"]["r"] = [4]
    return params


def set_score(metrics: Any) -> Any:
    return {**metrics, "primary": metrics["primary"] + 0.1}


def set_other_score(metrics: Any) -> Any:
    return {**metrics, "metrics": {**metrics["metrics"], "accuracy": 0.99}}


@pytest.mark.parametrize(
    ("change", "links"),
    [
        (lambda: tamper_rows(EVALUATION / "predictions.parquet", "efficacy", 1.0), {"predictions", "score"}),
        (lambda: tamper_rows(EVALUATION / "predictions.parquet", "prediction", "other"), {"predictions"}),
        (lambda: tamper_rows(TRAIN / "history.parquet", "loss", 0.0), {"history"}),
        (lambda: (Path("weights") / CELL / "config.json").write_text("{}"), {"weights"}),
        (lambda: tamper_rows(Path("data/prepared/fact/train.parquet"), "prompt", "w1"), {"data", "train rows"}),
        (lambda: tamper_rows(Path("data/prepared/fact/validation.parquet"), "prompt", "w1"), {"data"}),
        (lambda: edit(Path("data/raw/fact/source.json"), lambda s: {**s, "name": "other"}), {"source"}),
        (lambda: Path("rows.jsonl").write_text("{}"), {"train source"}),
        (lambda: edit(Path("params.yaml"), set_rank), {"params"}),
        (lambda: edit(TRAIN / "run.json", lambda r: {**r, "code": "0" * 16}), {"training", "training code", "run"}),
        (lambda: edit(TRAIN / "summary.json", lambda s: {**s, "train_seconds": 1.0}), {"summary"}),
        (lambda: edit(EVALUATION / "metrics.json", set_score), {"report", "score"}),
        (lambda: edit(EVALUATION / "metrics.json", lambda m: {**m, "n": 2000}), {"score"}),
        (lambda: edit(EVALUATION / "metrics.json", lambda m: {**m, "left_out": {"too long": 3}}), {"score"}),
        (lambda: edit(EVALUATION / "metrics.json", set_other_score), {"score"}),
        (lambda: tamper_rows(Path("data/raw/fact/train.parquet"), "record", "{}"), {"train raw rows"}),
        (lambda: (EVALUATION / "predictions.parquet").write_bytes(b"PAR1"), {"predictions", "score"}),
        (lambda: Path("data/prepared/fact/train.parquet").write_bytes(b"PAR1"), {"data", "train rows"}),
    ],
)
def test_what_changed_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], change: Callable[[], Any], links: set[str]
) -> None:
    change()
    assert differing(chain()) == links
    assert run(["lineage", CELL]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("failed: ")
    assert all(name in captured.err for name in links)
    assert f"{len(links)} differs" in captured.out


@pytest.mark.parametrize("part", ["evaluation", "train"])
def test_a_part_of_another_cell_is_not_taken_for_its_own(project: Path, part: str) -> None:
    own = Path("results") / CELL / part
    shutil.rmtree(own)
    shutil.copytree(Path("results/tiny/fact/fft/seed-0") / part, own)
    assert differing(chain()) >= {"evaluation", "weights", "run", "summary"}


def test_an_evaluation_of_an_earlier_training_is_told_from_this_ones(project: Path) -> None:
    edit(EVALUATION / "metrics.json", lambda m: {key: value for key, value in m.items() if key != "lineage"})
    parts = ("config", "data", "model", "code", "versions")
    run_now = read_json(TRAIN / "run.json") | {"versions": {"torch": "0"}}
    config, data, model, code, versions = (run_now[part] for part in parts)
    again = fingerprint(config, data["hash"], model["hash"], code, versions)
    edit(TRAIN / "run.json", lambda _: {**run_now, "fingerprint": again})
    assert differing(chain()) == {"evaluation"}


def test_nothing_that_a_file_holds_drives_the_terminal(project: Path) -> None:
    edit(EVALUATION / "metrics.json", lambda m: {**m, "left_out": {"\x1b[2J\x9b\u202e": 3}})
    assert "3 left out: \\x1b[2J\\x9b\\u202e" in render(chain())


def test_a_damaged_file_is_a_sentence(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (EVALUATION / "metrics.json").write_text("{")
    assert run(["lineage", CELL]) == 1
    assert f"`dvc checkout {EVALUATION / 'metrics.json'}` brings it back" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("evaluation/metrics.json", "primary"),
        ("evaluation/metrics.json", "train_fingerprint"),
        ("train/run.json", "git_commit"),
        ("train/run.json", "data"),
    ],
)
def test_a_record_that_lacks_a_key_is_a_sentence(
    project: Path, capsys: pytest.CaptureFixture[str], file: str, key: str
) -> None:
    path = Path("results") / CELL / file
    write_json(path, {name: value for name, value in read_json(path).items() if name != key})
    assert run(["lineage", CELL]) == 1
    said = capsys.readouterr().err
    assert f"{path} has no {key}" in said and "`dvc repro` makes it anew" in said
    path.write_text("[]")
    assert run(["lineage", CELL]) == 1
    assert f"{path} is no record" in capsys.readouterr().err


def test_a_report_that_is_none_is_a_broken_link(project: Path) -> None:
    write_json(Path("reports/comparison.json"), {"groups": [{"model": "tiny"}]})
    link = next(link for link in trace(find(CELL), load_params()).links if link.name == "report")
    assert link.state is State.DIFFERS and "`dvc repro compare` makes it" in link.note


def test_what_is_not_here_is_said_with_the_command_that_brings_it(project: Path) -> None:
    for folder in ("weights", "data", "models", "reports"):
        shutil.rmtree(folder)
    Path("rows.jsonl").unlink()
    found = chain()
    away = {link.name: link.note for link in found.links if link.state is State.AWAY}
    assert not found.differing()
    assert away["weights"] == f"dvc pull weights/{CELL}"
    assert away["data"] == "dvc pull data/prepared/fact"
    assert away["base model"] == "dvc pull models/tiny"
    assert away["report"] == "dvc pull reports/comparison.json"
    assert away["train source"] == "1 of 1 files are not here"
    assert "(dvc pull models/tiny)" in render(found)
    (EVALUATION / "predictions.parquet").unlink()
    assert states(chain())["score"] is State.AWAY


def test_weights_that_were_not_kept(project: Path) -> None:
    weights, elsewhere = Path("weights") / CELL, Path(".molf/weights") / CELL
    shutil.copytree(weights, elsewhere)
    shutil.rmtree(weights)
    write_json(weights / "not_kept.json", {"path": str(elsewhere), "hash": folder_hash(elsewhere)})
    assert states(chain())["weights"] is State.OK
    shutil.rmtree(elsewhere)
    (link,) = (link for link in chain().links if link.name == "weights")
    assert (link.state, link.note) == (State.AWAY, "not kept (training.keep); only a training makes them")


def test_results_without_notes_are_followed_as_far_as_they_go(project: Path) -> None:
    def drop(value: Any) -> Any:
        return {key: item for key, item in value.items() if key != "lineage"}

    edit(TRAIN / "summary.json", drop)
    edit(EVALUATION / "metrics.json", drop)
    edit(TRAIN / "run.json", lambda r: {**r, "data": {key: r["data"][key] for key in ("hash", "generated", "source")}})
    found = chain()
    assert not found.differing()
    assert states(found)["weights"] is State.UNCHECKED
    assert states(found)["predictions"] is State.UNCHECKED
    assert states(found)["score"] is State.OK
    assert "not noted: an earlier molf made it" in render(found)


@pytest.mark.parametrize("name", ["tiny/fact/mold/seed-0", "nonsense", "tiny/fact/molf/seed-1", "../../etc", ""])
def test_a_wrong_name_says_which_cells_there_are(project: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run(["lineage", name]) == 2
    said = capsys.readouterr().err
    assert f"there is no cell {name!r}" in said
    assert all(f"tiny/fact/{method}/seed-0" in said for method in ("base", "fft", "lora", "molf", "molf-e"))


def test_no_results_at_all_is_a_sentence(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("results")
    assert run(["lineage", CELL]) == 2
    assert "there are no results here yet" in capsys.readouterr().err


def test_the_commit_is_looked_up(project: Path) -> None:
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "start"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    edit(TRAIN / "run.json", lambda r: {**r, "git_commit": f"{head}+"})
    (link,) = (link for link in chain().links if link.name == "git commit")
    assert (link.state, link.note) == (State.OK, "tracked files differed from it")
    edit(TRAIN / "run.json", lambda r: {**r, "git_commit": "1" * 40})
    assert states(chain())["git commit"] is State.AWAY


def test_the_choice_of_learning_rates_is_checked_against_its_trials(project: Path) -> None:
    data = read_json(Path("params.yaml"))
    data["grid"]["tune"] = [0.5, 1.0]
    Path("params.yaml").write_text(json.dumps(data))
    params = load_params()
    assert "grid.tune asks for a sweep" in {link.name: link.note for link in chain().links}["params"]
    for trial in params.trials():
        write_trial(Path(), params, trial, score=trial.factor / 2)
    write_json(RATES, tuning.choose(params))
    link = next(link for link in chain().links if link.name == "learning rates")
    assert link.state is State.OK and link.value == "factor 1 of 2, by execution_accuracy on validation rows"
    trial = next(trial for trial in params.trials() if trial.method == "molf")
    write_trial(Path(), params, trial, score=0.49)
    assert differing(chain()) == {"learning rates"}  # the choice stands, on other numbers
    shutil.rmtree("sweeps")
    link = next(link for link in chain().links if link.name == "learning rates")
    assert link.state is State.AWAY and link.note == "dvc pull sweeps/tiny/fact/molf"
