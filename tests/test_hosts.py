"""Two hosts train what one process trains, and end together: network namespaces where those may be made, else one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from molf import hosts, joining, memory
from molf.errors import PASSING, Passing, RunError, UserError
from molf.hosts import Group, Line
from pipelines.guard import descendants
from pipelines.tasks import NotSetUp, Slots
from tests.cells import run_cell
from tests.conftest import QUIET, ROOT
from tests.pipelines.conftest import free_port
from tests.test_processes import Stage, alive, require_close, whole

FACTS = {"code": "c", "versions": {"torch": "1", "torchao": None}, "gpus": 0}


# --- what is asked for ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (hosts.HOSTS, hosts.MEET, hosts.MINUTES):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, None),
        ({"MOLF_HOSTS": "1", "MOLF_MEET": "nonsense"}, None),
        ({"MOLF_HOSTS": "2", "MOLF_MEET": "h:29400"}, Group(2, "h", 29400, 10.0)),
        ({"MOLF_HOSTS": "16", "MOLF_MEET": "[fd00::1]:5", "MOLF_MEET_MINUTES": "0.5"}, Group(16, "fd00::1", 5, 0.5)),
        ({"MOLF_HOSTS": "two"}, "MOLF_HOSTS=two: a number of hosts is needed"),
        ({"MOLF_HOSTS": "2"}, "MOLF_MEET: ADDRESS:PORT is needed, .*; nothing was given"),
        ({"MOLF_HOSTS": "2", "MOLF_MEET": "h:99999"}, "; h:99999 was given"),
        ({"MOLF_HOSTS": "2", "MOLF_MEET": "h:1", "MOLF_MEET_MINUTES": "-1"}, "MOLF_MEET_MINUTES=-1: a number"),
    ],
)
def test_the_environment_names_the_group(
    given: dict[str, str], wanted: Group | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            hosts.asked()
    else:
        assert hosts.asked() == wanted


def test_a_host_has_an_even_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Group(2, "h", 1, 1).share(8) == 4
    with pytest.raises(UserError, match="training.processes: 3 cannot be shared out evenly among the 2 hosts"):
        Group(2, "h", 1, 1).share(3)
    monkeypatch.setenv("MOLF_HOSTS", "2")
    monkeypatch.setenv("MOLF_MEET", "h:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    slots = Slots.here(tmp_path, cpu=1)
    slots.check(8)
    with slots.hold(8, lambda: None) as (_, environment):
        assert environment == {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    with slots.hold(1, lambda: None) as (_, environment):  # a cell of one process is the head's alone
        assert environment == {"CUDA_VISIBLE_DEVICES": "0"}
    with pytest.raises(NotSetUp, match="takes 16 GPUs, 8 of each of 2 hosts, this machine has 4 .*set it to 8 or less"):
        slots.check(16)


def test_the_variable_that_every_process_must_have_is_that_of_memory() -> None:
    assert hosts.SAME == memory.MICRO_BATCHES


@pytest.mark.skipif(sys.platform != "linux", reason="loopback has another name there")
def test_the_interface_follows_from_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    for address in ("127.0.0.1", "127.0.0.2"):
        assert hosts.network(address) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert hosts.network("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}
    assert hosts.network("198.51.100.1") == {}


def test_hosts_that_are_unlike_do_not_train_together() -> None:
    assert hosts.unlike(FACTS, FACTS, "b", 4) == []
    assert hosts.unlike(FACTS, {**FACTS, "code": "d"}, "b", 4) == [
        "host b has other code (hash d, the head c): bring both to one commit"
    ]
    [said] = hosts.unlike(FACTS, {**FACTS, "versions": {"torch": "2", "torchao": "3"}}, "b", 4)
    assert said.startswith("host b has other versions (torch 2, on the head 1; torchao 3, on the head None)")
    gpus = [(0, 0, 0), (0, 4, 1), (4, 0, 1), (8, 4, 0), (8, 3, 1)]  # of the head, of the guest, sentences
    for own, theirs, wrong in gpus:
        assert len(hosts.unlike({**FACTS, "gpus": own}, {**FACTS, "gpus": theirs}, "b", 4)) == wrong


# --- meeting ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    monkeypatch.chdir(tmp_path)
    for module in (hosts, joining):
        monkeypatch.setattr(module, "facts", lambda package: FACTS)
    return Group(2, "127.0.0.1", free_port(), 1)


def beside(work: Callable[[], object], after: float = 0.0) -> Callable[[], list[Any]]:
    """Runs it in a thread after some seconds; the result waits for that and is what it returned, or the error."""
    done: list[Any] = []

    def run() -> None:
        time.sleep(after)
        try:
            done.append(work())
        except (UserError, RunError, OSError) as error:
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> list[object]:
        thread.join(timeout=30)
        return done

    return wait


def met(group: Group, hold: threading.Event | None = None) -> tuple[Any, Any]:
    """A guest's part of meeting the head; it then keeps the line open until `hold`, and gives no sign of life."""
    while True:
        try:
            line = Line(socket.create_connection((group.address, group.port)))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    with closing(line):
        found = joining._meet(line, lambda folder, command: None)
        if hold is not None:
            hold.wait(30)
        return found


