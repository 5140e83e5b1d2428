"""A stage runs with the package of the project that it runs in, or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from molf.errors import UserError
from molf.stages import require_own_package

PACKAGE = Path(__file__).parents[1] / "src/molf"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project that has a package of its own."""
    for name in (".dvc", "src/molf", "below"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "src/molf/__init__.py").touch()
    return tmp_path


def started(root: Path) -> subprocess.CompletedProcess[str]:
    """`molf.stages.prepare` of this checkout, without a task's name, in a project."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "molf.stages.prepare"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_another_checkouts_package_is_refused_with_what_to_set(root: Path) -> None:
    done = started(root)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 problem")
    assert f"molf was imported from {PACKAGE}, but this project has its own in {root / 'src/molf'}" in done.stderr
    assert f"set PYTHONPATH={root / 'src'}" in done.stderr


def test_a_project_without_a_package_takes_the_installed_one(root: Path) -> None:
    (root / "src/molf/__init__.py").unlink()
    assert "IndexError" in started(root).stderr  # so the stage began, and found no task's name


def test_the_projects_own_package_is_taken_from_any_folder_and_through_links(root: Path) -> None:
    require_own_package(root, root / "src/molf")
    require_own_package(root / "below", root / "src/molf")
    (root / "link").symlink_to(root / "src/molf")
    require_own_package(root, root / "link")


@pytest.mark.parametrize("folder", [".", "below"])
def test_a_worktree_within_a_checkout_is_a_project_of_its_own(root: Path, folder: str) -> None:
    inner = root / ".molf/runs/one"
    for name in (".dvc", "src/molf", "below"):
        (inner / name).mkdir(parents=True)
    (inner / "src/molf/__init__.py").touch()
    with pytest.raises(UserError, match="runs/one/src"):
        require_own_package(inner / folder, root / "src/molf")


def test_outside_a_project_nothing_is_asked(root: Path) -> None:
    (root / ".dvc").rmdir()
    require_own_package(root, PACKAGE)
