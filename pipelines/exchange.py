"""What machines hand each other by DVC's default remote: outputs, and the run cache entries of single cells.

A run cache entry is what dvc.lock says of a stage, stored under a hash of all that the stage depends on. DVC's own
`--run-cache` copies all entries each time, which at N cells are N times N; here only those that are asked for travel.
Where two machines have run one cell, its stages' entries are taken from one of them: the one that came furthest.

`python -m pipelines.exchange` works in the current folder, as DVC does; the functions above `main` start it.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from molf.config import PARAMS, read_yaml
from molf.paths import read_json
from pipelines.checkout import Place
from pipelines.commands import stream
from pipelines.graph import Job

THREADS = 16  # that ask the remote at once; each waits for its answers nearly all the time


def _call(place: Place, show: Callable[[str], object], *arguments: str, log: Path | None = None, held: Any = ()) -> Any:
    """Runs this file in a place; returns what it answers on its last line."""

    def tell(line: str) -> None:
        if not line.startswith("["):
            show(line)

    command = [sys.executable, "-m", "pipelines.exchange", *arguments]
    return json.loads(stream(command, place.root, tell, place.environment(), log, held).splitlines()[-1])


def offer(place: Place, jobs: Sequence[Job], kept: Iterable[str], show: Callable[[str], object]) -> None:
    """Sends the remote what cells are made from: data, models, and outputs of their stages that are up to date."""
    _call(place, show, "offer", *map(_spec, jobs), "--kept", *kept)


def find(place: Place, jobs: Sequence[Job], kept: Iterable[str], show: Callable[[str], object]) -> set[str]:
    """Looks which stages of cells any machine has finished, and writes those into dvc.lock; their outputs stay away.

    Args:
        place: Where dvc.lock is; the stages before the cells are up to date in it.
        jobs: The cells.
        kept: Stages that are up to date here.
        show: Takes lines that are printed.

    Returns:
        The finished stages' names, those kept included.
    """
    return set(_call(place, show, "find", *map(_spec, jobs), "--kept", *kept))


def bring(place: Place, stages: Sequence[str], below: Path, show: Callable[[str], object]) -> None:
    """Brings the outputs of stages that lie below a folder, by what dvc.lock says of them."""
    _call(place, show, "bring", *stages, "--below", str(below))


def take(place: Place, job: Job, show: Callable[[str], object], log: Path, held: Sequence[int]) -> set[str]:
    """Brings what a cell needs, unless another machine has finished it; returns the stages that need not run."""
    return set(_call(place, show, "take", _spec(job), log=log, held=held))


def send(place: Place, stage: str, show: Callable[[str], object], log: Path, held: Sequence[int]) -> None:
    """Sends a stage's outputs, and only then its run cache entry, by which others find them."""
    _call(place, show, "send", stage, log=log, held=held)


def _spec(job: Job) -> str:
    return ",".join(job.stages)


