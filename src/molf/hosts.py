"""Hosts that train one cell together: the head, where DVC runs the stage, and guests, where `molf join` runs.

A group of hosts is one worker: its head alone takes cells, so that two cells never wait for each other's hosts. For as
long as a cell takes there is one connection between the head and each guest: JSON, one value a line, and signs of life.
Only those join who can read the project's folder: both sides prove that they know what the head wrote there. A guest
starts a stage that trains, on a cell or trial of params.yaml, and nothing else that the connection could ask for
(`molf.joining`).
"""

import contextlib
import errno
import hmac
import ipaddress
import json
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molf.errors import Passing, RunError, UserError, plain
from molf.paths import SCRATCH

HOSTS, MEET, MINUTES = "MOLF_HOSTS", "MOLF_MEET", "MOLF_MEET_MINUTES"  # variables of the head's environment
SAME = "MOLF_MICRO_BATCHES"  # another variable that all processes of a cell must have alike
STAGES = ("molf.stages.train", "molf.stages.sweep")  # that train
BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one, after which the other side counts as gone
LONGEST = 1_000_000  # bytes of a message


@dataclass(frozen=True)
class Group:
    """Hosts that train together.

    Args:
        hosts: How many, the head included.
        address: Of the head, a name or a number, as its guests reach it.
        port: Where they meet.
        minutes: That the head waits for its guests.
    """

    hosts: int
    address: str
    port: int
    minutes: float

    def share(self, processes: int) -> int:
        """Processes of each host.

        Raises:
            UserError: They cannot be shared out evenly.
        """
        if processes % self.hosts:
            raise UserError(
                f"training.processes: {processes} cannot be shared out evenly among the {self.hosts} hosts of {HOSTS}; "
                f"set it to a multiple of {self.hosts}"
            )
        return processes // self.hosts


def asked() -> Group | None:
    """The group whose head this host is, by the environment; None: it trains alone.

    Raises:
        UserError: A variable is no number, or lacks.
    """
    hosts, meet, minutes = (os.environ.get(name, "") for name in (HOSTS, MEET, MINUTES))
    if hosts in ("", "1"):
        return None
    if not re.fullmatch("[1-9][0-9]{0,4}", hosts):
        raise UserError(f"{HOSTS}={hosts}: a number of hosts is needed, or unset it")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", minutes or "10"):
        raise UserError(f"{MINUTES}={minutes}: a number of minutes is needed, or unset it")
    return Group(int(hosts), *place(meet, MEET), float(minutes or 10))


def place(text: str, key: str) -> tuple[str, int]:
    """ADDRESS and PORT of `ADDRESS:PORT`.

    Raises:
        UserError: It is not of that form.
    """
    address, _, port = text.rpartition(":")
    if not address or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(
            f"{key}: ADDRESS:PORT is needed, the head's own address as the other hosts reach it and a free port, such "
            f"as 10.0.0.1:29400; {text or 'nothing'} was given"
        )
    return address.strip("[]"), int(port)


def interface(address: str) -> str | None:
    """The network interface that has an address, or whose network it is in; None where the system does not tell."""
    import psutil

    wanted, near = ipaddress.ip_address(address), None
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            with contextlib.suppress(ValueError):  # of a link, not of the internet
                own = ipaddress.ip_interface(f"{entry.address.partition('%')[0]}/{entry.netmask or 128}")
                if own.ip == wanted:
                    return name
                near = name if wanted in own.network else near
    return near


def network(address: str) -> dict[str, str]:
    """Variables that make gloo and NCCL use the interface of an address, but for those that are set already."""
    name = interface(address)
    found = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}
    return {key: value for key, value in found.items() if key not in os.environ}


def facts(package: Path) -> dict[str, Any]:
    """What hosts must have alike: the stages' code and versions of libraries; and their GPUs.

    Args:
        package: Folder of the molf that trains.
    """
    import torch

    from molf import closure, machine
    from molf.method_blocks import KINDS

    methods = [closure.of_method(kind) for kind in KINDS]
    return {
        "code": " ".join(closure.code_hash(stage, *methods, package=package) for stage in STAGES),
        "versions": machine.versions("8bit", base_bits=4),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }


