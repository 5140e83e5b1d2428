"""Worktrees that a flow works in, and what it takes of the checkout."""

import os
from copy import deepcopy
from pathlib import Path

import pytest
from dvc.config import Config
from dvc.utils.serialize import dump_yaml

from molf.config import read_yaml
from pipelines import checkout
from pipelines.graph import Job


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A commit with one file, and an index just as young as the file."""
    checkout.git(tmp_path, "init", "--quiet")
    (tmp_path / "params.yaml").write_text("grid:\n  seeds: [0] # which\n  tasks: [a]\n")
    checkout.git(tmp_path, "add", "--all")
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    checkout.git(tmp_path, *author, "commit", "--quiet", "-m", "start")
    return tmp_path


def test_a_snapshot_holds_changed_and_new_files_and_moves_nothing(repository: Path) -> None:
    (repository / "params.yaml").write_text("grid: {}\n")
    (repository / "new.txt").write_text("new\n")
    before = checkout.git(repository, "status", "--porcelain", "--branch")
    head = checkout.git(repository, "rev-parse", "HEAD")
    commit = checkout.snapshot(repository, head, "now", checkout.start_ref("k"))
    assert checkout.git(repository, "diff", "--name-only", "HEAD", commit).split() == ["new.txt", "params.yaml"]
    assert checkout.git(repository, "rev-parse", "refs/molf-flow/k") == commit
    assert checkout.git(repository, "status", "--porcelain", "--branch") == before


def test_a_snapshot_sees_a_change_of_the_same_size_in_the_same_second(repository: Path) -> None:
    path = repository / "params.yaml"
    time = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("[0]", "[7]"))
    os.utime(path, ns=(time, time))
    os.utime(repository / ".git/index", ns=(time, time))
    commit = checkout.snapshot(repository, checkout.git(repository, "rev-parse", "HEAD"), "now", "refs/k")
    assert "[7]" in checkout.git(repository, "show", f"{commit}:params.yaml")


def test_params_are_edited_with_their_comments_kept(repository: Path) -> None:
    path = repository / "params.yaml"
    path.write_text(path.read_text() + "limit: null # none\n")
    checkout.edit(path, {"grid.seeds": [1, 2]})
    assert "[1, 2]" in path.read_text() and "limit: null # none" in path.read_text()
    assert "# which" in path.read_text() and "tasks: [a]" in path.read_text()
    assert read_yaml(path) == {"grid": {"seeds": [1, 2], "tasks": ["a"]}, "limit": None}
    with pytest.raises(KeyError, match="gird.seeds"):
        checkout.edit(path, {"gird.seeds": [1]})


def test_a_cell_takes_of_dvc_lock_its_own_stages_and_those_before_cells(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {base: {foreach: [m]}, train: {matrix: {}}, evaluate: {matrix: {}}}\n")
    names = ["base@m", "train@m-t-fft-0", "evaluate@m-t-fft-0", "train@m-t-lora-0", "evaluate@m-t-lora-0"]
    entry = {"cmd": "python x.py", "deps": [{"path": "x.py", "md5": "0"}], "params": {"params.yaml": {"a.b": None}}}
    dump_yaml(tmp_path / "dvc.lock", {"schema": "2.0", "stages": {name: deepcopy(entry) for name in names}})
    job = Job("m.t.lora.0", ("m", "t", "lora", 0), (), ("train@m-t-lora-0", "evaluate@m-t-lora-0"))
    checkout.narrow_lock(tmp_path, job)
    kept = dict.fromkeys(("base@m", *job.stages), entry)
    assert read_yaml(tmp_path / "dvc.lock") == {"schema": "2.0", "stages": kept}
    other = Job("m.u.lora.0", ("m", "u", "lora", 0), (), ("train@m-u-lora-0",))
    (tmp_path / "dvc.yaml").write_text("stages: {base: {matrix: {}}, train: {matrix: {}}, evaluate: {matrix: {}}}\n")
    checkout.narrow_lock(tmp_path, other)
    assert not (tmp_path / "dvc.lock").exists(), "DVC takes no lock file without stages"
    checkout.narrow_lock(tmp_path, other)


def test_of_old_runs_the_newest_stay(tmp_path: Path) -> None:
    for name in ("1", "2", "3", "4"):
        (tmp_path / ".molf/flow/runs" / name / ".molf").mkdir(parents=True)
        if name != "2":  # which still runs, or was killed
            (tmp_path / ".molf/flow/runs" / name / ".molf/ended").touch()
    assert [path.name for path in checkout.old_runs(tmp_path, 2)] == ["1"]


def test_outside_a_repository_git_says_so(tmp_path: Path) -> None:
    with pytest.raises(checkout.GitFailed, match="not a git repository"):
        checkout.home(tmp_path)


def test_paths_outside_the_checkout_mean_the_same_in_a_runs_worktree(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run = home / ".molf/flow/runs/k"
    run.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text("{}")
    params = {"tasks": {"a": {"source": {"path": "../data/rows.jsonl"}}, "b": ["../gone", "../../far"]}}
    for _ in range(2):
        checkout.link_outside(checkout.Place(run, home), params)
    assert (run / "../data/rows.jsonl").read_text() == "{}"
    assert [path.name for path in (home / ".molf/flow/runs").iterdir()] in (["k", "data"], ["data", "k"])


def test_a_relative_remote_is_the_same_in_a_worktree(repository: Path) -> None:
    (repository / ".dvc").mkdir()
    settings = "[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n"
    (repository / ".dvc/config").write_text(settings)
    checkout.git(repository, "add", "--all")
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    checkout.git(repository, *author, "commit", "--quiet", "-m", "remote")
    place = checkout.run_worktree(repository, "k")
    expected = Config(str(repository / ".dvc"))["remote"]["store"]["url"]
    found = Config(str(place.root / ".dvc"))
    assert found["remote"]["store"]["url"] == expected == str(repository.parent / "store")
    assert found["cache"]["dir"] == str(repository / ".dvc/cache")


def test_a_branch_that_nothing_was_committed_to_goes_with_its_worktree(repository: Path) -> None:
    hooks = repository / ".git/hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "post-checkout").write_text("#!/bin/sh\nexit 1\n")  # as DVC's, which finds no cache
    (hooks / "post-checkout").chmod(0o755)
    (repository / ".dvc").mkdir()
    (repository / ".dvc/config").write_text("")
    for key in ("used", "unused"):
        place = checkout.run_worktree(repository, key)
        if key == "used":
            (place.root / "new").write_text("")
            checkout.git(place.root, "add", "new")
            checkout.git(place.root, "commit", "--quiet", "-m", "new", environment=checkout.author(repository))
        checkout.remove_worktree(repository, place.root)
        assert checkout.drop_unused_branch(repository, key) == (key == "unused")
