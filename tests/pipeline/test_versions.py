"""Data, models, cells and reports that are shared: two clones, over a disk and over S3's protocol."""

import json
import logging
import re
import shlex
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from molf.cli import run
from tests.conftest import QUIET, ROOT, SMALL, Project

pytestmark = pytest.mark.timeout(1800)  # the first clone's run takes minutes on a busy machine
BUCKET = "molf"
REMOTES = ["disk", "cloud"]


class Clone(Project):
    """What a teammate has after `git clone`."""

    def __init__(self, origin: Path, root: Path) -> None:
        self.root = root
        subprocess.run(["git", "clone", "--quiet", origin, root], check=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3's protocol, with an empty bucket; credentials are in the environment."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        address = "http://{}:{}".format(*running.get_host_and_port())
        with pytest.MonkeyPatch.context() as patch:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "testing")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("NO_PROXY", "127.0.0.1")
            for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
                patch.delenv(name, raising=False)
            boto3.client("s3", endpoint_url=address).create_bucket(Bucket=BUCKET)
            yield address
    finally:
        running.stop()


def add_remotes(project: Project, disk: Path, address: str) -> None:
    project.run("dvc", "remote", "add", "--default", "disk", str(disk))
    project.run("dvc", "remote", "add", "cloud", f"s3://{BUCKET}/{disk.name}")
    project.run("dvc", "remote", "modify", "cloud", "endpointurl", address)


def test_prepared_data_over_s3_and_runs_that_are_not_repeated(project: Project, s3: str, tmp_path: Path) -> None:
    add_remotes(project, tmp_path / "quick", s3)
    project.commit("remotes")
    before = Clone(project.root, tmp_path / "before")
    assert project.repro("prepare@fact") == ["fetch@fact", "prepare@fact"]
    project.commit("data")
    assert "pushed" in project.run("dvc", "push", "--remote", "cloud", "--run-cache")

    after = Clone(project.root, tmp_path / "after")
    after.run("dvc", "pull", "--remote", "cloud", "--with-deps", "prepare@fact")
    assert after.repro("prepare@fact") == []

    # A clone that has the same params and not the lock file finds the runs themselves.
    shutil.copyfile(project.root / "params.yaml", before.root / "params.yaml")
    before.run("dvc", "remote", "default", "cloud")
    said = before.run("dvc", "repro", "--pull", "prepare@fact")
    assert said.count("is cached - skipping run, checking out outputs") == 2, said
    files = [(each.root / "data/prepared/fact/train.parquet").read_bytes() for each in (project, after, before)]
    assert files[0] == files[1] == files[2]


