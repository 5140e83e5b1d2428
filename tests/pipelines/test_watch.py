"""The data watch: what it takes for a change, and when it starts a comparison."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Crashed, Failed

from molf import sources
from molf.config import Params, check_params, read_yaml
from molf.errors import UserError
from pipelines import deployments, versions, watch
from tests.conftest import ROOT
from tests.pipelines.toy import Toy

HUB = {"kind": "hub", "path": "sources.lock", "id": "us/data", "revision": "main", "splits": {"train": "train"}}


def params(source: dict[str, Any], **changes: Any) -> Params:
    """The shipped params.yaml with one task of that source."""
    raw = read_yaml(ROOT / "params.yaml")
    raw["grid"]["tasks"] = ["fact"]
    raw["tasks"]["fact"]["source"] = source
    raw.update(changes)
    return check_params(raw, "params.yaml")


@pytest.fixture
def hashes(tmp_path: Path) -> versions.Hashes:
    return versions.Hashes(tmp_path / "hashes.json")


def test_a_file_counts_by_what_it_holds_and_is_read_once(
    tmp_path: Path, hashes: versions.Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, path = params({"kind": "file", "path": "rows.jsonl"}), tmp_path / "rows.jsonl"
    assert versions.local(asked, tmp_path, hashes) == {"tasks.fact": "missing"}
    path.write_text("one\n")
    first = versions.local(asked, tmp_path, hashes)
    assert list(first) == ["tasks.fact"] and first["tasks.fact"] != "missing"
    os.utime(path, (1, 1))
    assert versions.local(asked, tmp_path, hashes) == first, "another time is no change"
    path.write_text("two\n")
    assert versions.local(asked, tmp_path, hashes) != first
    monkeypatch.setattr(versions, "file_hash", lambda path: pytest.fail("read again"))
    versions.local(asked, tmp_path, versions.Hashes(hashes.path))


def test_a_folder_counts_with_the_names_in_it(tmp_path: Path, hashes: versions.Hashes) -> None:
    asked = params({"kind": "file", "path": "data", "files": {"train": "a.jsonl"}})
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text("one\n")
    first = versions.local(asked, tmp_path, hashes)
    (tmp_path / "data/a.jsonl").rename(tmp_path / "data/b.jsonl")
    assert versions.local(asked, tmp_path, hashes) != first


def test_a_hub_revision_counts_by_its_pin_and_a_look_changes_no_pin(tmp_path: Path, hashes: versions.Hashes) -> None:
    asked, lock = params(HUB), tmp_path / "sources.lock"
    assert versions.pinned(asked, lock) == {"tasks.fact": versions.NEVER}
    text = '{"tasks.fact": {"revision": "old"}}'
    lock.write_text(text)
    assert versions.pinned(asked, lock) == {"tasks.fact": "old"}
    assert versions.looked_up(asked, tmp_path, hashes, lambda kind, id, revision: f"new of {kind} {id} {revision}") == {
        "tasks.fact": "new of dataset us/data main"
    }
    assert lock.read_text() == text
    commit = "0123456789" * 4
    assert versions.pinned(params({**HUB, "revision": commit}), lock) == {"tasks.fact": commit}


def test_a_url_is_read_only_if_its_server_says_that_it_changed(
    tmp_path: Path, hashes: versions.Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = sources.url_sha256
    monkeypatch.setattr(sources, "url_sha256", lambda url: read.append(url) or real(url))  # type: ignore[func-returns-value]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("one\n")
    asked = params({"kind": "url", "path": "sources.lock", "files": {"train": rows.as_uri()}})
    first = versions.looked_up(asked, tmp_path, hashes)
    assert versions.looked_up(asked, tmp_path, hashes) == first and len(read) == 1
    rows.write_text("three\n")
    assert versions.looked_up(asked, tmp_path, hashes) != first and len(read) == 2
    monkeypatch.setattr(versions, "url_stamp", lambda url: None)
    versions.looked_up(asked, tmp_path, hashes)
    versions.looked_up(asked, tmp_path, hashes)
    assert len(read) == 4, "of a server that says nothing of changes, all is read"


# --- acceptance ----------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """A toy project with a file and a hub data set, its deployments on a server, and nobody that runs them."""
    toy = Toy(tmp_path, tasks=["fact", "med"])
    (toy.root / "rows.jsonl").write_text("1\n")
    toy.edit({"tasks.fact.source": {"kind": "file", "path": "rows.jsonl"}, "tasks.med.source": HUB})
    (toy.root / "sources.lock").write_text('{"tasks.med": {"revision": "old"}}')
    monkeypatch.setattr(watch, "HOME", toy.root)
    monkeypatch.setattr(sources, "hub_commit", lambda kind, id, revision: "old")
    monkeypatch.setattr(watch, "TAG", f"watch-{tmp_path.name}")  # others use the server too
    monkeypatch.setattr(
        versions, "ARTIFACT", {pin: f"{tmp_path.name}-{pin}".lower().replace("_", "-") for pin in (0, 1)}
    )
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        deployments.made(deployments.read()["on-demand"]).apply()
        yield toy


def started() -> list[Any]:
    """Comparisons that the watch has started, the newest first."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
    from prefect.client.schemas.sorting import FlowRunSort

    wanted = FlowRunFilter(tags=FlowRunFilterTags(any_=[watch.TAG]))
    with get_client(sync_client=True) as client:
        return list(client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC))


