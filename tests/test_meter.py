"""The energy of a training and the load that others were, over counters and processes that a test wrote."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from molf.meter import OFTEN, Counter, Device, Meter, Totals, gpu, here, packages

TICK = os.sysconf("SC_CLK_TCK")
RANGE = 262_143_328_850  # microjoules, of a real machine


class Machine:
    """A fake /proc, powercap tree and clock."""

    def __init__(self, folder: Path, cores: int = 4) -> None:
        self.proc, self.powercap, self.cores = folder / "proc", folder / "powercap", cores
        self.now, self.own, self.others, self.child, self.stolen = 1000.0, 50.0, 70.0, 20.0, 0.0
        self.proc.mkdir(parents=True)
        self.powercap.mkdir()
        self.pass_time(0)

    def pass_time(self, seconds: float, own: float = 0, others: float = 0, child: float = 0, stolen: float = 0) -> None:
        """Some seconds in which this process, a child of it, others and the hypervisor had so much CPU time."""
        self.now, self.own, self.others = self.now + seconds, self.own + own, self.others + others
        self.child, self.stolen = self.child + child, self.stolen + stolen
        busy = self.own + self.others + self.child
        idle = self.cores * self.now - busy - self.stolen
        states = [busy / 2, busy / 4, busy / 8, idle * 0.9, idle * 0.1, busy / 16, busy / 16, self.stolen, busy, 0]
        line = " ".join(str(round(TICK * state)) for state in states)
        cores = "".join(f"cpu{i} 1 2 3 4 5 6 7 8 9 0\n" for i in range(self.cores))
        (self.proc / "stat").write_text(f"cpu  {line}\n{cores}intr 1 2\nbtime 3\n")
        self.process(os.getpid(), 1, self.own)
        self.process(7, os.getpid(), self.child / 2, name="odd) R 9 (name")
        self.process(8, 7, self.child / 2)
        self.process(9, 1, self.others)

    def process(self, pid: int, parent: int, seconds: float, name: str = "python") -> None:
        folder = self.proc / str(pid)
        folder.mkdir(exist_ok=True)
        times = " ".join(str(round(TICK * seconds / 4)) for _ in range(4))  # user, system, and the same of the ended
        (folder / "stat").write_text(f"{pid} ({name}) S {parent} 1 1 0 -1 0 0 0 0 0 {times} 20 0 1 0 5 6 7\n")

    def zone(self, folder: str, name: str, microjoules: int) -> None:
        path = self.powercap / folder
        path.mkdir(exist_ok=True)
        (path / "name").write_text(f"{name}\n")
        (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
        (path / "energy_uj").write_text(f"{microjoules}\n")

    def meter(self, device: Device | None = None) -> Meter:
        return Meter(packages(self.powercap) if device is None else device, self.proc, lambda: self.now)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_energy_of_all_packages_and_of_nothing_twice(machine: Machine) -> None:
    before = {"intel-rapl:0": ("package-0", 5_000_000), "intel-rapl:1": ("package-1", 7_000_000)}
    parts = {
        "intel-rapl:0:0": ("core", 1),
        "intel-rapl:2": ("psys", 2),
        "intel-rapl-mmio:0": ("package-0", 3),
        "dtpm": ("package-0", 4),
    }
    for folder, (name, value) in (before | parts).items():
        machine.zone(folder, name, value)
    meter = machine.meter()
    meter.start()
    machine.pass_time(10)
    machine.zone("intel-rapl:0", "package-0", 6_500_000)
    machine.zone("intel-rapl:1", "package-1", 9_000_000)
    for folder, (name, _) in parts.items():
        machine.zone(folder, name, 900_000_000)
    meter.stop()
    found = meter.totals().summary()
    assert found["energy_joules"] == pytest.approx(1.5 + 2.0) and found["energy_source"] == "CPU packages (RAPL)"


def test_a_counter_may_wrap_between_two_looks(machine: Machine) -> None:
    """Three times here, each seen; and each look has the time that no two come in one."""
    machine.zone("intel-rapl:0", "package-0", RANGE - 1_000_000)
    meter = machine.meter()
    meter.start()
    for _ in range(3):
        for value in (2_000_000, RANGE - 1_000_000):
            machine.pass_time(OFTEN)
            machine.zone("intel-rapl:0", "package-0", value)
            meter.look()
        machine.pass_time(OFTEN / 10)
        machine.zone("intel-rapl:0", "package-0", 5)  # not looked at so soon
        meter.look()
    machine.zone("intel-rapl:0", "package-0", 2_000_000)
    meter.stop()
    assert meter.totals().joules == pytest.approx(3 * RANGE / 1e6 + 3.0)


def test_without_counters_that_tell_there_is_no_energy(machine: Machine, tmp_path: Path) -> None:
    nothing = {"energy_joules": None, "energy_source": None}

    def found(device: Device | None = None, during: Callable[[], object] = lambda: None) -> dict[str, object]:
        meter = machine.meter(device)
        meter.start()
        during()
        machine.pass_time(1)
        meter.stop()
        return {key: meter.totals().summary()[key] for key in nothing}

    assert found(packages(tmp_path / "none")) == nothing
    machine.zone("intel-rapl:0", "package-0", 5)
    assert found() == nothing  # it stands still
    machine.zone("intel-rapl:1", "package-1", 5)
    energy = machine.powercap / "intel-rapl:1/energy_uj"
    assert found(during=energy.unlink) == nothing
    energy.mkdir()  # what cannot be read, by root neither
    assert packages(machine.powercap) == Device()
    backwards = iter([10, 5])
    assert found(Device([Counter(lambda: next(backwards), 1.0)], "set back")) == nothing


@pytest.mark.parametrize(
    ("own", "child", "others", "stolen", "load", "contended"),
    [
        (30, 5, 0, 0, 0.0, False),
        (30, 0, 3, 0, 0.3, False),
        (30, 0, 5, 0, 0.5, True),  # 0.5 of 4 cores, over a tenth
        (10, 20, 4, 4, 0.8, True),
        (0, 0, 40, 0, 4.0, True),
        (30.2, 0, -0.2, 0, 0.0, False),  # counted at unlike moments
    ],
)
def test_the_load_is_what_others_had(
    machine: Machine, own: float, child: float, others: float, stolen: float, load: float, contended: bool
) -> None:
    meter = machine.meter()
    meter.start()
    machine.pass_time(10, own, others, child, stolen)
    meter.stop()
    found = meter.totals().summary()
    assert found["other_load"] == pytest.approx(load, abs=0.01) and found["contended"] is contended


def test_hosts_that_train_together_are_added_up() -> None:
    """Each measured all of its machine in each of its two processes, which have the energy and the load in common."""

    def process(busy: float, own: float, joules: float | None, **more: Any) -> Totals:
        return Totals(10.0, 40.0, busy, own, joules, "RAPL", **more)

    one, other = [process(36, 16, 50.0), process(36, 20, 50.0)], [process(33, 15, 70.0), process(33, 15, 70.0)]
    both = Totals.across([Totals.beside(one, each=False), Totals.beside(other, each=False)])
    assert both == Totals(10.0, 80.0, 69.0, 66.0, 120.0, "RAPL")
    found = both.summary()
    assert (found["energy_joules"], found["contended"]) == (120.0, False)
    assert found["other_load"] == pytest.approx(0.3)
    other[0] = process(53, 15, None, shared=True)  # somebody computes on the second host
    both = Totals.across([Totals.beside(one, each=True), Totals.beside(other, each=True)])
    assert (both.joules, both.shared, both.summary()["contended"]) == (None, True, True)
    alone = process(36, 16, 50.0)
    assert Totals.across([Totals.beside([alone], each=True)]) == alone


def test_what_is_not_of_this_machine_tells_nothing(machine: Machine, tmp_path: Path) -> None:
    def found(during: Callable[[], object], proc: Path = machine.proc) -> tuple[object, object]:
        meter = Meter(Device(), proc, lambda: machine.now)
        meter.start()
        during()
        meter.stop()
        summary = meter.totals().summary()
        return summary["other_load"], summary["contended"]

    def stand_still() -> None:
        machine.now += 10

    def more_than_the_machine() -> None:
        machine.pass_time(10, own=1)
        machine.process(os.getpid(), 1, machine.own + 20)

    assert found(lambda: machine.pass_time(10)) == (0.0, False)
    assert found(stand_still) == (None, None)
    machine.pass_time(0)
    assert found(more_than_the_machine) == (None, None)
    assert found(lambda: None, tmp_path / "none") == (None, None)
    (machine.proc / "stat").write_text("cpu  0 0\n")
    assert found(stand_still) == (None, None)


def test_what_lies_between_stretches_does_not_count_and_a_resumed_training_adds_up(machine: Machine) -> None:
    def stretch(meter: Meter, seconds: float, others: float) -> None:
        meter.start()
        machine.pass_time(seconds, own=seconds, others=others)
        machine.zone("intel-rapl:0", "package-0", int(1e6 * machine.now))  # a watt
        meter.stop()

    machine.zone("intel-rapl:0", "package-0", int(1e6 * machine.now))
    first = machine.meter()
    stretch(first, 10, others=1)
    machine.pass_time(100, others=100)
    machine.zone("intel-rapl:0", "package-0", int(1e6 * machine.now))
    stretch(first, 10, others=3)
    state = first.state_dict()
    stretch(first, 50, others=0)  # which a kill lost
    second = machine.meter()
    second.load_state_dict(state)
    stretch(second, 20, others=2)
    totals, found = second.totals(), second.totals().summary()
    assert totals.seconds == pytest.approx(40)
    assert found["energy_joules"] == pytest.approx(40) and found["other_load"] == pytest.approx(6 / 40, abs=0.01)
    elsewhere = machine.meter(Device())
    elsewhere.load_state_dict(second.state_dict())
    stretch(elsewhere, 10, others=0)
    assert elsewhere.totals().summary()["energy_joules"] is None  # of a part only
    assert elsewhere.totals().summary()["other_load"] == pytest.approx(6 / 50, abs=0.01)
    assert (Totals(joules=1.0, source="one") + Totals(joules=1.0, source="another")).summary()["energy_source"] is None


@pytest.mark.parametrize(
    ("seen", "contended"), [([0, 0], False), ([0, 1], True), ([1, None], True), ([0, None], None), ([None, None], None)]
)
def test_another_process_on_the_gpu_is_contention(
    machine: Machine, seen: Sequence[int | None], contended: bool | None
) -> None:
    said = iter(seen)
    energy = iter([1000, 4000])
    meter = machine.meter(Device([Counter(lambda: next(energy), 1e-3)], "GPU (NVML)", lambda: next(said)))
    meter.start()
    machine.pass_time(10, own=10)
    meter.stop()
    found = meter.totals().summary()
    assert found["contended"] is contended and found["other_load"] == pytest.approx(0, abs=0.01)
    assert (found["energy_joules"], found["energy_source"]) == (pytest.approx(3.0), "GPU (NVML)")


def test_processes_that_train_together_are_not_each_other_s_load() -> None:
    """Two with 30 seconds each of 60 that the machine was busy; their GPUs' energy adds up, the packages' does not."""
    one = Totals(40, 80, 60, 30, 5.0, "s", False)
    both = Totals.beside([one, one], each=False)
    assert both == Totals(40, 80, 60, 60, 5.0, "s", False) and both.summary()["contended"] is False
    assert Totals.beside([one, one], each=True).joules == 10.0
    assert Totals.beside([one, Totals(40, 80, 60, 30, 5.0, "s", True)], each=True).shared is True
    assert Totals.beside([one], each=True) == one


class Nvml(ModuleType):
    """Stands in for NVIDIA's library: a GPU with a counter of 2 J more at each reading, and some processes on it."""

    class NVMLError(Exception):
        pass

    def __init__(self, lacks: str = "", processes: int = 1) -> None:
        super().__init__("pynvml")
        self.lacks, self.processes, self.energy = lacks, processes, 0

    def had(self, what: str) -> None:
        if what == self.lacks:
            raise Nvml.NVMLError(f"no {what}")

    def nvmlInit(self) -> None:
        self.had("driver")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-12ab"
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.had("counter")
        self.energy += 2000
        return self.energy

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[int]:
        self.had("processes")
        return list(range(self.processes))