def unlike(own: Mapping[str, Any], theirs: Mapping[str, Any], name: str, share: int) -> list[str]:
    """Why a guest cannot train with its head, in sentences.

    Args:
        own: `facts` of the head.
        theirs: Those of the guest.
        name: The guest's.
        share: Processes that it would have.
    """
    found = []
    if theirs["code"] != own["code"]:
        found.append(
            f"host {name} has other code (hash {theirs['code']}, the head {own['code']}): bring both to one commit"
        )
    pairs = {key: (own["versions"].get(key), theirs["versions"].get(key)) for key in own["versions"]}
    other = [f"{key} {there}, on the head {here}" for key, (here, there) in pairs.items() if here != there]
    if other:
        found.append(f"host {name} has other versions ({'; '.join(other)}): install the same on both")
    if (own["gpus"] > 0) != (theirs["gpus"] > 0) or 0 < theirs["gpus"] < share:
        found.append(
            f"host {name} has {theirs['gpus']} GPUs, the head {own['gpus']}, and each host needs {share}: lower "
            "training.processes, or choose hosts that are alike"
        )
    return found


def proof(key: str, *parts: str) -> str:
    """That whoever says `parts` knows the key."""
    return hmac.new(key.encode(), "\n".join(parts).encode(), "sha256").hexdigest()


class Line:
    """A connection between a head and a guest; one thread sends.

    Attributes:
        lost: Why nothing more comes; "" as long as something may.
        address: This side's.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SILENCE)
        self.lost, self.address = "", str(connection.getsockname()[0])
        self._connection, self._file, self._spoke = connection, connection.makefile("rb"), 0.0
        self._came: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def send(self, **value: Any) -> None:
        """Sends plain data; where that fails the line is lost."""
        self._spoke = time.monotonic()
        try:
            self._connection.sendall(json.dumps(value).encode() + b"\n")
        except OSError as error:
            self.lost = self.lost or str(error)

    def beat(self) -> None:
        """To be called often: gives a sign of life when one is due."""
        if time.monotonic() - self._spoke > BEAT:
            self.send()

    def receive(self) -> dict[str, Any]:
        """The next value.

        Raises:
            OSError: None comes, or what comes is none.
        """
        text = self._file.readline(LONGEST)
        if not text.endswith(b"\n"):
            raise ConnectionError("it closed the connection")
        try:
            value = json.loads(text)
        except ValueError:
            raise ConnectionError("what it sent is no message") from None
        if not isinstance(value, dict):
            raise ConnectionError("what it sent is no message")
        return value

    def listen(self) -> None:
        """From now on `came` returns what comes."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                if value := self.receive():
                    self._came.put(value)
        except (OSError, ValueError) as error:  # a ValueError: it was closed here
            self.lost = self.lost or str(error)

    def came(self) -> list[dict[str, Any]]:
        """What came since the last call."""
        return [self._came.get() for _ in range(self._came.qsize())]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the head --------------------------------------------------------------------------------------------------------


class Guest:
    """The processes of a group that another host has, as the head sees them; a `processes.Part`."""

    def __init__(self, line: Line, name: str) -> None:
        self.line, self.name = line, name
        self.numbers, self.where = range(0), f" on host {name}"
        self._codes: list[int | None] = []
        self._tails: list[str] = []
        self._signals: list[int] = []

    def start(self, numbers: range, world: int, store: tuple[str, int], threads: int | None) -> None:
        """Starts its processes."""
        self.numbers, self._codes = numbers, [None] * len(numbers)
        self._tails = [""] * len(numbers)
        meet = {"address": store[0], "port": store[1], "threads": threads}
        self.line.send(first=numbers.start, share=len(numbers), world=world, **meet)

    def signal(self, number: int) -> None:
        """Passes a signal on to its processes; it may come while a message is under way."""
        self._signals.append(number)

    def codes(self) -> list[int | None]:
        """Exit codes of its processes, None of those that run; to be called often, for it also gives signs of life.

        Raises:
            Passing: The host is gone.
            RunError: It cannot start them.
        """
        while self._signals:
            self.line.send(signal=self._signals.pop(0))
        self.line.beat()
        lost = self.line.lost  # before what came is looked at, so that nothing that came is missed
        for said in self.line.came():
            if "failed" in said:
                raise RunError(f"host {self.name}: {said['failed']}")
            if "codes" in said:
                self._codes, self._tails = said["codes"], said["tails"]
        if lost and None in self._codes:
            raise Passing(
                f"host {self.name} is gone ({lost}): its `molf join` has ended, or the network between the "
                "hosts failed; once it has joined again the cell goes on from its last checkpoint"
            )
        return self._codes

    def tail(self, number: int) -> str:
        """The last lines of its process `number` of the group, each after a line break."""
        return self._tails[number - self.numbers.start]

    def end(self) -> None:
        """Ends its processes."""
        self.line.send(end=True)
        self.line.close()


