"""A host that joins the head of its group (`molf.hosts`) for one cell after another: `molf join ADDRESS:PORT`."""

import contextlib
import hmac
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molf.config import PARAMS, load_params
from molf.errors import RunError, UserError, plain
from molf.hosts import MEET, SAME, STAGES, Line, facts, network, place, proof, say
from molf.paths import SCRATCH

TAIL = 10_000  # characters that the head is told of what a process printed
SHARED = 5.0  # seconds that a shared disk may take to show a new file


def require_cell(folder: Path, command: Sequence[str]) -> None:
    """Checks that a command is a stage that trains a cell or a trial of blocks of params.yaml in a folder.

    Raises:
        UserError: It is not.
    """
    params = load_params(folder / PARAMS)
    blocks: tuple[Any, ...] = (params.models, params.tasks, params.methods)
    match command:
        case [module, *names, last] if module in STAGES and len(names) == len(blocks):
            known = all(name in block for name, block in zip(names, blocks, strict=True))
            if known and re.fullmatch(r"[0-9][0-9.e+-]{0,20}", last):  # a seed, a factor of the learning rate
                return
    raise UserError(f"{plain(' '.join(command))}: trains no cell of {folder / PARAMS}")


def join(
    meet: str,
    minutes: float,
    require: Callable[[Path, Sequence[str]], None] = require_cell,
) -> None:
    """Serves a head's cells, one after another, until SIGINT or SIGTERM; a cell under way then writes a checkpoint.

    Args:
        meet: The head's `ADDRESS:PORT`.
        minutes: That it waits for a cell.
        require: Checks where and what the head wants to run: a module and its arguments.

    Raises:
        UserError: `meet` is no address.
        RunError: No cell came in time.
    """
    from molf import processes

    where = place(meet, "molf join")
    told, why = "", ""
    say(f"waits for cells of {meet}; Ctrl-C ends")
    since = time.monotonic()
    with processes.passing_on([]) as asked:
        while not asked:
            try:
                with contextlib.closing(Line(socket.create_connection(where, timeout=5))) as line:
                    cell, environment = _meet(line, require)
                    say(f"joins for {' '.join(cell[1][1:])}")
                    say(_serve(line, *cell, environment, asked))
                told, since = "", time.monotonic()
            except UserError as error:
                why = "; ".join(error.problems)
                if why != told:
                    say(f"does not join: {why}")
                told = why
            except (OSError, KeyError, TypeError) as error:
                why = str(error)
            if time.monotonic() - since > 60 * minutes:
                raise RunError(
                    f"no cell of {meet} came within {minutes:g} minutes (--minutes): does the head train there, with "
                    f"{MEET}={meet}, and is the port open to this host? The last try: {why}"
                )
            for _ in range(10):
                if not asked:
                    time.sleep(0.1)


def _meet(
    line: Line, require: Callable[[Path, Sequence[str]], None]
) -> tuple[tuple[Path, list[str]], dict[str, str | None]]:
    """Joins the head's group; returns where and with which command to train, and variables of the environment.

    Raises:
        OSError: The connection broke, or whoever is there is not the head.
        UserError: The project's folder is not shared, or the head refuses this host.
    """
    hello = line.receive()
    me, package = socket.gethostname(), Path(hello["package"]).resolve()
    try:
        key = _key(Path(hello["folder"]), hello["note"])
        folder = Path(hello["folder"])
        if not package.is_relative_to(Path.cwd()):  # installed on each host
            package = Path(__file__).parent
        own = facts(package)
    except UserError as error:
        line.send(host=me, failed="; ".join(error.problems))
        raise
    challenge = secrets.token_hex(16)
    line.send(host=me, challenge=challenge, proof=proof(key, "guest", hello["challenge"]), **own)
    answer = line.receive()
    if "refused" in answer:
        raise UserError(answer["refused"])
    if not hmac.compare_digest(str(answer["proof"]), proof(key, "head", challenge)):
        raise ConnectionError("whoever is there does not know what the head wrote")
    command = [str(part) for part in answer["command"]]
    try:
        require(folder, command)
    except UserError as error:
        line.send(failed="; ".join(error.problems))
        raise
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return (folder, command), {"PYTHONPATH": path, SAME: answer["micro_batches"]}


def _key(folder: Path, name: str) -> str:
    """What the head wrote into the folder in which it trains.

    Raises:
        UserError: It is not here.
    """
    here = Path.cwd()
    if not folder.is_relative_to(here) or ".." in folder.parts or not re.fullmatch("meet-[0-9a-f]{32}", name):
        raise UserError(
            f"the head trains in {plain(folder)}, which is not in {here}: start `molf join` in the project's folder, "
            "which must have the same path on all hosts"
        )
    path, deadline = folder / SCRATCH / name, time.monotonic() + SHARED
    while True:
        try:
            return path.read_text(encoding="ascii")
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path}, which the head wrote, cannot be read here ({type(error).__name__}): the project's folder "
                    "must lie on a disk that all hosts share, and belong to the same user"
                ) from None
        time.sleep(0.2)


def _serve(
    line: Line,
    folder: Path,
    command: Sequence[str],
    environment: Mapping[str, str | None],
    asked: Sequence[int],
) -> str:
    """Runs this host's processes of a cell until the head has them ended; returns what came of them in a sentence."""
    from molf import processes

    line.listen()
    with contextlib.ExitStack() as stack:
        part: processes.Here | None = None
        told: list[int | None] = []
        passed = 0
        while True:
            lost = line.lost  # before what came is looked at, so that nothing that came is missed
            for said in line.came():
                if "world" in said and part is None:
                    numbers = range(int(said["first"]), int(said["first"]) + int(said["share"]))
                    store = (str(said["address"]), int(said["port"]))
                    shared = processes.shared(int(said["world"]), len(numbers), store, said["threads"])
                    own = {**environment, **shared, **network(line.address)}
                    part = stack.enter_context(processes.Here(command[0], command[1:], numbers, own, folder))
                if "signal" in said and part is not None:
                    part.signal(int(said["signal"]))
                if "end" in said:
                    return "the head has ended the cell"
            if part is not None and passed < len(asked):
                part.signal(asked[passed])
                passed += 1
            if part is not None and part.codes() != told:
                told = part.codes()
                line.send(codes=told, tails=[part.tail(number)[-TAIL:] for number in part.numbers])
            line.beat()
            if lost:
                return f"the head is gone ({lost}): this host's part of the cell has ended"
            if part is None and asked:
                return "left before the cell began"
            time.sleep(0.05)