def gather(group: Group) -> None:
    """The head's part, which is to fail."""
    with hosts.gathered(group, 1, []):
        pass


def test_a_guest_is_told_the_cell_and_where(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOLF_MICRO_BATCHES", "4")
    monkeypatch.setattr(hosts, "__file__", str(tmp_path / ".molf/flow/cells/c/src/molf/hosts.py"))
    hold = threading.Event()
    wait = beside(lambda: met(group, hold))
    with hosts.gathered(group, 1, ["a", "b"]) as (address, guests):
        [note] = (tmp_path / ".molf").glob("meet-*")
        assert note.stat().st_mode & 0o777 == 0o600
        assert (address, len(guests)) == ("127.0.0.1", 1)
    hold.set()
    [(cell, environment)] = wait()
    assert (cell, environment["MOLF_MICRO_BATCHES"]) == ((tmp_path, ["a", "b"]), "4")
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / ".molf/flow/cells/c/src")
    assert not note.exists()
    assert f"waits for 1 more host: `molf join 127.0.0.1:{group.port}` there" in capsys.readouterr().err


def test_who_does_not_know_what_the_head_wrote_is_not_let_in(
    group: Group, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joining, "_key", lambda folder, name: "guessed")
    wait = beside(lambda: met(group))
    with pytest.raises(RunError, match=r"1 of 2 hosts did not come within 0.05 minutes .*\n.*it does not know what"):
        gather(Group(2, group.address, group.port, 0.05))
    assert isinstance(wait()[0], OSError)


def test_a_guest_does_not_believe_whoever_listens_there(group: Group) -> None:
    with socket.create_server((group.address, group.port)) as listening:
        wait = beside(lambda: met(group))
        with closing(Line(listening.accept()[0])) as line:
            Path(".molf").mkdir()
            note = Path(".molf/meet-" + 32 * "0")
            note.write_text("the key")
            line.send(folder=str(Path.cwd()), package="/p", note=note.name, challenge="c")
            assert line.receive()["proof"] == hosts.proof("the key", "guest", "c")
            line.send(command=["rm"], proof="guessed", micro_batches=None)
            [error] = wait()
    assert "does not know what the head wrote" in str(error)


@pytest.mark.parametrize("folder", ["/elsewhere", "../x", "{here}/../x", "{here}"])
def test_a_folder_that_is_not_shared_is_told_on_both_sides(
    folder: str, group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "SHARED", 0.1)
    with socket.create_server((group.address, group.port)) as listening:
        wait = beside(lambda: met(group))
        with closing(Line(listening.accept()[0])) as line:
            where = folder.format(here=tmp_path)
            line.send(folder=where, package="/p", note="meet-" + 32 * "0", challenge="c")
            said = line.receive()["failed"]
            [error] = wait()
    assert isinstance(error, UserError) and said == str(error)
    assert ("the same path on all hosts" if folder != "{here}" else "must lie on a disk that all hosts share") in said


def test_a_guest_with_other_code_is_refused_and_told_why(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "facts", lambda package: {**FACTS, "code": "d"})
    wait = beside(lambda: met(group))
    with pytest.raises(UserError, match=r"host \S+ \(127.0.0.1\) has other code \(hash d, the head c\)") as caught:
        gather(group)
    [error] = wait()
    assert isinstance(error, UserError) and error.problems == caught.value.problems


def test_a_guest_without_a_sign_of_life_is_gone_and_one_that_knocks_only_stops_nobody(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "SILENCE", 1.0)
    hold = threading.Event()
    with socket.socket() as knocks:
        beside(lambda: met(group, hold), after=0.5)
        knocked = beside(lambda: knocks.connect_ex((group.address, group.port)), after=0.2)
        with hosts.gathered(group, 1, []) as (_, [guest]):
            assert knocked() == [0]
            guest.start(range(1, 2), 2, ("127.0.0.1", 1), None)
            with pytest.raises(Passing, match=r"host \S+ \(127.0.0.1\) is gone \(timed out\): its `molf join` has"):
                for _ in range(100):
                    assert guest.codes() == [None]
                    time.sleep(0.05)
    hold.set()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("0.0.0.0", "would be open to every network of this host"),
        ("::", "would be open to every network of this host"),
        ("198.51.100.1", "the address is none of this host's"),
    ],
)
def test_the_head_listens_to_its_group_only(address: str, message: str, group: Group) -> None:
    with pytest.raises(UserError, match=message), hosts.gathered(Group(2, address, group.port, 1), 1, []):
        pass


