"""The project's files at two versions: a git revision, out of DVC's cache or remote, and the working tree."""

import hashlib
import io
from functools import partial
from pathlib import Path
from typing import IO

from molf.errors import UserError, first_line

# How many names of a path a DVC output has, by the first of them: what `dvc fetch` takes.
OUTPUT_DEPTH = {"data": 3, "results": 6, "reports": 2}


class Unavailable(Exception):
    """A file that a version has and that cannot be had here; the message says why and what to type."""


class WorkingTree:
    """The files as they lie in the project's folder."""

    name = "the working tree"

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, folder: Path) -> set[str]:
        base = self.root / folder
        return {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}

    def md5(self, path: Path) -> str:
        with self.open(path) as file:
            return hashlib.file_digest(file, "md5").hexdigest()

    def open(self, path: Path) -> io.BufferedReader:
        return (self.root / path).open("rb")


class Revision:
    """The files at a git revision.

    A file that only the remote has is put into DVC's cache, as `dvc fetch` would.

    Raises:
        UserError: There is no such revision, or no repository.
    """

    def __init__(self, root: Path, revision: str) -> None:
        from dvc.api import DVCFileSystem
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc.scm import RevError

        try:
            # The remote of now: that revision may have had none, or another.
            with Repo(str(root)) as repo:
                self._remote: str | None = repo.config["core"].get("remote")
                known = {"core": {"remote": self._remote}, "remote": dict(repo.config["remote"])}
            config = known if self._remote else {}
            # The project may be a folder of a larger repository: paths count from the repository's root.
            self._files = DVCFileSystem(
                str(root), rev=revision, subrepos=True, config=config, repo_factory=partial(Repo, config=config)
            )
            commit: str = self._files.repo.get_rev()
            top = Path(self._files.repo.scm.root_dir)
        except RevError as error:
            raise UserError(
                f"{error}; `git log --oneline` lists revisions, a branch or tag does too, and `git fetch` brings others"
            ) from None
        except DvcException as error:
            raise UserError(f"{error}: run this in the project's root folder") from None
        self._base = root.resolve().relative_to(top.resolve())
        self.name = revision if commit.startswith(revision) else f"{revision} ({commit[:7]})"

    def outputs(self, folder: Path) -> set[str]:
        """Names of the outputs right below a folder that were made.

        Raises:
            UserError: DVC cannot read its files of that revision.
        """
        from dvc.exceptions import DvcException

        try:
            entries = self._files.ls(str(self._base / folder), detail=True)
        except FileNotFoundError:
            return set()
        except DvcException as error:
            raise UserError(f"{self.name}: {error}") from None
        return {Path(entry["name"]).name for entry in entries if entry.get("md5")}

    def has(self, path: Path) -> bool:
        """Whether a file is there that git keeps, or that DVC keeps as an output of its own."""
        try:
            info = self._files.info(str(self._base / path))
        except FileNotFoundError:
            return False
        return bool(info.get("md5")) or not info.get("dvc_info", {}).get("isout", False)

    def files(self, folder: Path) -> set[str]:
        base = self._base / folder
        try:
            if not self._files.info(str(base)).get("md5"):  # named in dvc.yaml, and not made then
                return set()
            return {str(Path(name).relative_to(base)) for name in self._files.find(str(base))}
        except FileNotFoundError:
            return set()
        except Exception as error:  # whatever DVC's index and the remote's library raise
            raise self._unavailable(folder, error) from error

    def md5(self, path: Path) -> str:
        return str(self._files.info(str(self._base / path))["md5"])

    def open(self, path: Path) -> IO[bytes]:
        try:
            file: IO[bytes] = self._files.open(str(self._base / path), cache=True)
            return file
        except Exception as error:
            raise self._unavailable(path, error) from error

    def _unavailable(self, path: Path, error: Exception) -> Unavailable:
        here = f"{path} of {self.name} is not in DVC's cache"
        fetch = f"dvc fetch --all-commits {Path(*path.parts[: OUTPUT_DEPTH[path.parts[0]]])}"
        if self._remote is None:
            return Unavailable(
                f"{here} and there is no remote: `dvc remote add -d NAME URL` (docs/data.md), then `{fetch}`"
            )
        if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
            return Unavailable(
                f"{here}, nor in the remote {self._remote}: who made it types `dvc push --all-commits`, then `{fetch}`"
            )
        return Unavailable(f"{here} and the remote {self._remote} cannot be read ({first_line(error)}): then `{fetch}`")
