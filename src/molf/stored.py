"""Folders by their hash in DVC's cache or remote, whatever is checked out."""

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from molf.errors import RunError, UserError, first_line

MD5 = re.compile(r"[0-9a-f]{32}")
FOLDER_MD5 = re.compile(r"[0-9a-f]{32}\.dir")  # DVC's hash of a folder
File = tuple[tuple[str, ...], str]  # the parts of its path, and its hash


def hashes(root: Path, folders: Iterable[Path]) -> dict[str, str]:
    """DVC's hash of each folder as it lies here, all of whose files DVC's cache holds: {path: hash}.

    Raises:
        UserError: A folder lacks, or is not in the cache; with the command that brings it there. Or `root` is no
            project of DVC's.
    """
    from dvc.exceptions import DvcException
    from dvc.fs import LocalFileSystem
    from dvc.repo import Repo
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.tree import Tree

    found, problems = {}, []
    try:
        with Repo(str(root)) as repo:
            cache = repo.cache.local
            for folder in folders:
                if not (root / folder).is_dir():
                    problems.append(f"{folder} is not here; `dvc pull {folder}`")
                    continue
                *_, built = build(
                    cache, str((root / folder).resolve()), LocalFileSystem(), "md5", dry_run=True, ignore=repo.dvcignore
                )
                try:
                    kept = all(cache.exists(info.value) for *_, info in Tree.load(cache, built.hash_info))
                except FileNotFoundError:
                    kept = False
                if not kept:
                    problems.append(f"{folder}, as it lies here, is not in DVC's cache; `dvc repro` or `dvc commit`")
                found[str(folder)] = str(built.hash_info.value)
    except DvcException as error:
        raise UserError(f"{first_line(error)}: run this in the project's root folder") from None
    if problems:
        raise UserError(problems)
    return found


def fetch(root: Path, wanted: Mapping[str, str], into: Path) -> None:
    """Copies folders out of DVC's cache, what the cache lacks from the remote first.

    Args:
        root: Project folder.
        wanted: {path: DVC's hash of the folder}.
        into: The folder below which each is written at its path.

    Raises:
        RunError: The cache has them not, nor a remote; or a file there has another hash than its name says.
    """
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo

    with Repo(str(root)) as repo:
        cache = repo.cache.local
        for path, digest in wanted.items():
            files = _files(cache, digest)
            if files is None or not _kept(cache, files):
                remote = repo.config["core"].get("remote")
                if remote is None:
                    raise RunError(
                        f"{path} ({digest}) is not in DVC's cache, and there is no remote: `dvc remote add -d NAME "
                        "URL` (docs/data.md); who promoted it types `dvc push`"
                    )
                try:  # the list of the folder's files first
                    repo.cloud.pull([HashInfo("md5", digest)])
                    files = _files(cache, digest)
                    repo.cloud.pull([HashInfo("md5", each) for _, each in files or ()])
                except RunError:
                    raise
                except Exception as error:  # whatever DVC's index and the remote's library raise
                    raise RunError(
                        f"{path} ({digest}): the remote {remote} cannot be read ({first_line(error)})"
                    ) from None
                if files is None or not _kept(cache, files):
                    raise RunError(
                        f"{path} ({digest}) is not in DVC's cache, nor whole in the remote {remote}: who promoted it "
                        "types `dvc push`, or `dvc push --all-commits` if that was commits ago"
                    )
            _copy(cache, files, into / path)


def _files(cache: Any, digest: str) -> list[File] | None:
    """The files of a folder by its hash; None where the cache does not list them.

    Raises:
        RunError: The list is damaged.
    """
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.errors import ObjectFormatError

    try:
        with open(cache.oid_to_path(digest), "rb") as listed:
            if f"{hashlib.file_digest(listed, 'md5').hexdigest()}.dir" != digest:
                raise RunError(f"{listed.name} is damaged: remove it, and the remote's is taken")
        files = [(key, str(info.value)) for key, _, info in Tree.load(cache, HashInfo("md5", digest))]
    except (FileNotFoundError, ObjectFormatError):
        return None
    if not all(MD5.fullmatch(value) for _, value in files):
        raise RunError(f"DVC's list of files {digest} names what is no hash")
    return files


def _kept(cache: Any, files: Iterable[File]) -> bool:
    return all(cache.exists(digest) for _, digest in files)


def _copy(cache: Any, files: Iterable[File], folder: Path) -> None:
    for parts, digest in files:
        # The list of files is itself a file of the remote: it must not lead out of the folder.
        if not parts or any(part in ("", ".", "..") or PurePosixPath(part).name != part for part in parts):
            raise RunError(f"{folder}: DVC's list of its files names {'/'.join(parts)!r}, which lies outside of it")
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cache.oid_to_path(digest), target)