def test_the_documented_commands_are_dvcs_and_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dvc.cli import main, parse_args

    text = (ROOT / "docs/data.md").read_text()
    lines = "\n".join(re.findall(r"```sh\n(.+?)```", text, flags=re.DOTALL)).splitlines()
    spans = [*lines, *re.findall(r"`((?:dvc|molf) [^`\n]+)`", text)]
    commands = list(filter(None, (shlex.split(span, comments=True) for span in spans)))
    monkeypatch.chdir(tmp_path)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    assert main(["init", "--no-scm", "--quiet"]) == 0
    kinds = []
    for command in commands:
        if command[:2] == ["dvc", "remote"]:  # of any kind, whether its plugin is here or not
            if command[2] == "add":
                kinds.append(command[-1].split("://")[0])
                for name in ("config", "config.local"):
                    (tmp_path / ".dvc" / name).unlink(missing_ok=True)
                (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
            assert main(command[1:]) == 0, command
        elif command[0] == "dvc":
            parse_args(command[1:])
        elif command[0] == "molf":
            with pytest.raises(SystemExit) as ended:
                run([*(word for word in command[1:] if word.islower()), "--help"])
            assert ended.value.code == 0, command
    assert kinds[:4] == ["s3", "gs", "azure", "ssh"] and len(kinds) == 5


# --- acceptance ----------------------------------------------------------------------------------------------------


@dataclass
class Shared:
    """What a team shares of a first clone that is gone: nothing can depend on where it lay.

    Attributes:
        git: The bare repository.
        root: Where the clone was.
        runs: What its MLflow showed.
    """

    git: Path
    root: Path
    runs: dict[str, Any]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, s3: str) -> Shared:
    folder = tmp_path_factory.mktemp("team")
    first = Project(folder / "first")
    write_sources(first.root / "data")
    first.run("dvc", "add", "data/quiz.jsonl")
    first.edit(SMALL)
    block = {"license": "unknown", "limits": {"train": None, "validation": 6, "test": 6}}
    block |= {"duplicates": {"similarity": None, "across": "drop"}}
    quiz: dict[str, Any] = {"source": {"kind": "file", "path": "data/quiz.jsonl"}, **block}
    shop: dict[str, Any] = {"source": {"kind": "file", "path": "data/shop", "files": {"train": "asked.jsonl"}}, **block}
    shop["options"] = {"databases": "data/shop/databases", "must_run": True}
    first.edit({f"tasks.med.{key}": value for key, value in quiz.items()})
    first.edit({f"tasks.sql.{key}": value for key, value in shop.items()})
    # A task, a model and methods that the grid does not name stay: nobody makes them.
    first.edit({"grid.tasks": ["med", "sql"], "grid.methods": ["lora"], "evaluation.batch_size": 8})
    add_remotes(first, folder / "store", s3)
    first.run("molf", "run")
    first.commit("a comparison")
    for remote in REMOTES:
        assert "pushed" in first.run("dvc", "push", "--remote", remote)
    git = folder / "team.git"
    first.run("git", "clone", "--quiet", "--bare", ".", str(git))
    runs = tracked(first)
    shutil.rmtree(first.root)
    return Shared(git, first.root, runs)


def write_sources(data: Path) -> None:
    """A quiz in a file, and questions about a database beside it."""
    quiz = [
        {"id": f"q{i}", "question": f"What is {i} and {i * 3 % 11}?", "opa": str(i + i * 3 % 11), "opb": "none"}
        | {"opc": "all", "opd": f"{i} times", "cop": 1, "subject_name": "sums"}
        for i in range(40)
    ]
    write_lines(data / "quiz.jsonl", quiz)
    file = data / "shop/databases/shop/shop.sqlite"
    file.parent.mkdir(parents=True)
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE pets (name TEXT, age INTEGER)")
        database.executemany("INSERT INTO pets VALUES (?, ?)", [(f"pet {i}", i) for i in range(9)])
    database.close()
    context = "CREATE TABLE pets (name TEXT, age INTEGER)"
    asked = [
        {"db_id": "shop", "question": f"Who is {i}?", "query": f"SELECT name FROM pets WHERE age = {i}"}
        | {"context": context}
        for i in range(40)
    ]
    write_lines(data / "shop/asked.jsonl", asked)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tracked(project: Project) -> dict[str, Any]:
    """What MLflow shows of every run, without what names the run itself: {kind and key: content}."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project.root / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    names: dict[str, str] = {}
    runs = client.search_runs(experiments)
    for each in runs:
        names[each.info.run_id] = f"{each.data.tags['molf.kind']} {each.info.run_name}"

    def named(text: str) -> str:
        """A tag's text, whose links hold what MLflow alone gives: ids of runs."""
        for number, name in names.items():
            text = text.replace(number, name)
        return text

    found = {}
    for each in runs:
        tags = {key: named(value) for key, value in each.data.tags.items() if key != "mlflow.user"}
        points = client.get_metric_history(each.info.run_id, "train/loss")
        history = [(point.step, point.value) for point in points]
        given = each.inputs.dataset_inputs if each.inputs else []
        content = {"tags": tags, "params": each.data.params, "metrics": each.data.metrics, "loss": history}
        inputs = [(one.dataset.name, one.dataset.digest) for one in given]
        found[names[each.info.run_id]] = {**content, "inputs": inputs, "status": each.info.status}
    assert len(found) == len(runs)
    return found


