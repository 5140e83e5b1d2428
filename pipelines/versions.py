"""What a comparison's data and models are at this moment, and what they were at the last whole comparison.

Prefect's server keeps the latter as an artifact, so that it outlives restarts and is one for all machines. Only a
comparison of params.yaml as it is, of which no cell lacks, writes it.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey

from molf import sources
from molf.blocks import SHA, SqlOptions
from molf.config import SOURCES_LOCK, Params, fingerprint
from molf.errors import UserError
from molf.paths import file_hash, read_json, write_json
from pipelines.checkout import FLOW

ARTIFACT = {False: "sources", True: "sources-pinned"}  # by whether the comparison looked up hub and URLs anew
NEVER = "not pinned"


class Hashes:
    """Hashes of files and URLs, remembered by what tells a change without reading them.

    Args:
        path: File in which they are remembered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, list[str]] = read_json(path)
        except (OSError, ValueError):
            self.known = {}

    def of(self, name: str, stamp: str | None, compute: Callable[[], str]) -> str:
        """The hash remembered for this stamp, or computed and remembered; without a stamp always computed."""
        if stamp is not None and self.known.get(name, [""])[0] == stamp:
            return self.known[name][1]
        found = compute()
        if stamp is not None:
            self.known[name] = [stamp, found]
            write_json(self.path, self.known)
        return found

    def file(self, path: Path) -> str:
        """sha256 of a file."""
        stat = path.stat()
        stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        return self.of(str(path), stamp, lambda: file_hash(path))

    def url(self, url: str) -> str:
        """sha256 of what lies behind a URL; read only if its server says that it changed, or says nothing of that.

        Raises:
            UserError: It cannot be read.
        """
        return self.of(url, url_stamp(url), lambda: sources.url_sha256(url))


def url_stamp(url: str) -> str | None:
    """ETag or time of a URL, by which its server tells that it changed; None if it tells neither."""
    try:
        file_system, path = fsspec.core.url_to_fs(url)
        said = file_system.info(path)
    except (OSError, ValueError, ImportError):
        return None
    found = {key: str(said[key]) for key in ("ETag", "Last-Modified", "LastModified", "mtime") if said.get(key)}
    return json.dumps({**found, "size": said.get("size")}) if found else None


def blocks(params: Params) -> dict[str, Any]:
    """The grid's blocks that name a source of data or weights, by their keys in params.yaml."""
    found: dict[str, Any] = {f"models.{name}": params.models[name] for name in params.grid.models}
    found |= {f"tasks.{name}": params.tasks[name].source for name in params.grid.tasks}
    return {**found, "general": params.general}


def local(params: Params, root: Path, hashes: Hashes) -> dict[str, str]:
    """Versions of the grid's files: {key in params.yaml: hash}; a missing one's is `missing`.

    Args:
        params: The blocks.
        root: Folder that their paths start from.
        hashes: Those remembered.
    """
    paths = {
        key: block.path
        for key, block in blocks(params).items()
        if block.kind in ("file", "path") or block.kind == "gguf" and block.package is None
    }
    for name in params.grid.tasks:
        options = params.tasks[name].options
        if isinstance(options, SqlOptions) and options.databases is not None:
            paths[f"tasks.{name}.options.databases"] = options.databases
    found = {}
    for key, given in paths.items():
        path = root / given
        files = [path] if path.is_file() else sorted(other for other in path.rglob("*") if other.is_file())
        parts = [(os.path.relpath(file, path), hashes.file(file)) for file in files]
        found[key] = fingerprint(parts) if parts else "missing"
    return found


def pinned(params: Params, lock: Path) -> dict[str, str]:
    """Versions of the grid's hub repositories and URLs, as a sources.lock has them: {key in params.yaml: version}."""
    found = {}
    for key, block in blocks(params).items():
        try:
            if block.kind == "hub":
                fixed = SHA.fullmatch(block.revision)
                found[key] = block.revision if fixed else sources.pinned(key, "revision", lock)
            elif block.kind == "url":
                urls = [url for split in block.locations().values() for url in split]
                found[key] = fingerprint([sources.pinned(key, f"sha256:{url}", lock) for url in urls])
        except UserError:
            found[key] = NEVER
    return found


def looked_up(
    params: Params, root: Path, hashes: Hashes, commit: Callable[[str, str, str], str] | None = None
) -> dict[str, str]:
    """What `pinned` will be after a `molf pin` at this moment; sources.lock stays as it is.

    Raises:
        UserError: A hub or a URL cannot be reached.
    """
    names = params.grid
    only = params.model_copy(
        update={
            "models": {name: params.models[name] for name in names.models},
            "tasks": {name: params.tasks[name] for name in names.tasks},
        }
    )
    with TemporaryDirectory() as folder:
        lock = Path(folder) / SOURCES_LOCK
        if (root / SOURCES_LOCK).is_file():
            lock.write_bytes((root / SOURCES_LOCK).read_bytes())
        sources.pin(only, commit or sources.hub_commit, hashes.url, lock)
        return pinned(only, lock)


def hashes(home: Path) -> Hashes:
    """Those that a checkout remembers."""
    return Hashes(home / FLOW / "hashes.json")


@dataclass(frozen=True)
class Record:
    """What a whole comparison was made from.

    Args:
        id: Tells one record from another; empty if there is none.
        versions: {key in params.yaml: version}.
    """

    id: str
    versions: Mapping[str, str]


def record(versions: Mapping[str, str], pin: bool) -> None:
    """Notes what the comparison that runs was made from, once it is whole.

    Args:
        versions: {key in params.yaml: version}.
        pin: Whether it looked up hub and URLs anew.
    """
    create_table_artifact(
        key=ARTIFACT[pin],
        table=[{"source": key, "version": version} for key, version in versions.items()],
        description="What the comparison was made from; the data watch starts another when one of these changes",
    )


def last(pin: bool) -> Record:
    """What the last whole comparison was made from, asked of Prefect's server.

    Args:
        pin: Whether hub and URLs are looked up anew: then of a comparison that did so too.
    """
    wanted = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=[ARTIFACT[pin]]))
    with get_client(sync_client=True) as client:
        found = client.read_latest_artifacts(artifact_filter=wanted)
    if not found:
        return Record("", {})
    data: Any = found[0].data
    rows = json.loads(data) if isinstance(data, str) else data
    return Record(str(found[0].latest_id), {row["source"]: row["version"] for row in rows})
