"""Git worktrees in which a flow works, so that the checkout from which it starts stays as it is.

All share the checkout's DVC cache: what one has made, another's `dvc repro` restores without running it.
"""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ruamel.yaml.comments import CommentedSeq

from molf.config import PARAMS, editor, read_yaml
from molf.paths import SCRATCH, own_tools, write_text
from molf.secrets import concealed
from pipelines.graph import Job

FLOW = SCRATCH / "flow"  # below the checkout: runs/, cells/, locks/, logs/
LINKS = "reflink,hardlink,symlink,copy"  # how DVC brings a file from the cache into a worktree
AUTHOR = {"NAME": "molf", "EMAIL": "molf@localhost"}  # of a commit where git knows no user


class GitFailed(RuntimeError):
    """git refused; its message is the reason."""


def git(root: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Runs git; returns what it printed.

    Raises:
        GitFailed: It ended with another exit code than 0.
    """
    done = subprocess.run(
        ["git", "-c", f"core.hooksPath={os.devnull}", *arguments],  # DVC's hooks would act on half a worktree
        cwd=root,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GitFailed(concealed(f"`git {' '.join(arguments)}` in {root}: {(done.stderr or done.stdout).strip()}"))
    return done.stdout.strip()


@dataclass(frozen=True)
class Place:
    """A folder with dvc.yaml and params.yaml in which stages run.

    Args:
        root: The folder, absolute.
        home: The checkout that a person works in: its cache, its MLflow store, its locks are used.
    """

    root: Path
    home: Path

    @property
    def flow(self) -> Path:
        return self.home / FLOW

    def environment(self) -> dict[str, str]:
        """For commands that run here: this folder's molf, the checkout's MLflow."""
        found = own_tools()
        found["PYTHONPATH"] = os.pathsep.join([str(self.root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        found.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{self.home / 'mlflow.db'}")
        return found


def home(start: Path) -> Path:
    """The root of a checkout.

    Raises:
        GitFailed: It is no git repository, or has no commit yet.
    """
    root = Path(git(start, "rev-parse", "--show-toplevel"))
    git(root, "rev-parse", "--verify", "HEAD")
    return root


def start_ref(key: str) -> str:
    """The ref by which the commit stays that a run's cells were made from; `molf/KEY` cannot mean it."""
    return f"refs/molf-flow/{key}"


def snapshot(root: Path, parent: str, message: str, ref: str) -> str:
    """Makes a commit of all files as they are, untracked ones that git does not ignore included.

    Neither the index nor the branch changes. The commit stays reachable by `ref`, for results name it.

    Returns:
        The commit's hash.
    """
    index = Path(git(root, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "index"
        if index.exists():
            shutil.copy2(index, own)  # with its time, by which git knows entries that are as young as the index
        environment = {"GIT_INDEX_FILE": str(own)}
        git(root, "add", "--all", environment=environment)
        tree = git(root, "write-tree", environment=environment)
    commit = git(root, "commit-tree", tree, "-p", parent, "-m", message, environment=author(root))
    git(root, "update-ref", ref, commit)
    return commit


def start(root: Path, key: str) -> str:
    """The commit that cells of a run are made from: all files as they are, after the run's earlier such commit."""
    try:
        parent = git(root, "rev-parse", "--verify", "--quiet", start_ref(key))
    except GitFailed:  # the first
        parent = git(root, "rev-parse", "HEAD")
    return snapshot(root, parent, f"What the cells of flow run {key} are made from", start_ref(key))


def author(root: Path) -> dict[str, str]:
    """Environment in which git can commit: the user's name where git knows it."""
    try:
        git(root, "var", "GIT_COMMITTER_IDENT")
        return {}
    except GitFailed:
        return {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in AUTHOR.items()}


def share_cache(place: Place) -> None:
    """Lets DVC in a worktree use the checkout's cache, and its local settings: remotes and their credentials."""
    from dvc.config import Config

    local = place.home / ".dvc" / "config.local"
    if local.exists():
        target = place.root / ".dvc" / "config.local"
        shutil.copyfile(local, target)
        target.chmod(0o600)
    own = Config(str(place.home / ".dvc"))
    cache = own["cache"].get("dir") or place.home / ".dvc" / "cache"
    with Config(str(place.root / ".dvc"), validate=False).edit("local") as settings:
        settings.setdefault("cache", {}).update(dir=str(cache), type=LINKS)
        # Autostage: or DVC advises at each stage to stage its lock file. The other: or DVC's notes on this worktree
        # outlive it in /var/tmp.
        settings.setdefault("core", {}).update(autostage=True, site_cache_dir=str(place.root / ".dvc" / "tmp" / "site"))
        for name, remote in own["remote"].items():  # a relative address is relative to the file that holds it
            settings.setdefault("remote", {}).setdefault(name, {})["url"] = remote["url"]


def link_outside(place: Place, params: object) -> None:
    """Lets paths such as `../data/rows.jsonl` in params.yaml mean the same in a run's worktree as in the checkout."""
    if isinstance(params, dict | list):
        for value in params.values() if isinstance(params, dict) else params:
            link_outside(place, value)
    elif isinstance(params, str) and params.startswith("../") and (place.home / params).exists():
        up = Path(*itertools.takewhile(lambda part: part == "..", Path(params).parts))
        first = Path(params).parts[len(up.parts)]
        link = Path(os.path.normpath(place.root / up / first))
        if link.is_relative_to(place.flow) and not link.exists():
            with contextlib.suppress(FileExistsError):  # another run makes it at this moment
                link.symlink_to(Path(os.path.normpath(place.home / up / first)))


def run_worktree(checkout: Path, key: str) -> Place:
    """A worktree on a new branch `molf/KEY`: the checkout's commit, and one more if it has uncommitted changes."""
    path = checkout / FLOW / "runs" / key
    start = git(checkout, "rev-parse", "HEAD")
    if uncommitted(checkout):
        start = snapshot(checkout, start, f"Uncommitted changes that comparison {key} started from", start_ref(key))
    git(checkout, "worktree", "prune")
    git(checkout, "worktree", "add", "--quiet", "-b", f"molf/{key}", str(path), start)
    place = Place(path, checkout)
    share_cache(place)
    return place


def uncommitted(root: Path) -> list[str]:
    """Files that differ from the last commit, as `git status --porcelain` has them; `??` begins untracked ones."""
    return git(root, "status", "--porcelain", "--untracked-files=all").splitlines()


def drop_unused_branch(checkout: Path, key: str) -> bool:
    """Removes a run's branch to which nothing was ever committed; returns whether it did."""
    with contextlib.suppress(GitFailed):
        if len(git(checkout, "reflog", "show", "--format=%H", f"refs/heads/molf/{key}").splitlines()) == 1:
            git(checkout, "branch", "--quiet", "-D", f"molf/{key}")
            return True
    return False


def cell_worktree(checkout: Path, commit: str, job: Job) -> Place:
    """A cell's own worktree at a commit, its params.yaml with a grid of this cell alone.

    DVC's time grows with the grid, and so it stays short. Of what an earlier try has left only its scratch folder is
    used again, the checkpoint in it: a kill can leave git's and DVC's lock files, and files half written.
    """
    path = checkout / FLOW / "cells" / job.key
    aside = path.with_name(f".{job.key}")  # at a kill between the two renames the next try finds it here
    if (path / SCRATCH).exists():
        shutil.rmtree(aside, ignore_errors=True)
        (path / SCRATCH).rename(aside)
    remove_worktree(checkout, path)
    git(checkout, "worktree", "add", "--quiet", "--detach", str(path), commit)
    if aside.exists():
        aside.rename(path / SCRATCH)
    place = Place(path, checkout)
    share_cache(place)
    narrow(path / PARAMS, job)
    narrow_lock(path, job)
    git(path, "update-index", "--skip-worktree", str(PARAMS))  # the cell's records name the commit without a "+"
    return place


def narrow(path: Path, job: Job) -> None:
    """Leaves a params.yaml the one cell; of a list of the grid that the cell does not name, the first value.

    Factors of learning rates all stay: one alone is no sweep.
    """
    params = read_yaml(path)
    blocks = {block for block, _, _ in job.narrowed}
    lists = {f"{block}.{key}": values[:1] for block in blocks for key, values in params[block].items() if key != "tune"}
    edit(path, lists | {f"{block}.{key}": [value] for block, key, value in job.narrowed if key != "tune"})


def narrow_lock(root: Path, job: Job) -> None:
    """Leaves dvc.lock no other cell's stages: DVC rewrites all of it after each stage, by far slower than it reads.

    Line by line, as DVC writes it, since a large one takes minutes to parse.
    """
    path = root / "dvc.lock"
    if not path.exists():
        return
    of_cells = {name for name, stage in read_yaml(root / "dvc.yaml")["stages"].items() if "matrix" in stage}
    kept, keep, stages = [], True, 0
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if re.match(r"  [^\s-]", line):
            name = line.strip().rstrip(":")
            keep = name in job.stages or name.partition("@")[0] not in of_cells
            stages += keep
        elif not line.startswith(" "):
            keep = True
        if keep:
            kept.append(line)
    if stages:
        write_text(path, "".join(kept))
    else:
        path.unlink()


def edit(path: Path, changes: Mapping[str, object]) -> None:
    """Sets keys of a YAML file, given with dots, and keeps its comments.

    Raises:
        KeyError: A block on the way lacks; its args are the dotted key.
    """
    yaml = editor()
    data = yaml.load(path.read_text(encoding="utf-8"))
    for dotted, value in changes.items():
        *blocks, last = dotted.split(".")
        block = data
        for name in blocks:
            if not isinstance(block, dict) or name not in block:
                raise KeyError(dotted)
            block = block[name]
        if not isinstance(block, dict):
            raise KeyError(dotted)
        block[last] = value
        if isinstance(value, list):
            block[last] = CommentedSeq(value)
            block[last].fa.set_flow_style()  # [a, b], as grids are written
    text = StringIO()
    yaml.dump(data, text)
    write_text(path, text.getvalue())


def remove_worktree(checkout: Path, path: Path) -> None:
    """Removes a worktree; its branch, if it has one, stays."""
    with contextlib.suppress(GitFailed):  # twice `--force`: also one that a kill left locked while git made it
        git(checkout, "worktree", "remove", "--force", "--force", str(path))
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(GitFailed):
        git(checkout, "worktree", "unlock", str(path))
    with contextlib.suppress(GitFailed):
        git(checkout, "worktree", "prune")


def old_runs(checkout: Path, keep: int) -> Iterator[Path]:
    """Worktrees of runs that have ended, but for the newest."""
    ended = sorted(path for path in (checkout / FLOW / "runs").glob("*") if (path / SCRATCH / "ended").exists())
    yield from ended[: max(0, len(ended) - keep)]