@pytest.fixture(scope="module", params=REMOTES)
def second(request: pytest.FixtureRequest, shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A teammate's clone, pulled over one of the remotes."""
    made = Clone(shared.git, tmp_path_factory.mktemp("elsewhere") / "second")
    made.run("dvc", "pull", "--remote", request.param, "--with-deps", "compare")
    return made


@pytest.mark.acceptance
def test_a_second_clone_has_all_and_runs_nothing(shared: Shared, second: Clone) -> None:
    assert second.repro("compare") == []
    assert second.run("git", "status", "--porcelain") == ""
    said = second.run("molf", "run")
    assert "Running stage" not in said and "lora" in said
    for name in ("models/tiny/model.safetensors", "reports/report.html", "data/prepared/sql/databases/shop.sqlite"):
        assert (second.root / name).is_file(), name
    for path in second.root.rglob("*"):
        inside = path.relative_to(second.root).parts
        if path.is_file() and inside[0] in ("data", "models", "weights", "results", "reports"):
            assert str(shared.root).encode() not in path.read_bytes(), f"{path} names the clone that made it"


@pytest.mark.acceptance
def test_a_second_clones_empty_mlflow_gets_the_same_runs(shared: Shared, second: Clone) -> None:
    assert not (second.root / "mlflow.db").exists()
    assert "4 cells, 2 runs, 4 evaluations, 1 comparisons" in second.run("molf", "track")
    assert tracked(second) == shared.runs
    assert "4 cells, 0 runs, 0 evaluations, 0 comparisons" in second.run("molf", "track")


@pytest.mark.acceptance
def test_a_pull_of_all_names_just_what_nobody_made(second: Clone) -> None:
    said = second.run("dvc", "pull", code=1)
    missing = said.partition("Checkout failed for following targets:\n")[2].partition("Is your cache")[0].split()
    assert {"data/raw/fact", "data/prepared/fact"} <= set(missing), said
    assert all(path.endswith("/fact") for path in missing), said
    assert second.run("dvc", "pull", "--allow-missing")


@pytest.mark.acceptance
def test_two_branches_that_ran_make_a_conflict_that_one_command_solves(project: Project, tmp_path: Path) -> None:
    project.run("dvc", "remote", "add", "--default", "disk", str(tmp_path / "store"))
    assert project.repro("prepare@fact") == ["fetch@fact", "prepare@fact"]
    project.commit("base")
    changes: dict[str, dict[str, Any]] = {
        "one": {"tasks.fact.max_rejected": 0.5},
        "two": {"tasks.fact.limits.train": 20},
    }
    for branch, change in changes.items():
        project.run("git", "switch", "--quiet", "--create", branch, *(["HEAD~1"] if branch == "two" else []))
        project.edit(change)
        assert project.repro("prepare@fact") == ["prepare@fact"]
        project.commit(branch)
    said = project.run("git", "merge", "one", code=1)
    assert said.count("Merge conflict in ") == said.count("Merge conflict in dvc.lock") == 1, said
    assert "prepare@fact" in project.repro("--pull", "prepare@fact")
    project.run("git", "add", "dvc.lock")
    project.commit("merged")
    assert project.repro("prepare@fact") == []


@pytest.mark.acceptance
def test_one_row_changed_reruns_its_task_alone(shared: Shared, tmp_path: Path) -> None:
    second = Clone(shared.git, tmp_path / "second")
    second.run("dvc", "pull", "--with-deps", "compare")
    path = second.root / "data/quiz.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["opd"] = "five times"
    second.run("dvc", "unprotect", "data/quiz.jsonl")
    write_lines(path, rows)
    assert "not up to date with its source and params.yaml" in second.run("molf", "data", "diff", "HEAD", "med")
    ran = second.repro("compare")
    cell = "tiny-med-lora-0"
    expected = ["fetch@med", "prepare@med", "baseline@tiny-med", f"train@{cell}", f"evaluate@{cell}", "compare"]
    assert sorted(ran) == sorted(expected)
    said = second.run("molf", "data", "diff", "HEAD")
    assert 'changed, row 6: opd: "5 times" -> "five times"' in said and "sql: no change" in said
    assert re.search(r"raw train: 40 -> 40 rows: 0 added, 0 removed, 1 changed \(rows told apart by id\)", said), said
    changed = second.run("git", "status", "--porcelain").split()
    assert changed == ["M", "data/quiz.jsonl.dvc", "M", "dvc.lock"]
