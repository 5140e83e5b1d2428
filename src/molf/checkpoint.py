"""Training checkpoints on disk: there whole or not at all, checked before they are read, never pickled.

A checkpoint is a folder `step-00000120` with a `rank-R.safetensors` from each process and `state.json`, which holds the
rest and every file's sha256. A tensor that is cut by rows among processes is stored as it is cut, and read back by any
other number of processes.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from molf.collective import agreed, barrier, gathered, rank
from molf.errors import RunError
from molf.paths import file_hash

STATE = "state.json"
OWN = "own."  # begins the names of what each process keeps for itself, such as its random state
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(RunError):
    """A checkpoint does not hold what is read from it."""


# --- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A whole tensor, or the rows of it that this process holds."""

    tensor: Tensor  # on any device
    shape: tuple[int, ...]  # of the whole
    first: int = 0  # which row of the whole is the first here

    @property
    def whole(self) -> bool:
        return tuple(self.tensor.shape) == self.shape

    @property
    def rows(self) -> tuple[int, int]:
        """First row, and the one after the last; a scalar counts as one row."""
        return self.first, self.first + (len(self.tensor) if self.tensor.ndim else 1)


def part(tensor: Tensor) -> Part:
    """What this process holds of a tensor: all of it, or its rows if it is a `DTensor` that is sharded by rows.

    Raises:
        ValueError: A `DTensor` is sharded in another way.
    """
    tensor = tensor.detach()
    if not hasattr(tensor, "placements"):
        return Part(tensor, tuple(tensor.shape))
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    local = tensor.to_local()
    if all(placement.is_replicate() for placement in tensor.placements):
        return Part(local, tuple(local.shape))
    [placement, *rest] = tensor.placements
    if rest or not placement.is_shard(0):
        raise ValueError(f"a tensor sharded as {tensor.placements} cannot be stored; only by rows over one mesh axis")
    # As torch.chunk cuts: every process gets as many rows as the first, the last ones fewer or none.
    most = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(tensor.device_mesh.get_local_rank() * most, tensor.shape[0])
    return Part(local, tuple(tensor.shape), first)