@pytest.mark.parametrize(
    ("nvml", "joules", "contended"),
    [
        (Nvml(), 2.0, False),
        (Nvml(processes=3), 2.0, True),
        (Nvml(processes=0), 2.0, False),  # seen from a container
        (Nvml("counter"), None, False),
        (Nvml("processes"), 2.0, None),
        (Nvml("driver"), None, None),
        (None, None, None),  # not installed
    ],
)
def test_what_a_gpu_s_driver_tells(
    nvml: Nvml | None, joules: float | None, contended: bool | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    machine.zone("intel-rapl:0", "package-0", 5)
    meter = machine.meter(gpu("12ab"))
    meter.start()
    machine.pass_time(10, own=10)
    machine.zone("intel-rapl:0", "package-0", 9_000_000)  # which is not the GPU's
    meter.stop()
    found = meter.totals().summary()
    assert (found["energy_joules"], found["contended"]) == (joules, contended)
    assert found["energy_source"] == ("GPU (NVML)" if joules else None)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the kernel tells of no processes")
def test_a_busy_neighbour_shows_and_one_s_own_child_does_not() -> None:
    """The real kernel's numbers: a child that spins adds to what is our own."""
    meter = here()
    meter.start()
    spin = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-I", "-S", "-c", spin], check=True)
    time.sleep(0.1)
    meter.stop()
    totals = meter.totals()
    assert totals.own is not None and 0.4 < totals.own < 1.5
    assert totals.busy is None or totals.busy > totals.own - 0.2