def end(run: Any, state: Any) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, state, force=True)


def made_from(toy: Toy, pin: bool = False, **pins: str) -> None:
    """What a whole comparison notes at its end."""
    asked = check_params(read_yaml(toy.root / "params.yaml"), "params.yaml")
    held = {**versions.pinned(asked, toy.root / "sources.lock"), **pins}
    versions.record({**versions.local(asked, toy.root, versions.hashes(toy.root)), **held}, pin)


@pytest.mark.acceptance
def test_only_a_change_since_the_last_whole_comparison_starts_one(watched: Toy) -> None:
    assert "started" in watch.watch_data()
    assert "is under way" in watch.watch_data() and len(started()) == 1
    made_from(watched)
    end(started()[0], Completed())
    assert watch.watch_data() == "nothing changed: 2 sources are as they were at the last comparison"

    (watched.root / "rows.jsonl").write_text("2\n")
    assert "started" in watch.watch_data() and len(started()) == 2
    end(started()[0], Failed())
    assert "started" in watch.watch_data() and len(started()) == 3, "a failed comparison is none"
    end(started()[0], Crashed())
    with pytest.raises(watch.GaveUp, match="2 comparisons of this data came to nothing, the last with: Crashed"):
        watch.watch_data(tries=2)
    (watched.root / "rows.jsonl").write_text("3\n")
    assert "started" in watch.watch_data(tries=2), "other data is tried again"
    made_from(watched)
    end(started()[0], Completed())
    (watched.root / "rows.jsonl").write_text("1\n")
    assert "started" in watch.watch_data(tries=2), "data of long ago is not that of the last comparison"


@pytest.mark.acceptance
def test_a_hub_revision_that_moved_counts_only_with_pin_and_then_against_comparisons_that_pinned(
    watched: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_from(watched)
    made_from(watched, pin=True)
    monkeypatch.setattr(versions.sources, "hub_commit", lambda kind, id, revision: "new")
    assert "nothing changed" in watch.watch_data() and not started()
    assert "started" in watch.watch_data(pin=True)
    (run,) = started()
    assert run.parameters["pin"] is True
    made_from(watched, pin=True, **{"tasks.med": "new"})
    end(run, Completed())
    assert "nothing changed" in watch.watch_data(pin=True), "though the checkout's sources.lock still has the old one"
    assert "old" in (watched.root / "sources.lock").read_text()

    def away(kind: str, id: str, revision: str) -> str:
        raise UserError("the hub is away")

    monkeypatch.setattr(versions.sources, "hub_commit", away)
    assert "nothing changed: 1 sources" in watch.watch_data(pin=True)


@pytest.mark.acceptance
def test_a_comparison_that_was_taken_and_never_begun_holds_nothing_up(
    watched: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import timedelta

    from prefect.states import Pending

    watch.watch_data()
    end(started()[0], Pending())
    assert "is under way" in watch.watch_data()
    monkeypatch.setattr(watch, "PENDING", timedelta(0))
    assert "started" in watch.watch_data()
    assert [run.state.name for run in started()] == ["Scheduled", "Crashed"]
