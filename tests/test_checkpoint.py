"""Checkpoints on disk: cut by rows and put together, whole or not there, of this training or set aside."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from molf import checkpoint
from molf.checkpoint import DTYPES, CheckpointError, Checkpoints, Part, TensorFiles, differences, part, write_tensors
from molf.paths import file_hash

IDENTITY = {"method": {"kind": "fft", "learning_rate": 0.1}, "data": "d0"}


def some(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def test_files_are_ordinary_safetensors_of_every_dtype(tmp_path: Path) -> None:
    tensors = {str(dtype): some((3, 5), dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.zeros(0, 4), "turned": some((4, 6)).T}
    digest = write_tensors(tmp_path / "x.safetensors", {name: part(tensor) for name, tensor in tensors.items()})
    assert digest == file_hash(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def cuts(rows: int, parts: int) -> list[tuple[int, int]]:
    """As FSDP cuts: equal shares, the last ones smaller or empty."""
    most = -(-rows // parts)
    return [(min(i * most, rows), min((i + 1) * most, rows)) for i in range(parts)]


@pytest.mark.parametrize(("written", "read"), [(1, 1), (1, 3), (2, 1), (3, 2), (2, 3), (4, 3)])
def test_rows_written_by_some_processes_are_read_by_others(tmp_path: Path, written: int, read: int) -> None:
    wide, thin, scalar = some((7, 3)), some((5,), torch.bfloat16), torch.tensor(3, dtype=torch.int64)
    paths = []
    for rank in range(written):
        parts = {"scalar": part(scalar)} if rank == 0 else {}
        for name, tensor in {"wide": wide, "thin": thin}.items():
            low, high = cuts(len(tensor), written)[rank]
            if low < high:
                parts[name] = Part(tensor[low:high], tuple(tensor.shape), low)
        paths.append(tmp_path / f"rank-{rank}.safetensors")
        write_tensors(paths[-1], parts)
    files = TensorFiles(paths)
    assert files.kind("wide") == ((7, 3), torch.float32)
    for rank in range(read):
        targets = {"scalar": part(torch.zeros_like(scalar))}
        for name, tensor in {"wide": wide, "thin": thin}.items():
            low, high = cuts(len(tensor), read)[rank]
            targets[name] = Part(torch.full_like(tensor[low:high], -1), tuple(tensor.shape), low)
        files.fill(targets)
        assert targets["scalar"].tensor == 3
        for name, tensor in {"wide": wide, "thin": thin}.items():
            low, high = cuts(len(tensor), read)[rank]
            assert torch.equal(targets[name].tensor, tensor[low:high])
    assert torch.equal(files.read("wide"), wide)


def test_rows_that_lack_and_tensors_of_another_kind_are_noticed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": Part(some((2, 3)), (5, 3), 1)})
    files = TensorFiles([tmp_path / "a"])
    for target, words in (
        ({"y": part(torch.zeros(5, 3))}, "y is not in the checkpoint"),
        ({"x": part(torch.zeros(5, 3))}, "2 of the rows 0 to 5"),
        ({"x": part(torch.zeros(4, 3))}, r"\(5, 3\).*in the checkpoint and.*\(4, 3\)"),
        ({"x": part(torch.zeros(5, 3, dtype=torch.float64))}, "float64"),
    ):
        with pytest.raises(CheckpointError, match=words):
            files.fill(target)


def store(folder: Path, keep: int = 2, **identity: Any) -> Checkpoints:
    return Checkpoints(folder, IDENTITY | identity, keep)


def save(checkpoints: Checkpoints, step: int) -> Path:
    tensors = {"w": part(torch.full((3,), float(step)))}
    own = {"random": torch.tensor([step])}
    return checkpoints.save(step, tensors, own, {"note": {"step": step}}, {"trainer_state.json": {"global_step": step}})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_found_and_older_ones_go(tmp_path: Path) -> None:
    checkpoints = store(tmp_path / "tiny/seed-0")
    assert checkpoints.latest() is None
    for step in (5, 40, 100):
        save(checkpoints, step)
    assert names(checkpoints.folder) == ["step-00000040", "step-00000100"]
    found = store(checkpoints.folder).latest()
    assert found is not None and found.step == 100 and found.state["note"] == {"step": 100}
    assert names(found.path) == ["rank-0.safetensors", "state.json", "trainer_state.json"]
    files = found.tensors()
    assert files.read("w").tolist() == [100.0] * 3
    assert files.names("w") == ["w"] and files.own()["random"].tolist() == [100]
    save(checkpoints, 100)  # again
    assert names(checkpoints.folder) == ["step-00000040", "step-00000100"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": lambda path: flip(path / "rank-0.safetensors"),
    "a file cut short": lambda path: os.truncate(path / "rank-0.safetensors", 90),
    "no tensors": lambda path: (path / "rank-0.safetensors").unlink(),
    "no state": lambda path: (path / "state.json").unlink(),
    "half a state": lambda path: os.truncate(path / "state.json", 40),
    "another step": lambda path: (path / "state.json").write_text(
        (path / "state.json").read_text().replace('"step": ', '"step": 1')
    ),
    "a state of the Trainer cut short": lambda path: os.truncate(path / "trainer_state.json", 3),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 4)
    DAMAGES[damage](save(checkpoints, 9))
    found = checkpoints.latest()
    assert found is not None and found.step == 4
    assert names(tmp_path) == ["set-aside", "step-00000004"]
    damaged = tmp_path / "set-aside/damaged"
    assert names(damaged) == ["step-00000009"]
    said = capsys.readouterr().err
    assert "step-00000009 is not used" in said and "damaged" in said
    assert f"kept in {damaged} until this cell has been evaluated" in said
    DAMAGES[damage](found.path)
    assert checkpoints.latest() is None  # and training begins anew
    assert names(damaged) == ["step-00000009"]  # of damaged ones the newest stays
    assert f"removed, since a newer one is kept in {damaged}" in capsys.readouterr().err
    assert names(tmp_path) == ["set-aside"]


def test_a_checkpoint_of_another_training_is_refused_and_says_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(store(tmp_path), 4)
    save(store(tmp_path), 6)
    other = store(tmp_path, data="d1", method={"kind": "fft", "learning_rate": 0.2})
    assert other.latest() is None
    said = capsys.readouterr().err
    assert "another training (method.learning_rate: 0.1 there, 0.2 here; data: d0 there, d1 here)" in said
    [aside] = (tmp_path / "set-aside").iterdir()
    assert names(aside) == ["step-00000006"]  # the newest alone
    assert "step-00000004 is not used: it is of another training" in said
    assert f"removed, since a newer one is kept in {aside} until this cell has been evaluated" in said
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
    assert differences({"a": {"b": 1}}, {"a": {"c": 1}}) == ["a.b: 1 there, None here", "a.c: None there, 1 here"]


def test_a_configuration_that_comes_back_finds_its_training_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is trained to step 6, another to step 4, a third to step 6 as well; then each is asked for again."""
    steps = {"d0": [4, 6], "d1": [4], "d2": [6]}
    for data, of in steps.items():
        assert store(tmp_path, data=data).latest() is None
        for step in of:
            save(store(tmp_path, data=data), step)
    for data in ("d1", "d0", "d0", "d2", "d1"):
        capsys.readouterr()
        found = store(tmp_path, data=data).latest()
        assert found is not None and found.step == steps[data][-1] and found.state["identity"]["data"] == data
        assert found.tensors().read("w").tolist() == [float(found.step)] * 3
        assert names(tmp_path) == ["set-aside", found.path.name]
    said = capsys.readouterr().err
    assert "data: d2 there, d1 here" in said and "step-00000004 is of this training: it is taken back" in said
    # It goes on, and is found further on the next time.
    save(store(tmp_path, data="d1"), 9)
    assert store(tmp_path, data="d0").latest() is not None
    found = store(tmp_path, data="d1").latest()
    assert found is not None and found.step == 9
    assert len(list(tmp_path.glob("set-aside/*/step-*"))) == 2


