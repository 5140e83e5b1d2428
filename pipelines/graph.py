"""What DVC's graph says of a grid: the stages before its cells, the cells, and what comes after them."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from molf.config import PARAMS, read_yaml
from molf.paths import BASE_METHOD, Cell

_REFERENCE = re.compile(r"\$\{(\w+)\.(\w+)\}")


@dataclass(frozen=True)
class Job:
    """Stages that belong to one cell and run one after another: its training and its evaluation."""

    key: str  # a folder's name; the values joined by dots, which no name in params.yaml holds
    values: tuple[str | int, ...]  # of the axes
    narrowed: tuple[tuple[str, str, str | int], ...]  # block, key and the one value that it has here
    stages: tuple[str, ...]

    @property
    def cell(self) -> Cell:
        """As results/ has it; one without method and seed is the untrained model."""
        model, task, *rest = self.values
        method, seed = rest or (BASE_METHOD, 0)
        return Cell(str(model), str(task), str(method), int(seed))


@dataclass(frozen=True)
class Graph:
    """A comparison's stages by name."""

    needs: Mapping[str, frozenset[str]]  # of each stage: all that comes before it, near and far
    before: tuple[str, ...]  # stages that cells need, each after what it needs
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
    needs: dict[str, frozenset[str]] = {}
    for name in order:
        needs[name] = frozenset(direct[name]).union(*(needs[other] for other in direct[name]))
    of_cell = _of_cells(read_yaml(root / "dvc.yaml")["stages"], read_yaml(root / PARAMS))
    jobs: dict[str, Job] = {}
    for name in (name for name in order if name in of_cell):
        key, values, narrowed = of_cell[name]
        earlier = jobs[key].stages if key in jobs else ()
        jobs[key] = Job(key, values, narrowed, (*earlier, name))
    rest = [name for name in order if name not in of_cell]
    after = tuple(name for name in rest if not needs[name].isdisjoint(of_cell))
    return Graph(needs, tuple(name for name in rest if name not in after), tuple(jobs.values()), after)


def _of_cells(
    stages: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, tuple[str, tuple[str | int, ...], tuple[tuple[str, str, str | int], ...]]]:
    """Every stage that a `matrix` makes: its job's key, its values, and which lists of params.yaml hold them."""
    found = {}
    for name, stage in stages.items():
        axes = [match.groups() for axis in stage.get("matrix", {}).values() if (match := _REFERENCE.fullmatch(axis))]
        if not axes:
            continue
        for values in itertools.product(*(params[block][key] for block, key in axes)):
            narrowed = tuple((block, key, value) for (block, key), value in zip(axes, values, strict=True))
            found[f"{name}@{'-'.join(map(str, values))}"] = (".".join(map(str, values)), tuple(values), narrowed)
    return found
