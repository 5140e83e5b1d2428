"""What a training takes from the machine beside its time: the energy, and how busy other processes kept the cores.

Energy is the GPU's own counter (NVML) where a GPU trains, else the CPU packages' (Linux's powercap, which AMD's and
Intel's RAPL counters both appear in); a CPU's energy never stands for a GPU's. Both count all that ran on the device.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from molf import collective

POWERCAP = Path("/sys/class/powercap")
PROC = Path("/proc")
# Share of the machine's cores that others may keep busy before times compare with no other cell's. A training that uses
# all cores may take a tenth longer then, as much as methods differ by; a quiet machine's own services stay far below.
CONTENDED = 0.1
PLAUSIBLE = 0.2  # by how much of the clock's time the kernel's counters may miss it
TICKS = 0.1  # seconds of a core by which short stretches may, since the kernel counts in hundredths
OFTEN = 5.0  # seconds between two looks at counters that wrap, after some minutes at the soonest


@dataclass
class Counter:
    """A counter of energy that only rises, but for its wraps.

    Attributes:
        read: Its value; OSError or ValueError where that cannot be had any more.
        joules: Of one unit.
        range: Where it begins anew; None: never.
    """

    read: Callable[[], int]
    joules: float
    range: int | None = None

    def since(self, before: int, now: int) -> float | None:
        """Joules between two readings with at most one wrap between; None where it was set back."""
        units = now - before
        if units < 0 and self.range is not None:
            units += self.range
        return units * self.joules if units >= 0 else None


@dataclass
class Device:
    """What can be measured of what computes.

    Attributes:
        counters: Of its energy; none where it has none that may be read.
        source: Their name.
        others: How many other processes compute on it; None where there are only the cores.
    """

    counters: Sequence[Counter] = ()
    source: str | None = None
    others: Callable[[], int | None] | None = None


@dataclass
class Totals:
    """Of one or more stretches of training, in one or more processes; None: not known of all of them.

    Attributes:
        seconds: On the wall's clock.
        core_seconds: That the machine had.
        busy: Of these, in which anything ran, or another virtual machine did.
        own: CPU seconds of the training's processes and what they started.
        joules: Energy.
        source: Of the energy; "" before any.
        shared: Whether another process computed on the GPU; False without one.
    """

    seconds: float = 0.0
    core_seconds: float = 0.0
    busy: float | None = 0.0
    own: float | None = 0.0
    joules: float | None = 0.0
    source: str | None = ""
    shared: bool | None = False

    def __add__(self, other: "Totals") -> "Totals":
        """One stretch after the other."""
        sources = {self.source, other.source} - {""}
        alike = len(sources) < 2
        return Totals(
            self.seconds + other.seconds,
            self.core_seconds + other.core_seconds,
            _sum(self.busy, other.busy),
            _sum(self.own, other.own),
            _sum(self.joules, other.joules) if alike else None,
            (sources or {""}).pop() if alike else None,
            True if self.shared or other.shared else None if None in (self.shared, other.shared) else False,
        )

    @staticmethod
    def beside(all_of_them: Sequence["Totals"], each: bool) -> "Totals":
        """Of processes that train together on one machine.

        Args:
            all_of_them: One for each process.
            each: Whether each has a device of its own; else all measured the same one.
        """
        first, rest = all_of_them[0], all_of_them[1:]
        own, joules, shared = first.own, first.joules, first.shared
        for other in rest:
            own = _sum(own, other.own)
            if each:
                joules = _sum(joules, other.joules)
                shared = (Totals(shared=shared) + Totals(shared=other.shared)).shared
        return Totals(first.seconds, first.core_seconds, first.busy, own, joules, first.source, shared)

    @staticmethod
    def across(machines: Sequence["Totals"]) -> "Totals":
        """Of machines that train together, during the same time."""
        total = machines[0]
        for other in machines[1:]:
            total = replace(total + other, seconds=total.seconds)
        return total

    def summary(self) -> dict[str, Any]:
        """energy_joules, energy_source, other_load (cores that others kept busy on average), contended."""
        # A counter that stands still is one that a virtual machine only shows.
        joules = self.joules or None
        load = contended = None
        if self.busy is not None and self.own is not None and self.seconds:
            others = self.busy - self.own
            if others >= -PLAUSIBLE * self.own - TICKS * self.core_seconds / self.seconds:
                load = max(0.0, others) / self.seconds
                contended = max(0.0, others) > CONTENDED * self.core_seconds
        if self.shared is not False:
            contended = contended or self.shared
        return {
            "energy_joules": joules,
            "energy_source": self.source or None if joules else None,
            "other_load": load,
            "contended": contended,
        }


@dataclass
class _Reading:
    at: float
    cores: int
    ticks: float | None  # seconds of all cores, idle ones too
    busy: float | None
    own: float | None


class Meter:
    """Measures stretches of a training, of which a resumed one has several; what lies between them does not count.

    Args:
        device: What is measured of it.
        proc: Where the kernel tells of processes.
        clock: Seconds on the wall's clock.
    """

    def __init__(self, device: Device, proc: Path = PROC, clock: Callable[[], float] = time.monotonic) -> None:
        self.device, self.proc, self.clock = device, proc, clock
        self.before = Totals()  # of the processes that this one goes on from
        self.mine = Totals(source=device.source if device.counters else None)
        if not device.counters:
            self.mine.joules = None
        self._reading: _Reading | None = None
        self._energy: list[int] = []

    def start(self) -> None:
        """Begins a stretch, in place of one that goes on."""
        self._reading, self._energy = self._read(), []
        self._use_energy()

    def look(self) -> None:
        """Between start and stop, often: no counter may wrap twice unseen."""
        if self._reading is not None and self.clock() - self._seen >= OFTEN:
            self._use_energy()

    def stop(self) -> None:
        """Ends the stretch; without one it does nothing."""
        before, self._reading = self._reading, None
        if before is None:
            return
        self._use_energy()
        now = self._read()
        seconds = now.at - before.at
        stretch = Totals(seconds, now.cores * seconds, busy=None, own=None, source="")
        ticks = _change(before.ticks, now.ticks)
        # Counters that do not keep up with the clock, or count other cores, are not of the machine that we run on.
        slack = PLAUSIBLE * stretch.core_seconds + TICKS * now.cores
        if ticks is not None and abs(ticks - stretch.core_seconds) <= slack:
            stretch.busy, stretch.own = _change(before.busy, now.busy), _change(before.own, now.own)
        self.mine += stretch

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, which is written outside a stretch; alike in all processes."""
        self.stop()
        return asdict(self.totals())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.before = Totals(**{field.name: state[field.name] for field in fields(Totals)})

    def totals(self) -> Totals:
        """Of all stretches that have ended, over all processes, which must ask together."""
        of_all = [Totals(**each) for each in collective.gathered(asdict(self.mine))]
        share = len(of_all) // collective.hosts()
        machines = [of_all[first : first + share] for first in range(0, len(of_all), share)]
        each = self.device.others is not None
        return self.before + Totals.across([Totals.beside(machine, each) for machine in machines])

    def _use_energy(self) -> None:
        """Counts the energy since the last look, and looks who else computes on the device."""
        self._seen = self.clock()
        try:
            now = [counter.read() for counter in self.device.counters]
        except (OSError, ValueError):
            now, self.mine.joules = [], None
        for counter, then, value in zip(self.device.counters, self._energy, now, strict=False):
            self.mine.joules = _sum(self.mine.joules, counter.since(then, value))
        self._energy = now
        if self.device.others is not None:
            others = self.device.others()
            self.mine = self.mine + Totals(shared=None if others is None else others > 0)

    def _read(self) -> _Reading:
        cores, ticks, busy = _machine(self.proc)
        return _Reading(self.clock(), cores, ticks, busy, _own(self.proc, os.getpid()))