def test_a_damaged_one_that_was_set_aside_is_not_taken_back(tmp_path: Path) -> None:
    save(store(tmp_path), 4)
    assert store(tmp_path, data="d1").latest() is None
    [path] = tmp_path.glob("set-aside/*/step-00000004")
    flip(path / "rank-0.safetensors")
    assert store(tmp_path).latest() is None
    assert [path.parent.name for path in tmp_path.glob("set-aside/*/step-*")] == ["damaged"]


def test_what_a_torn_write_left_is_removed_and_never_read(tmp_path: Path) -> None:
    good = save(store(tmp_path), 4)
    torn = tmp_path / ".step-00000009.tmp"
    torn.mkdir()
    for path in good.iterdir():
        (torn / path.name).write_bytes(path.read_bytes())
    (tmp_path / ".step-00000001.old").mkdir()
    (tmp_path / "set-aside/x/.step-00000001.old").mkdir(parents=True)
    found = store(tmp_path).latest()
    assert found is not None and found.step == 4
    assert names(tmp_path) == ["set-aside", "step-00000004"] and not list(tmp_path.glob("set-aside/x/.*"))


@pytest.mark.parametrize("call", range(1, 6))
def test_a_disk_that_fails_at_any_moment_costs_the_new_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Each of the five syncs of a save fails in turn: three files, the folder, and, after the rename, its parent."""
    save(store(tmp_path), 4)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(store(tmp_path), 9)
    assert len(calls) == call
    found = store(tmp_path).latest()
    assert found is not None and found.step == (4 if call < 5 else 9)
    assert not list(tmp_path.glob(".*"))


def test_a_state_may_hold_any_plain_data(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    state = {"groups": {10: [0.1, 1e-300, None], 2: {"x": True}}, "loss": 1 / 3}
    checkpoints.save(1, {}, {}, state, {})
    found = checkpoints.latest()
    assert found is not None
    assert found.state["groups"] == {"10": [0.1, 1e-300, None], "2": {"x": True}}
    assert found.state["loss"] == 1 / 3
    assert json.loads((found.path / "state.json").read_text())["step"] == 1
