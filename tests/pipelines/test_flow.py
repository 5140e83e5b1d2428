"""The flow's parts, and the flow and a served schedule for real."""

import json
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipelines import checkout, graph
from pipelines.form import ROOT
from tests.conftest import Project
from tests.pipelines.toy import Toy

DOT = """strict digraph {
"compare";
"prepare@t" -> "train@m-t-fft-0";
"base@m" -> "train@m-t-fft-0";
"prepare@t" -> "baseline@m-t";
"base@m" -> "baseline@m-t";
"train@m-t-fft-0" -> "evaluate@m-t-fft-0";
"base@m" -> "evaluate@m-t-fft-0";
"evaluate@m-t-fft-0" -> "compare";
"baseline@m-t" -> "compare";
}"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with the shipped dvc.yaml and a grid of one cell."""
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / "params.yaml").write_text("grid: {models: [m], tasks: [t], methods: [fft], seeds: [0], tune: []}\n")
    return tmp_path


def test_stages_are_sorted_by_what_of_them_is_a_cells(small: Path) -> None:
    found = graph.read(small, DOT)
    assert set(found.before) == {"prepare@t", "base@m"} and found.after == ("compare",)
    assert {job.key: job.stages for job in found.jobs} == {
        "m.t": ("baseline@m-t",),
        "m.t.fft.0": ("train@m-t-fft-0", "evaluate@m-t-fft-0"),
    }
    assert found.needs["compare"] >= {"prepare@t", "train@m-t-fft-0"}
    job = next(job for job in found.jobs if job.key == "m.t.fft.0")
    assert job.narrowed == (
        ("grid", "models", "m"),
        ("grid", "tasks", "t"),
        ("grid", "methods", "fft"),
        ("grid", "seeds", 0),
    )


def test_names_with_hyphens_do_not_confuse_cells(small: Path) -> None:
    lists = "models: [m, m-t], tasks: [t, t-t], methods: [molf-e], seeds: [0], tune: []"
    (small / "params.yaml").write_text(f"grid: {{{lists}}}\n")
    names = ["m-t-molf-e-0", "m-t-t-molf-e-0", "m-t-t-t-molf-e-0"]
    dot = "".join(f'"train@{name}";\n' for name in names)
    # `m` with `t-t` and `m-t` with `t` are one name for DVC itself, which refuses such a grid.
    assert len(graph.read(small, dot).jobs) == 3


# --- acceptance ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Toy:
    """Two methods on one task, run once; tests below stand on one another's runs only where they say so."""
    made = Toy(tmp_path_factory.mktemp("toy"), server=prefect_server)
    outside = made.root.parent / "outside/general.txt"  # which a run must find from its worktree too
    outside.parent.mkdir()
    outside.write_text("A text.\n")
    general = {"kind": "file", "path": f"../{outside.parent.name}/{outside.name}", "column": None, "license": "unknown"}
    made.edit({"general": general | {"rows": 5, "max_length": 64}})
    made.commit("general text that lies outside")
    (made.root / "note.txt").write_text("not added to git\n")
    (made.notes / "said.txt").write_text(made.flow())
    return made


def branches(toy: Toy) -> list[str]:
    """Branches of runs, the oldest first."""
    return toy.git("branch", "--list", "molf/*", "--format", "%(refname:short)").split()