class Traffic:
    """The DVC project in the current folder, and its default remote."""

    def __init__(self) -> None:
        from dvc.dependency import ParamsDependency
        from dvc.repo import Repo
        from dvc.stage import PipelineStage

        self.repo = Repo()
        self.odb = self.repo.cloud.get_remote_odb(None, "fetch --run-cache", hash_name="md5-dos2unix")
        self.files_odb = self.repo.cloud.get_remote_odb(None, "fetch", hash_name="md5")
        self.stages = {stage.name: stage for stage in self.repo.index.stages if isinstance(stage, PipelineStage)}
        self.made = {out.def_path: out for stage in self.stages.values() for out in stage.outs}
        self.of_values = ParamsDependency  # the kind of dependency that is on values of a file
        self.files: dict[str, Any] = {}  # dependencies that no stage makes, hashed
        self.hashing = threading.Lock()
        self.lock_path = Path(self.repo.root_dir, "dvc.lock")
        self.lock: Mapping[str, Any] = read_yaml(self.lock_path).get("stages", {}) if self.lock_path.exists() else {}
        self.params = read_yaml(Path(self.repo.root_dir, PARAMS))

    def needed(self, stages: Sequence[str], looked_into: bool = False) -> list[str]:
        """Outputs of stages outside the cell that the cell depends on.

        Args:
            stages: The cell's.
            looked_into: Only those of which it depends on a part: a file of a folder, or values of a file.
        """
        loaded = [self.stages[name] for name in stages]
        own = {out.def_path for stage in loaded for out in stage.outs}
        found = set()
        for dep in (dep for stage in loaded for dep in stage.deps):
            whole = dep.def_path in self.made and not isinstance(dep, self.of_values)
            if not (whole and looked_into):
                found |= {str(path) for path in (Path(dep.def_path), *Path(dep.def_path).parents)}
        return sorted(path for path in found if path in self.made and path not in own)

    def chain(self, stages: Sequence[str], kept: Iterable[str]) -> dict[str, Any]:
        """The longest row of a cell's stages, from the first on, that one machine has finished, with their entries."""
        return self._chain(list(stages), set(kept), {})

    def _chain(self, stages: list[str], kept: set[str], made: Mapping[str, Any]) -> dict[str, Any]:
        if not stages:
            return {}
        name, *later = stages
        stage = self.stages[name]
        for dep in stage.deps:
            if isinstance(dep, self.of_values):
                file = Path(self.repo.root_dir, dep.def_path)
                values = self.params if dep.def_path == str(PARAMS) else read_json(file)
                dep.fill_values({key: _value(values, key) for key in dep.params})
            else:
                like = made.get(dep.def_path) or self.made.get(dep.def_path) or self._file(dep)
                dep.meta, dep.hash_name, dep.hash_info = like.meta, like.hash_name, like.hash_info
        best: dict[str, Any] = {}
        for entry in self._entries(stage, name in kept):
            outs = {out.def_path: out for out in self.repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs}
            found = {name: entry, **self._chain(later, kept, {**made, **outs})}
            if len(found) > len(best):
                best = found
        return best

    def _file(self, dep: Any) -> Any:
        """A dependency that lies in the checkout, hashed."""
        with self.hashing:
            if dep.def_path not in self.files:
                dep.save()
                self.files[dep.def_path] = dep
        return self.files[dep.def_path]

    def _entries(self, stage: Any, kept: bool) -> Iterable[Any]:
        """Entries of a stage whose dependencies are known: dvc.lock's own, then the remote's, always in one order."""
        from dvc.schema import COMPILED_LOCK_FILE_STAGE_SCHEMA
        from dvc.stage.cache import _get_cache_hash
        from dvc.stage.serialize import to_single_stage_lockfile
        from dvc.utils.serialize import parse_yaml

        key = _get_cache_hash(to_single_stage_lockfile(stage), key=True)
        own = self.lock.get(stage.name)
        if kept and own is not None and _get_cache_hash(dict(own), key=True) == key:
            yield own
        fs = self.odb.fs
        folder = self._folder(key)
        try:
            paths = sorted(fs.find(folder))
        except FileNotFoundError:
            return
        for path in paths:
            with fs.open(path, "r", encoding="utf-8") as file:
                entry = COMPILED_LOCK_FILE_STAGE_SCHEMA(parse_yaml(file.read(), path))
            if fs.name(path) != _get_cache_hash(dict(entry)) or _get_cache_hash(dict(entry), key=True) != key:
                continue
            if all(
                self.files_odb.exists(out["md5"]) for out in entry.get("outs", [])
            ):  # entries outlive what they name
                yield entry

    def _folder(self, key: str) -> str:
        return str(self.odb.fs.join(self.odb.path, "runs", key[:2], key))

    def write(self, entries: Mapping[str, Any]) -> None:
        """Writes entries into dvc.lock."""
        from dvc.utils.serialize import modify_yaml

        if all(self.lock.get(name) == entry for name, entry in entries.items()):
            return
        with self.repo.lock, modify_yaml(str(self.lock_path)) as data:
            data.setdefault("schema", "2.0")
            data.setdefault("stages", {}).update(entries)
        self.repo._reset()

    def outputs(self, stages: Sequence[str], below: Path = Path()) -> list[str]:
        found = [out.def_path for name in stages for out in self.stages[name].outs]
        return [path for path in found if Path(path).is_relative_to(below)]

    def pull(self, paths: Sequence[str]) -> None:
        if paths:
            self.repo.pull(targets=list(paths))

    def put(self, name: str) -> None:
        """Sends a stage's outputs, then its entry."""
        from dvc.stage.cache import _get_cache_hash
        from dvc.utils.serialize import dumps_yaml

        self.repo.push(targets=[name])
        entry = self.lock[name]
        key, value = _get_cache_hash(dict(entry), key=True), _get_cache_hash(dict(entry))
        fs = self.odb.fs
        path = fs.join(self._folder(key), value)
        if not fs.exists(path):
            fs.makedirs(self._folder(key), exist_ok=True)
            fs.pipe_file(path, dumps_yaml(entry).encode())


def _value(params: Any, dotted: str) -> Any:
    """A value of params.yaml by its key with dots."""
    for key in dotted.split("."):
        params = params[key]
    return params


def _find(traffic: Traffic, jobs: Sequence[Sequence[str]], kept: Sequence[str]) -> dict[str, Any]:
    with ThreadPoolExecutor(THREADS) as threads:
        chains = list(threads.map(lambda stages: traffic.chain(stages, kept), jobs))
    found = {name: entry for chain in chains for name, entry in chain.items()}
    traffic.write(found)
    return found


def _take(traffic: Traffic, stages: Sequence[str]) -> list[str]:
    from dvc.exceptions import DvcException

    traffic.pull(traffic.needed(stages, looked_into=True))  # whose parts tell which entries are the cell's
    found = list(_find(traffic, [stages], stages))
    if len(found) == len(stages):
        return found
    try:
        traffic.pull(traffic.outputs(found))
    except DvcException as error:  # the remote has lost them, or never had them
        print(f"{', '.join(found)} must run again: {error}", flush=True)
        found = []
    traffic.pull(traffic.needed(stages))
    return found


def main() -> None:
    """Does one thing and answers in JSON on the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["offer", "find", "bring", "take", "send"])
    parser.add_argument("names", nargs="*", help="stages; of one cell joined by commas")
    parser.add_argument("--kept", nargs="*", default=[])
    parser.add_argument("--below", type=Path, default=Path())
    options = parser.parse_args()
    traffic = Traffic()
    jobs = [name.split(",") for name in options.names]
    answer: list[str] = []
    if options.what == "offer":
        paths = sorted({path for stages in jobs for path in traffic.needed(stages)})
        traffic.repo.push(targets=[*paths, *options.kept])
    elif options.what == "find":
        answer = list(_find(traffic, jobs, options.kept))
    elif options.what == "bring":
        traffic.pull(traffic.outputs(options.names, options.below))
    elif options.what == "take":
        answer = _take(traffic, jobs[0])
    else:
        traffic.put(options.names[0])
    print(json.dumps(answer), flush=True)
    os._exit(0)  # what the libraries would still do takes longer than all before


if __name__ == "__main__":
    main()
