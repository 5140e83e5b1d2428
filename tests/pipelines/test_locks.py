"""Locks that last as long as any process holds them."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.locks import any_of, gpus, lock
from pipelines.tasks import Slots


def test_a_lock_is_held_on_by_a_child_that_got_it(tmp_path: Path) -> None:
    waited: list[bool] = []
    with lock(tmp_path / "it") as descriptor:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[descriptor]
        )
    assert child.stdin is not None

    def waiting() -> None:
        waited.append(child.poll() is None)
        child.stdin.close()  # type: ignore[union-attr]

    with lock(tmp_path / "it", waiting):
        child.wait(timeout=60)
    assert waited == [True]


def test_several_are_taken_at_once_or_none(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    with lock(paths[1]):
        with any_of(paths, 2) as (_, places):
            assert places == [0, 2]
        free = threading.Event()
        taken: list[list[int]] = []

        def take() -> None:
            with any_of(paths, 3, free.set) as (_, places):
                taken.append(places)

        thread = threading.Thread(target=take)
        thread.start()
        assert free.wait(60) and not taken
        with any_of(paths, 2):  # what waits for three holds none of them meanwhile
            assert not taken
    thread.join(60)
    assert taken == [[0, 1, 2]]


def test_a_cell_sees_the_gpus_that_it_holds_and_no_other(tmp_path: Path) -> None:
    slots = Slots(tmp_path, ("0", "1", "GPU-3"), cpu=8)
    assert slots.count == 3
    with slots.hold(1, lambda: None) as (_, first), slots.hold(2, lambda: None) as (_, others):
        assert first == {"CUDA_VISIBLE_DEVICES": "0"}
        assert others == {"CUDA_VISIBLE_DEVICES": "1,GPU-3"}


def test_cells_that_share_a_processor_share_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with Slots(tmp_path, (), cpu=2).hold(4, lambda: None) as (_, environment):
        assert environment == {"OMP_NUM_THREADS": "4"}
    with Slots(tmp_path, (), cpu=1).hold(1, lambda: None) as (_, environment):
        assert environment == {}


def test_gpus_are_those_that_the_environment_allows() -> None:
    assert gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}) == ["2", "3"]
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}) == gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