def artifacts(server: str) -> dict[str, str]:
    """The newest version of each artifact. Not by Artifact.get: Prefect's sends nulls that its own server refuses."""
    body = json.dumps({"sort": "UPDATED_DESC"}).encode()
    request = urllib.request.Request(f"{server}/artifacts/latest/filter", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return {artifact["key"]: artifact["data"] for artifact in json.load(answer)}


def stages(toy: Toy) -> list[str]:
    return [entry["stage"] for entry in toy.ran()]


ALL = [
    "prepare@fact",
    "base@tiny",
    "baseline@tiny-fact",
    *(f"{stage}@tiny-fact-{method}-0" for method in ("fft", "lora") for stage in ("train", "evaluate")),
    "compare",
]


@pytest.mark.acceptance
def test_a_run_leaves_the_checkout_alone_and_one_commit_on_a_branch(toy: Toy) -> None:
    assert sorted(stages(toy)) == sorted(ALL)
    assert toy.git("status", "--porcelain") == "?? note.txt"
    assert not [name for name in ("models", "data", "results", "reports", "dvc.lock") if (toy.root / name).exists()]
    [branch] = branches(toy)
    assert toy.git("diff", "--name-only", "main", f"{branch}^").split() == ["note.txt"]  # what was uncommitted
    assert toy.git("rev-parse", "main") == toy.git("rev-parse", f"{branch}^^")
    assert toy.git("diff", "--name-only", f"{branch}^", branch).split() == ["dvc.lock", "reports/comparison.md"]
    assert "3 evaluations compared." in toy.git("log", "-1", "--format=%B", branch)
    assert not list((toy.root / ".molf/flow/cells").iterdir()), "a finished cell's worktree stays"
    key = branch.removeprefix("molf/")
    log = toy.root / f".molf/flow/logs/{key}/train@tiny-fact-fft-0.log"
    assert "train@tiny-fact-fft-0 is made" in log.read_text()
    said = (toy.notes / "said.txt").read_text()
    assert "Task run 'train@tiny-fact-fft-0' - train@tiny-fact-fft-0 is made" in said, "lines do not reach Prefect"
    assert f"next: git diff HEAD...{branch}" in said


@pytest.mark.acceptance
def test_cells_run_in_worktrees_with_what_the_run_started_from(toy: Toy) -> None:
    commit = toy.git("rev-parse", checkout.start_ref(branches(toy)[0].removeprefix("molf/")))
    assert "note.txt" in toy.git("ls-tree", "-r", "--name-only", commit)


@pytest.mark.acceptance
def test_prefect_shows_the_table_and_links(toy: Toy, prefect_server: str) -> None:
    found = artifacts(prefect_server)
    assert "3 evaluations compared." in found["comparison"]
    assert re.search(r"file://\S+/reports/report\.html", found["report"])
    assert re.search(r"http://127\.0\.0\.1:5000/#/experiments/\d+/runs/\w+", found["mlflow"])


@pytest.mark.acceptance
def test_two_runs_at_once_do_each_cell_once_and_nothing_that_was_done(toy: Toy) -> None:
    toy.ran()
    before = branches(toy)
    toy.edit({"methods.lora.r": 8})
    runs = [toy.start("--methods", "fft", "lora", "molf") for _ in range(2)]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    # The toy trains the same bytes at any rank, so that DVC sees nothing to evaluate anew of lora.
    new = ["evaluate@tiny-fact-molf-0", "train@tiny-fact-lora-0", "train@tiny-fact-molf-0"]
    assert sorted(name for name in stages(toy) if name != "compare") == new
    for branch in (name for name in branches(toy) if name not in before):
        assert "4 evaluations compared." in toy.git("show", f"{branch}:reports/comparison.md")
        assert "molf" in toy.git("diff", "main", branch, "--", "params.yaml")
    toy.git("checkout", "--quiet", "params.yaml")
    assert toy.git("status", "--porcelain") == "?? note.txt"


@pytest.mark.acceptance
def test_in_place_brings_the_checkout_up_to_date_and_commits_nothing(toy: Toy) -> None:
    toy.ran()
    before, commit = branches(toy), toy.git("rev-parse", "HEAD")
    toy.flow("--in-place")
    assert stages(toy) in ([], ["compare"])
    assert (toy.root / "reports/report.html").exists() and branches(toy) == before
    assert toy.git("rev-parse", "HEAD") == commit


@pytest.mark.acceptance
def test_a_failed_cell_stops_no_other_and_is_tried_again_only_if_that_can_help(
    tmp_path: Path, prefect_server: str
) -> None:
    toy = Toy(tmp_path, server=prefect_server, methods=["fft", "lora", "molf", "molf-e"], tasks=["fact", "med"])
    toy.tell("train@tiny-fact-fft-0", exit=2, say="error: bad params", times=9)
    toy.tell("train@tiny-fact-lora-0", signal=9, times=2)
    toy.tell("evaluate@tiny-fact-molf-0", exit=1, say="failed: out of memory: 3 GB", times=2)
    toy.tell("prepare@med", exit=2, say="error: bad rows", times=9)
    said = toy.flow("--seeds", "0", code=1)
    ran = toy.ran()
    tries = [(entry["stage"], entry["MOLF_MICRO_BATCHES"]) for entry in ran]
    assert [split for stage, split in tries if stage == "train@tiny-fact-fft-0"] == [None]
    assert [split for stage, split in tries if stage == "train@tiny-fact-lora-0"] == [None, None, "2"]
    assert [split for stage, split in tries if stage == "evaluate@tiny-fact-molf-0"] == [None, "2", "4"]
    assert not [stage for stage, _ in tries if "-med-" in stage]
    [branch] = branches(toy)
    message = toy.git("log", "-1", "--format=%B", branch)
    for text in (said, message):
        assert "tiny/fact/fft/seed-0" in text and "error: bad params" in text
        assert "tiny/med/molf/seed-0" in text and "prepare@med failed" in text
    assert "4 evaluations compared." in message  # three methods and the untrained model
    assert "failed: 6 of 10 cells lack" in said

    toy.notes.joinpath("train@tiny-fact-fft-0").unlink()
    toy.git("merge", "--quiet", branch)
    toy.edit({"tasks.med.kind": "med", "methods.molf.r": [8]})
    toy.tell("train@tiny-fact-molf-0", exit=1)
    said = toy.flow("--tasks", "fact", code=1)
    assert stages(toy) == ["train@tiny-fact-fft-0", "evaluate@tiny-fact-fft-0", "train@tiny-fact-molf-0", "compare"]
    # The merged commit has results of molf, of another rank, which are not this comparison's.
    assert "4 evaluations compared." in said and "failed: 1 of 5 cells lack" in said


@pytest.mark.acceptance
def test_bad_params_end_a_run_before_it_trains(toy: Toy) -> None:
    toy.ran()
    said = toy.flow("--methods", "fft", "lorra", code=1)
    assert "lorra" in said and "exit code 2" in said
    assert stages(toy) == []


@pytest.mark.acceptance
def test_a_push_without_remotes_is_refused_at_once(toy: Toy) -> None:
    said = toy.flow("--push", code=1)
    assert "git remote add origin" in said and "dvc remote add --default" in said


CELLS_IN_MLFLOW = """
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
experiment = client.get_experiment_by_name("molf")
print([run.info.run_name for run in client.search_runs([experiment.experiment_id])])
"""


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_the_real_pipeline_as_a_flow(project: Project, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cell of the real stages, in a copy of the project; it becomes the champion."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    project.edit({"grid.methods": ["molf"], "promotion.verdict": "any", "promotion.gain.untrained": None})
    said = project.run(sys.executable, "-m", "pipelines.flow", "--promote")
    assert "tiny/fact/molf/seed-0: score" in said, "the stages' lines are not streamed"
    [branch] = re.findall(r"branch (molf/\S+):", said)
    assert "| molf " in project.run("git", "show", f"{branch}:reports/comparison.md")
    project.run("git", "checkout", "--quiet", "params.yaml")
    project.run("git", "merge", "--quiet", branch)
    assert project.repro("compare") == [], "what the flow made is made again"
    runs = project.run(sys.executable, "-c", CELLS_IN_MLFLOW)
    assert "tiny/fact/molf/seed-0" in runs
    champion = project.run("molf", "champion", "--task", "fact")
    assert "tiny/fact/molf/seed-0" in champion and project.run("git", "rev-parse", branch).strip()[:12] in champion