@contextlib.contextmanager
def gathered(group: Group, share: int, command: Sequence[str]) -> Iterator[tuple[str, list[Guest]]]:
    """Waits until all guests have joined; yields the head's address as a number, and them.

    Args:
        group: The hosts.
        share: Processes of each.
        command: Of each process: a module of `STAGES`, and its arguments.

    Raises:
        UserError: The address is not this host's, or a guest has other code, libraries or GPUs.
        RunError: A guest did not come in time.
    """
    meet = f"{group.address}:{group.port}"
    package, folder = Path(__file__).parent, Path.cwd()
    own, key, note = facts(package), secrets.token_hex(16), SCRATCH / f"meet-{secrets.token_hex(16)}"
    said: queue.SimpleQueue[Guest | str | UserError] = queue.SimpleQueue()
    guests: list[Guest] = []
    told: set[str] = set()

    def let_in(line: Line, address: str) -> None:
        challenge = secrets.token_hex(16)
        try:
            line.send(folder=str(folder), package=str(package), note=note.name, challenge=challenge)
            answer = line.receive()
            name = plain(f"{answer.get('host')} ({address})")
            if "failed" in answer:
                said.put(f"host {name} does not join: {plain(answer['failed'])}")
            elif not hmac.compare_digest(str(answer.get("proof")), proof(key, "guest", challenge)):
                said.put(f"host {name} does not join: it does not know what stands in {note}")
            elif wrong := unlike(own, answer, name, share):
                line.send(refused=wrong)
                said.put(UserError(wrong))
            else:
                of_head = proof(key, "head", str(answer["challenge"]))
                line.send(command=list(command), proof=of_head, micro_batches=os.environ.get(SAME))
                line.listen()
                said.put(Guest(line, name))
                return
        except (OSError, KeyError, TypeError, AttributeError):
            pass  # whatever knocked there, it was no guest
        line.close()

    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listening(group, meet))
        address = listening.getsockname()[0]
        note.parent.mkdir(parents=True, exist_ok=True)
        for left in note.parent.glob("meet-*"):  # by heads that were killed: one folder trains one cell at a time
            left.unlink(missing_ok=True)
        with os.fdopen(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key)
        stack.callback(note.unlink, missing_ok=True)
        stack.callback(lambda: list(map(Guest.end, guests)))
        deadline, lacking = time.monotonic() + 60 * group.minutes, 0
        while len(guests) < group.hosts - 1:
            if lacking != (lacking := group.hosts - 1 - len(guests)):
                say(f"waits for {lacking} more host{'s' * (lacking > 1)}: `molf join {meet}` there, in this folder")
            if time.monotonic() > deadline:
                because = "".join(f"\n{reason}" for reason in sorted(told))
                raise RunError(
                    f"{lacking} of {group.hosts} hosts did not come within {group.minutes:g} minutes ({MINUTES}): type "
                    f"`molf join {meet}` there, in the project's folder, and see that {meet} is reached{because}"
                )
            with contextlib.suppress(TimeoutError):
                connection, where = listening.accept()
                threading.Thread(target=let_in, args=(Line(connection), where[0]), daemon=True).start()
            while not said.empty():
                match said.get():
                    case UserError() as error:
                        raise error
                    case str() as reason:
                        if reason not in told:
                            say(reason)
                        told.add(reason)
                    case guest if len(guests) < group.hosts - 1:
                        guests.append(guest)
                    case guest:
                        guest.end()
            for guest in [guest for guest in guests if guest.line.lost]:
                say(f"host {guest.name} has left")
                guests.remove(guest)
            for guest in guests:
                guest.line.beat()
        yield address, guests


@contextlib.contextmanager
def _listening(group: Group, meet: str) -> Iterator[socket.socket]:
    """A socket where guests meet the head, kept to the end of the cell: another cell of this host waits for it.

    Raises:
        UserError: It would listen where all may come, or the address is not this host's.
    """
    try:
        family, *_, where = socket.getaddrinfo(group.address, group.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"{MEET}={meet}: {error}") from None
    if ipaddress.ip_address(where[0]).is_unspecified:
        raise UserError(
            f"{MEET}={meet} would be open to every network of this host; give the address in its group's network"
        )
    told = False
    while True:
        try:
            listening = socket.create_server(where[:2], family=family)
            break
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"{MEET}={meet}: the address is none of this host's, which is the head") from None
            if error.errno != errno.EADDRINUSE:
                raise
            if not told:
                say(f"{meet} is taken: waits until the other cell of this group has ended")
            told = True
            time.sleep(1)
    with listening:
        listening.settimeout(0.1)
        yield listening
