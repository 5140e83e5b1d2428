"""How things are compared: side by side in one process, pair by pair, and what a case hands back."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.device import Device

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
Unit = Literal["s", "B", "tokens/s"]


class Skipped(Exception):
    """A case that cannot run here, and why."""


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    device: Device
    threads: int  # of this process and of each child
    rounds: int  # pairs a comparison; also fresh processes a side, at most MEMORY_ROUNDS
    quick: bool  # tiny sizes: shows that a case works, says nothing about speed
    gemma: Path | None  # folder of Gemma 3 270M as a transformers checkpoint
    shared: Path  # folder with the real rows


# A peak hardly moves from process to process.
MEMORY_ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """One line of the table: what, against what, a sample of each in every round, and what their ratio must reach."""

    what: str
    against: str
    unit: Unit
    samples: list[float]
    reference: list[float]  # as many, each taken right beside its counterpart
    limit: float | None = None  # None: reported only
    at_least: bool = False  # the ratio must reach the limit from above, not from below

    @property
    def ratios(self) -> list[float]:
        """samples / reference, pair by pair."""
        return [a / b for a, b in zip(self.samples, self.reference, strict=True)]

    @property
    def ratio(self) -> float:
        """The median pair's."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the median ratio reaches the limit; None where there is none."""
        if self.limit is None:
            return None
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit

    def as_json(self) -> dict[str, Any]:
        """All samples and what the table says of them."""
        return {
            "what": self.what,
            "against": self.against,
            "unit": self.unit,
            "samples": self.samples,
            "reference": self.reference,
            "ratio": {"median": self.ratio, "min": min(self.ratios), "max": max(self.ratios)},
            "limit": self.limit,
            "at_least": self.at_least,
            "met": self.met,
        }


@dataclass
class Result:
    """What a case hands back: rows of the table, lines to print below it, and figures for the file."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def side_by_side(
    sides: Mapping[str, Callable[[], object]],
    device: Device,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each side in every round, taken in turn: A B, B A, A B, ... so that a drift of the machine hits all.

    Args:
        sides: What to time, by name.
        device: Waited for before the clock is read.
        rounds: Samples of each side.
        warmup: Calls of each side that are not timed (compilation, caches, first allocations).
        clock: Of seconds.

    Returns:
        {side: seconds of each round}, in the order of the rounds.
    """
    for _ in range(warmup):
        for call in sides.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(timed(sides[name], device, clock))
        order.reverse()
    return seconds


def timed(call: Callable[[], object], device: Device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, the device's work included."""
    device.synchronize()
    started = clock()
    call()
    device.synchronize()
    return clock() - started


class Laps:
    """Adds up what the phases of a step take; called at the end of each phase with its name."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self.start()

    def start(self) -> None:
        self.device.synchronize()
        self._last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        self.device.synchronize()
        now = time.perf_counter()
        self.seconds.setdefault(phase, []).append(now - self._last)
        self._last = now

    def medians(self) -> dict[str, float]:
        """Seconds of each phase."""
        return {phase: statistics.median(values) for phase, values in self.seconds.items()}


def run_child(command: list[str], threads: int) -> Any:
    """Runs a module of this folder in a fresh process and reads the JSON of its last line.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