def write_tensors(path: Path, parts: Mapping[str, Part]) -> str:
    """Writes a safetensors file tensor by tensor, so that no second copy of all is made in memory, and syncs it.

    What is cut has an entry `[shape, first row]` in the JSON of the metadata's `cut`.

    Returns:
        sha256 of the file, in hexadecimal.

    Raises:
        OSError: The disk is full or fails.
    """
    # The format wants no gaps; the widest types first keep every tensor aligned.
    names = sorted(parts, key=lambda name: (-parts[name].tensor.element_size(), name))
    cut = {name: [list(parts[name].shape), parts[name].first] for name in names if not parts[name].whole}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "cut": json.dumps(cut)}}
    end = 0
    for name in names:
        tensor = parts[name].tensor
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for name in names:
            put(parts[name].tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        _sync(file.fileno())
    return digest.hexdigest()


class TensorFiles:
    """The tensors of all of a checkpoint's files, however many processes wrote them.

    Args:
        paths: `rank-0.safetensors` first.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._pieces: dict[str, list[tuple[Any, int, int]]] = {}  # file, first row, row after the last
        self._kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        types = {name: dtype for dtype, name in DTYPES.items()}
        for file in self._files:
            cut = json.loads(file.metadata()["cut"])
            names = file.keys()
            for name in names:
                view = file.get_slice(name)
                shape = view.get_shape()
                whole, first = cut.get(name, (shape, 0))
                self._kinds.setdefault(name, (tuple(whole), types[view.get_dtype()]))
                if not name.startswith(OWN):
                    rows = shape[0] if shape else 1
                    self._pieces.setdefault(name, []).append((file, first, first + rows))

    def names(self, prefix: str) -> list[str]:
        """Names of the shared tensors that begin with `prefix`."""
        return [name for name in self._pieces if name.startswith(prefix)]

    def kind(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape of the whole tensor, and its dtype."""
        return self._kinds[name]

    def fill(self, targets: Mapping[str, Part]) -> None:
        """Copies stored rows into tensors, in place.

        Args:
            targets: Where the rows go that this process holds.

        Raises:
            CheckpointError: A tensor is not there, not all of its rows are, or its shape or dtype is another.
        """
        for name, target in targets.items():
            if name not in self._pieces:
                raise CheckpointError(f"{name} is not in the checkpoint")
            here = (target.shape, target.tensor.dtype)
            if self._kinds[name] != here:
                raise CheckpointError(f"{name} is {self._kinds[name]} in the checkpoint and {here} here")
            low, high = target.rows
            filled = 0
            for file, first, last in self._pieces[name]:
                begin, end = max(low, first), min(high, last)
                if begin < end and not target.tensor.ndim:
                    target.tensor.copy_(file.get_tensor(name))
                elif begin < end:
                    rows = file.get_slice(name)[begin - first : end - first]
                    target.tensor[begin - low : end - low].copy_(rows)
                filled += max(0, end - begin)
            if filled != high - low:
                raise CheckpointError(f"{name}: {filled} of the rows {low} to {high} are in the checkpoint")

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the host."""
        shape, dtype = self._kinds[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.fill({name: part(tensor)})
        return tensor

    def own(self) -> dict[str, Tensor]:
        """What this process kept for itself; nothing where there was no such process."""
        if rank() >= len(self._files):
            return {}
        file = self._files[rank()]
        names = file.keys()
        return {name.removeprefix(OWN): file.get_tensor(name) for name in names if name.startswith(OWN)}


# --- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found good."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self) -> TensorFiles:
        """Its tensors; the files stay open as long as the result lives."""
        files = sorted(
            (name for name in self.state["files"] if name.startswith("rank-")),
            key=lambda name: int(name.removeprefix("rank-").removesuffix(".safetensors")),
        )
        return TensorFiles([self.path / name for name in files])


class Checkpoints:
    """The checkpoints of one training, newest last; all processes of the training call the same methods.

    Args:
        folder: Their folder.
        identity: Plain data: all that determines the training. A checkpoint of another one is never returned.
        keep: How many stay.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def latest(self) -> Checkpoint | None:
        """The newest good checkpoint of this training, or None.

        Newer ones that are damaged or belong to another training go into the folder `set-aside`, with a message. There
        the newest of each training stays, and comes back when that training is asked for again.
        """
        found = agreed(self._find)
        return None if found is None else Checkpoint(self.folder / found[0], found[1])

    def _find(self) -> tuple[str, dict[str, Any]] | None:
        self._remove_leftovers()
        found = self._newest(self._all(self.folder))
        own = self._aside(self.identity)
        before = self._newest(self._all(own))
        if before is not None and (found is None or before[0] > found[0]):
            os.rename(own / before[0], self.folder / before[0])
            print(f"checkpoint {own / before[0]} is of this training: it is taken back", file=sys.stderr)
            found = before
        return found

    def _newest(self, paths: Sequence[Path]) -> tuple[str, dict[str, Any]] | None:
        """Name and state of the last that is good; those after it are set aside."""
        for path in reversed(paths):
            state, problem = self._judge(path)
            if not problem:
                return path.name, state
            folder = self._aside(state.get("identity"))
            newer = [other.name for other in self._all(folder) if other.name > path.name]
            fate = "removed, since a newer one is kept" if newer else "kept"
            print(
                f"checkpoint {path} is not used: {problem}; {fate} in {folder} until this cell has been evaluated",
                file=sys.stderr,
            )
            if newer:
                self._remove(path)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            self._remove(folder / path.name)
            os.rename(path, folder / path.name)
            for older in self._all(folder)[:-1]:
                self._remove(older)
        return None

    def _aside(self, identity: Mapping[str, Any] | None) -> Path:
        """Where the checkpoint of another training stays, or a damaged one (None)."""
        return self.folder / "set-aside" / ("damaged" if identity is None else _digest(identity)[:16])

    def _judge(self, path: Path) -> tuple[dict[str, Any], str]:
        """The state of a checkpoint ({} if it is damaged), and what is wrong with it ('' if nothing is)."""
        try:
            state = json.loads((path / STATE).read_bytes())
            if state.pop("sha256") != _digest(state):
                return {}, f"{STATE} is damaged"
            for name, (size, sha256) in state["files"].items():
                if (path / name).stat().st_size != size or file_hash(path / name) != sha256:
                    return {}, f"{name} is damaged"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return {}, f"it is damaged ({type(error).__name__}: {error})"
        other = differences(state["identity"], self.identity)
        return state, f"it is of another training ({'; '.join(other)})" if other else ""

    def save(
        self,
        step: int,
        tensors: Mapping[str, Part],
        own: Mapping[str, Tensor],
        state: Mapping[str, Any],
        documents: Mapping[str, Any],
    ) -> Path:
        """Writes a checkpoint beside the others and renames it into place; only then older ones go.

        Args:
            step: Optimizer steps done.
            tensors: What the processes share: those that are whole are written by the first process alone.
            own: What this process keeps for itself.
            state: Plain data of the first process, for `state.json`.
            documents: Further JSON files, by name.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: A process could not write (a full disk); what was begun is removed, older checkpoints stay.
        """
        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{path.name}.tmp"
        name = f"rank-{rank()}.safetensors"

        def write_tensor_file() -> tuple[str, int, str]:
            mine = {key: value for key, value in tensors.items() if not value.whole or rank() == 0}
            mine = {key: value for key, value in mine.items() if value.whole or value.tensor.numel()}
            mine |= {OWN + key: part(value) for key, value in own.items()}
            digest = write_tensors(temporary / name, mine)
            return name, (temporary / name).stat().st_size, digest

        def finish(files: list[tuple[str, int, str]]) -> None:
            content = {"step": step, "identity": self.identity, **state}
            content["files"] = {name: [size, digest] for name, size, digest in files}
            for other, value in documents.items():
                text = json.dumps(value).encode()
                _write(temporary / other, text)
                content["files"][other] = [len(text), hashlib.sha256(text).hexdigest()]
            content = json.loads(json.dumps(content))
            content["sha256"] = _digest(content)
            _write(temporary / STATE, json.dumps(content).encode())
            _sync_folder(temporary)
            self._remove(path)  # of the same step: a damaged one would have been set aside, but who knows
            os.rename(temporary, path)
            _sync_folder(self.folder)
            for older in self._all(self.folder)[: -self.keep]:
                self._remove(older)

        with self._all_or_nothing(temporary):
            self._together(lambda: self._begin(temporary) if rank() == 0 else None)
            files = self._together(write_tensor_file)
            self._together(lambda: finish(files) if rank() == 0 else None)
        return path

    def _begin(self, temporary: Path) -> None:
        self._remove_leftovers()
        temporary.mkdir(parents=True)

    @staticmethod
    def _together(work: Callable[[], Any]) -> list[Any]:
        """Every process's result; if one fails, all do, so that none waits for the others for ever."""
        problem, result = "", None
        try:
            result = work()
        except OSError as error:
            problem = str(error)
        results = gathered((problem, result))
        problems = sorted({problem for problem, _ in results if problem})
        if problems:
            raise OSError("; ".join(problems))
        return [result for _, result in results]

    @contextlib.contextmanager
    def _all_or_nothing(self, temporary: Path) -> Iterator[None]:
        try:
            yield
        except OSError:
            barrier()
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    @staticmethod
    def _all(folder: Path) -> list[Path]:
        """Checkpoints of a folder, by step."""
        return sorted(path for path in folder.glob("step-*") if path.is_dir())

    def _remove(self, path: Path) -> None:
        """Renames before it deletes, so that no half of a checkpoint ever bears its name."""
        if path.exists():
            doomed = path.with_name(f".{path.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """What a torn write or a torn deletion left."""
        for path in (*self.folder.glob(".step-*"), *self.folder.glob("set-aside/*/.step-*")):
            shutil.rmtree(path, ignore_errors=True)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where plain data differs, as `key: there -> here`, mappings entered."""
    found = []
    for key in dict.fromkeys([*there, *here]):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} there, {new} here")
    return found


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file.fileno())


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)