def here() -> Meter:
    """A meter of the device that this process trains on."""
    import torch

    if torch.cuda.is_available():
        return Meter(gpu(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)))
    return Meter(packages())


def packages(powercap: Path = POWERCAP) -> Device:
    """The CPU packages, with those counters that may be read (often by root alone)."""
    found = []
    with suppress(OSError):
        # Parts of a package are `intel-rapl:0:1`; `psys` is the whole board, with the packages in it.
        zones = [zone for zone in powercap.iterdir() if re.fullmatch(r"intel-rapl:\d+", zone.name)]
        for zone in sorted(zones):
            if (zone / "name").read_text().startswith("package"):
                found.append(_zone(zone))
                found[-1].read()
        return Device(found, "CPU packages (RAPL)") if found else Device()
    return Device()  # one package of two would be half of the energy


def _zone(zone: Path) -> Counter:
    return Counter(
        lambda: int((zone / "energy_uj").read_text()), 1e-6, range=int((zone / "max_energy_range_uj").read_text())
    )


def gpu(uuid: str) -> Device:
    """A GPU by its UUID, with what its driver tells; the counter exists from Volta on."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except Exception:  # no library, no driver, another package of that name: then nothing is known
        return Device(others=lambda: None)

    def millijoules() -> int:
        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from None

    def others() -> int | None:
        try:
            # Ours is one of them, though seen from a container its number may be another.
            return max(0, len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) - 1)
        except pynvml.NVMLError:
            return None

    counters = []
    with suppress(OSError):
        millijoules()
        counters = [Counter(millijoules, 1e-3)]
    return Device(counters, "GPU (NVML)", others)


def _machine(proc: Path) -> tuple[int, float | None, float | None]:
    """Cores, and the seconds that they had together, and were busy, since the machine started.

    Time that a hypervisor gave to others is busy time: this machine did not have it.
    """
    try:
        lines = (proc / "stat").read_text().splitlines()
        # user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is in user's already.
        states = [int(field) / os.sysconf("SC_CLK_TCK") for field in lines[0].split()[1:9]]
        cores = sum(re.match(r"cpu\d", line) is not None for line in lines)
        return cores, sum(states), sum(states) - states[3] - states[4]
    except (OSError, ValueError, IndexError):
        return os.cpu_count() or 1, None, None


def _own(proc: Path, root: int) -> float | None:
    """CPU seconds of a process and all that it started, those included that have ended and were waited for."""
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    try:
        for entry in os.scandir(proc):
            if entry.name.isdigit():
                with suppress(OSError):  # it has ended meanwhile
                    # After the name, which may hold anything: state, parent, and from the 12th on the four times.
                    values = (proc / entry.name / "stat").read_text().rpartition(")")[2].split()
                    parents[int(entry.name)] = int(values[1])
                    spent[int(entry.name)] = sum(map(int, values[11:15])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    if root not in spent:
        return None
    children: dict[int, list[int]] = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    total, waiting = 0.0, [root]
    while waiting:
        one = waiting.pop()
        total += spent[one]
        waiting += children.get(one, [])
    return total


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _change(before: float | None, now: float | None) -> float | None:
    return None if before is None or now is None else now - before
