"""What DVC's graph says of a grid: the stages before its cells, the cells, and what comes after them."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from molf.config import PARAMS, read_yaml
from molf.paths import BASE_METHOD, Cell, Trial

_REFERENCE = re.compile(r"\$\{(\w+)\.(\w+)\}")
_BLOCKS = ("models", "tasks", "methods", "seeds")  # whose values name a cell; those of another list go by its name


@dataclass(frozen=True)
class Job:
    """Stages that belong to one cell, or to one trial of a sweep, and run one after another."""

    key: str  # a folder's name; the values joined by dots, which no name in params.yaml holds
    values: tuple[str | int | float, ...]  # of the axes
    narrowed: tuple[tuple[str, str, str | int | float], ...]  # block, key and the one value that it has here
    stages: tuple[str, ...]

    @property
    def cell(self) -> Cell:
        """As results/ has it; one without method and seed is the untrained model."""
        model, task, *rest = self.values
        method, seed = rest or (BASE_METHOD, 0)
        return Cell(str(model), str(task), str(method), int(seed))

    @property
    def trial(self) -> Trial | None:
        """As sweeps/ has it; None of a cell."""
        if not any(key == "tune" for _, key, _ in self.narrowed):
            return None
        model, task, method, factor = self.values
        return Trial(str(model), str(task), str(method), factor)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return (self.trial or self.cell).name

    @property
    def results(self) -> Path:
        """Folder of what a comparison needs of it."""
        return (self.trial or self.cell).results

    def of_method(self, trial: "Job") -> bool:
        """Whether it is of a trial's model, task and method."""
        return self.values[:3] == trial.values[:3]


@dataclass(frozen=True)
class Graph:
    """A comparison's stages by name."""

    needs: Mapping[str, frozenset[str]]  # of each stage: all that comes before it, near and far; to `choose`, of a cell
    before: tuple[str, ...]  # stages that cells need, each after what it needs
    trials: tuple[Job, ...]  # of sweeps
    choose: tuple[str, ...]  # stages that need trials, and that cells need; none where there is no trial
    jobs: tuple[Job, ...]
    after: tuple[str, ...]  # stages that need cells


def read(root: Path, dot: str) -> Graph:
    """Sorts the stages of DVC's graph by what of them is the grid's.

    Args:
        root: Folder of dvc.yaml and params.yaml.
        dot: What `dvc dag --dot` prints: a line `"name";` for a stage, `"from" -> "to";` for a dependency.
    """
    direct: dict[str, set[str]] = {}
    for names in (re.findall(r'"([^"]+)"', line) for line in dot.splitlines()):
        if names:
            direct.setdefault(names[-1], set()).update(names[:-1])
            for name in names[:-1]:
                direct.setdefault(name, set())
    order = list(TopologicalSorter(direct).static_order())
    of_cell = _of_cells(read_yaml(root / "dvc.yaml")["stages"], read_yaml(root / PARAMS))
    late: set[str] = set()  # what needs a cell or a trial, near or far
    for name in order:
        if any(other in of_cell or other in late for other in direct[name]):
            late.add(name)
    by_cells, tried = _behind(of_cell, direct, order), set[str]()
    choose = [name for name in order if name in late and name not in of_cell and name in by_cells]
    if choose:
        tried = _behind(choose, direct, order)
    needs: dict[str, frozenset[str]] = {}
    for name in order:
        # Not through `choose`: of 10,000 cells each would name all trials.
        further = (needs[other] for other in direct[name] if other not in choose)
        needs[name] = frozenset(direct[name]).union(*further)
    jobs: dict[str, Job] = {}  # of cells and of trials
    for name in (name for name in order if name in of_cell):
        key, values, narrowed = of_cell[name]
        earlier = jobs[key].stages if key in jobs else ()
        jobs[key] = Job(key, values, narrowed, (*earlier, name))
    rest = [name for name in order if name not in of_cell]
    return Graph(
        needs,
        before=tuple(name for name in rest if name not in late),
        trials=tuple(job for job in jobs.values() if not tried.isdisjoint(job.stages)),
        choose=tuple(choose),
        jobs=tuple(job for job in jobs.values() if tried.isdisjoint(job.stages)),
        after=tuple(name for name in rest if name in late and name not in choose),
    )


def _behind(names: Iterable[str], direct: Mapping[str, set[str]], order: Sequence[str]) -> set[str]:
    """All that some stages need, near and far."""
    found: set[str] = set()
    wanted = set(names)
    for name in reversed(order):
        if name in wanted or name in found:
            found |= direct[name]
    return found


def _of_cells(
    stages: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, tuple[str, tuple[str | int | float, ...], tuple[tuple[str, str, str | int | float], ...]]]:
    """Every stage that a `matrix` makes: its job's key, its values, and which lists of params.yaml hold them."""
    found = {}
    for name, stage in stages.items():
        axes = [match.groups() for axis in stage.get("matrix", {}).values() if (match := _REFERENCE.fullmatch(axis))]
        if not axes:
            continue
        for values in itertools.product(*(params[block][key] for block, key in axes)):
            narrowed = tuple((block, key, value) for (block, key), value in zip(axes, values, strict=True))
            key = ".".join(str(value) if axis in _BLOCKS else f"{axis}-{value}" for _, axis, value in narrowed)
            found[f"{name}@{'-'.join(map(str, values))}"] = (key, tuple(values), narrowed)
    return found