def test_one_cell_of_a_group_waits_for_the_other(group: Group, capsys: pytest.CaptureFixture[str]) -> None:
    other = socket.create_server((group.address, group.port))
    threading.Timer(0.5, other.close).start()
    with hosts._listening(group, "there") as listening:
        assert listening.getsockname() == (group.address, group.port)
    assert capsys.readouterr().err == "there is taken: waits until the other cell of this group has ended\n"


def test_a_guest_trains_what_params_names_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    train, cell = "molf.stages.train", ["tiny", "sql", "molf"]
    for right in ([train, *cell, "17"], ["molf.stages.sweep", *cell, "0.25"]):
        joining.require_cell(tmp_path, right)
    for wrong in (
        ["molf.stages.base", *cell, "0"],
        ["http.server", *cell, "0"],
        [train, *cell],
        [train, *cell, "x"],
        [],
    ):
        with pytest.raises(UserError, match="trains no cell of .*params.yaml"):
            joining.require_cell(tmp_path, wrong)
    with pytest.raises(UserError, match="trains no cell of .*params.yaml"):
        joining.require_cell(tmp_path, [train, "../x", *cell[1:], "0"])


def test_a_guest_whom_nobody_gives_a_cell_ends(group: Group) -> None:
    with pytest.raises(RunError, match=r"no cell of 127.0.0.1:\d+ came within 0.01 minutes .*refused"):
        joining.join(f"{group.address}:{group.port}", 0.01)


# --- training ---------------------------------------------------------------------------------------------------------


