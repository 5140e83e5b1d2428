"""sources.lock: the exact commits and hashes behind names that move (hub revisions, URLs)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from molf.blocks import SHA, HubModel, HubSource, HubText, UrlSource
from molf.config import SOURCES_LOCK, Params
from molf.errors import UserError, first_line
from molf.paths import read_json, write_json


def pinned(key: str, field: str, lock: Path = SOURCES_LOCK) -> str:
    """What sources.lock pins for a block.

    Args:
        key: The block's key in params.yaml, such as `tasks.sql`.
        field: `revision`, `sha256`, or `sha256:URL` for a file behind a URL.
        lock: The file.

    Raises:
        UserError: Nothing is pinned there.
    """
    entries = read_json(lock) if lock.is_file() else {}
    try:
        return entries[key][field]
    except KeyError:
        raise UserError(f"{key}: {lock} pins no {field}; run `molf pin` and commit {lock}") from None


def pin(
    params: Params,
    commit: Callable[[str, str, str], str],
    url_hash: Callable[[str], str],
    lock: Path = SOURCES_LOCK,
) -> dict[str, tuple[str | None, str]]:
    """Refreshes sources.lock for every hub and URL block of params.yaml.

    Args:
        params: The blocks to pin; entries of other blocks stay as they are.
        commit: (repository type "model" or "dataset", id, revision) -> commit.
        url_hash: URL -> sha256 of what lies there.
        lock: The file, rewritten atomically.

    Returns:
        {"key field": (pinned before or None, pinned now)} for each entry looked up.
    """
    entries: dict[str, Any] = read_json(lock) if lock.is_file() else {}
    changes: dict[str, tuple[str | None, str]] = {}

    def put(key: str, field: str, value: str) -> None:
        block = entries.setdefault(key, {})
        changes[f"{key} {field}"] = (block.get(field), value)
        block[field] = value

    for name, model in params.models.items():
        if isinstance(model, HubModel) and not SHA.fullmatch(model.revision):
            put(f"models.{name}", "revision", commit("model", model.id, model.revision))
    if isinstance(params.general, HubText) and not SHA.fullmatch(params.general.revision):
        put("general", "revision", commit("dataset", params.general.id, params.general.revision))
    for name, task in params.tasks.items():
        if isinstance(task.source, HubSource) and not SHA.fullmatch(task.source.revision):
            put(f"tasks.{name}", "revision", commit("dataset", task.source.id, task.source.revision))
        if isinstance(task.source, UrlSource):
            for urls in task.source.locations().values():
                for url in urls:
                    put(f"tasks.{name}", f"sha256:{url}", url_hash(url))
    write_json(lock, dict(sorted(entries.items())))
    return changes


def hub_commit(kind: str, id: str, revision: str) -> str:
    """The commit that a branch or tag of a hub repository points to now.

    Raises:
        UserError: The hub or the repository cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(HfApi().repo_info(id, repo_type=kind, revision=revision).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"{kind} {id} at {revision!r} cannot be looked up ({first_line(error)})") from None


def url_sha256(url: str) -> str:
    """sha256 of what lies behind a URL, read in one pass.

    Raises:
        UserError: The URL cannot be read.
    """
    import hashlib

    import fsspec

    digest = hashlib.sha256()
    try:
        with fsspec.open(url, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{url} cannot be read ({error})") from None
    return digest.hexdigest()
