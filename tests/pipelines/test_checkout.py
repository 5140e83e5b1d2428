"""Worktrees that a flow works in, and what it takes of the checkout."""

import os
from pathlib import Path

import pytest

from molf.config import read_yaml
from pipelines import checkout


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
    checkout.edit(path, {"grid.seeds": [1, 2]})
    assert "# which" in path.read_text() and "tasks: [a]" in path.read_text()
    assert read_yaml(path) == {"grid": {"seeds": [1, 2], "tasks": ["a"]}}
    with pytest.raises(KeyError, match="gird.seeds"):
        checkout.edit(path, {"gird.seeds": [1]})


def test_of_old_runs_the_newest_stay(tmp_path: Path) -> None:
    for name in ("1", "2", "3", "4"):
        (tmp_path / ".molf/flow/runs" / name / ".molf").mkdir(parents=True)
        if name != "2":  # which still runs, or was killed
            (tmp_path / ".molf/flow/runs" / name / ".molf/ended").touch()
    assert [path.name for path in checkout.old_runs(tmp_path, 2)] == ["1"]


def test_outside_a_repository_git_says_so(tmp_path: Path) -> None:
    with pytest.raises(checkout.GitFailed, match="not a git repository"):
        checkout.home(tmp_path)