class Net:
    """Two hosts, of which the head has `address`.

    Args:
        address: The head's.
        ways: What a command begins with, on the head and on the guest.
        guest: The guest's address as the head sees it.
    """

    def __init__(self, address: str, ways: tuple[list[str], list[str]], guest: str) -> None:
        self.meet, self.ways, self.guest = f"{address}:{free_port()}", ways, guest

    def start(self, host: int, command: list[str], folder: Path, home: Path, said: Path) -> "subprocess.Popen[bytes]":
        """Starts a Python module on host 0, the head, or 1."""
        home.mkdir(exist_ok=True)
        environment = {**os.environ, **QUIET, "HOME": str(home), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        if host == 0:
            environment |= {"MOLF_HOSTS": "2", "MOLF_MEET": self.meet, "MOLF_MEET_MINUTES": "2"}
        with said.open("ab") as output:
            return subprocess.Popen(
                [*self.ways[host], sys.executable, "-m", *command],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=output,
            )


@pytest.fixture(scope="session")
def net() -> Iterator[Net]:
    """Two network namespaces with a cable between them; where those may not be made, two names of this host."""
    names = [f"molf-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"molf{side}" for side in "ab"]
    commands = [["netns", "add", name] for name in names]
    commands.append(["link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1]])
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        commands.append(["-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end])
        commands += [["-n", name, "link", "set", each, "up"] for each in (end, "lo")]
    allowed = shutil.which("ip") is not None
    try:
        if allowed and all(subprocess.run(["ip", *each], capture_output=True).returncode == 0 for each in commands):
            yield Net("10.77.0.1", (["ip", "netns", "exec", names[0]], ["ip", "netns", "exec", names[1]]), "10.77.0.2")
        else:
            yield Net("127.0.0.2" if sys.platform == "linux" else "127.0.0.1", ([], []), "127.0.0.")
    finally:
        for name in names if allowed else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ended(process: "subprocess.Popen[bytes]", said: Path, code: int) -> str:
    """What a process said, which must end with a code."""
    process.wait(timeout=600)
    text = said.read_text()
    assert process.returncode == code, text
    return text


def test_two_hosts_train_what_one_process_trains(net: Net, base: Path, tied_base: Path, tmp_path: Path) -> None:
    bases, folder = {"base": str(base), "tied": str(tied_base)}, tmp_path / "shared"
    folder.mkdir()
    runs = [("molf-effective", "ddp"), ("molf-effective", "fsdp"), ("lora", "fsdp")]
    cells = [
        {"name": name, "folder": f"{name}-{way}", "checkpoints": None, "stop": 0}
        | {"budget": {"processes": 2, "sharding": way}}
        for name, way in runs
    ]
    (folder / "cells.json").write_text(json.dumps({"bases": bases, "cells": cells}))
    guest = net.start(1, ["tests.group", "join", net.meet], folder, tmp_path / "b", tmp_path / "guest.txt")
    head = net.start(0, ["tests.group", "cells", str(folder)], folder, tmp_path / "a", tmp_path / "head.txt")
    try:
        outcomes = {name: whole(run_cell(name, bases, tmp_path / name)) for name, _ in runs}
        ended(head, tmp_path / "head.txt", 0)
        guest.send_signal(signal.SIGTERM)
        assert "the head has ended the cell" in ended(guest, tmp_path / "guest.txt", 0)
    finally:
        guest.kill()
        head.kill()
    for name, way in runs:
        own, outcome = folder / f"{name}-{way}", outcomes[name]
        summary = json.loads((own / "summary.json").read_text())
        assert (summary["processes"], summary["hosts"], summary["sharding"]) == (2, 2, way)
        history = pd.read_parquet(own / "history.parquet")
        assert history["loss"].tolist() == pytest.approx(outcome.history["loss"].tolist(), rel=1e-5)
        if outcome.routing is not None:
            assert pd.read_parquet(own / "routing.parquet")["won"].tolist() == outcome.routing["won"].tolist()
            counted = outcome.routing[outcome.routing["counted"]]
            assert set(counted.groupby("expert")["won"].any()) == {True}, "one expert won everything: nothing is shown"
        require_close(tmp_path / name / "weights", own / "weights")


@pytest.mark.acceptance
def test_a_cell_of_two_hosts_outlives_a_kill_of_either_and_an_interrupt(
    net: Net, tied_base: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path / "shared", tied_base)
    stage.ask(steps=1, max_length=32, epochs=20)
    guest_said, tries = tmp_path / "guest.txt", iter(range(9))

    def join() -> "subprocess.Popen[bytes]":
        return net.start(1, ["molf.cli", "join", net.meet], stage.root, tmp_path / "b", guest_said)

    def train() -> tuple["subprocess.Popen[bytes]", Path]:
        said = tmp_path / f"head-{next(tries)}.txt"
        command = ["molf.stages.train", "tiny", "fact", "molf", "0"]
        return net.start(0, command, stage.root, tmp_path / "a", said), said

    def steps() -> set[Path]:
        return set(stage.root.glob(".molf/checkpoints/**/step-*/state.json"))

    def trains(head: "subprocess.Popen[bytes]", said: Path, beyond: set[Path]) -> None:
        while not steps() - beyond:
            assert head.poll() is None, said.read_text()
            time.sleep(0.05)

    guest = join()
    running = [guest]
    try:
        head, said = train()
        running.append(head)
        trains(head, said, set())
        for pid in [*descendants(guest.pid), guest.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        text = ended(head, said, PASSING)
        assert time.monotonic() - began < hosts.SILENCE
        assert re.search(rf"^failed: host \S+ \({net.guest}\S*\) is gone \(", text, re.MULTILINE), text
        assert "Traceback" not in text

        guest = join()
        before = steps()
        head, said = train()
        running += [guest, head]
        trains(head, said, before)
        head.kill()
        its = descendants(guest.pid)
        assert its
        while any(map(alive, its)):
            time.sleep(0.05)
        head.wait()

        for on_head in (True, False):
            before = steps()
            head, said = train()
            running.append(head)
            trains(head, said, before)
            if on_head:
                head.send_signal(signal.SIGINT)
            else:
                guest.send_signal(signal.SIGTERM)
            assert re.search(r"interrupted: after step \d+ of 60; .* goes on from ", ended(head, said, 1))
        ended(guest, guest_said, 0)

        guest = join()
        running.append(guest)
        stage.ask(steps=None, max_length=32, epochs=20, sharding="fsdp")
        head, said = train()
        running.append(head)
        assert "resumed after step" in ended(head, said, 0)
        guest.send_signal(signal.SIGTERM)
        text = ended(guest, guest_said, 0)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
    assert text.count("joins for tiny fact molf 0") == 5 and "the head is gone" in text
    train_folder = stage.root / "results/tiny/fact/molf/seed-0/train"
    summary, run = (json.loads((train_folder / name).read_text()) for name in ("summary.json", "run.json"))
    assert (summary["hosts"], summary["steps"], summary["sharding"]) == (2, 60, "fsdp")
    assert len(summary["resumed_at_steps"]) == 3 + 1
    assert run["hardware"]["hosts"] == 2
    assert not list(stage.root.glob(".molf/meet-*"))
