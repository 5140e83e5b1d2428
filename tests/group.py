"""`python -m tests.group CASE FOLDER`: two processes of one group, for two files of tests. It is not a test."""

import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from molf import joining, processes
from molf.errors import RunError, UserError, main


def run() -> None:
    if sys.argv[1] == "join":  # on a host that is not the head
        joining.join(sys.argv[2], 5, lambda folder, command: None)
        return
    case, folder = sys.argv[1], Path(sys.argv[2])
    if not processes.started():
        processes.launch("tests.group", sys.argv[1:], 2, threads=1)
        return
    with processes.joined():
        work(case, folder)


def work(case: str, folder: Path) -> None:
    from molf.collective import barrier, rank

    match case:
        case "cells":
            from tests.cells import run_cells

            run_cells(folder)
        case "nan":  # in the second step of the second process
            from molf import training
            from tests.cells import run_cells

            honest, calls = training.completion_loss, itertools.count()
            if rank() == 1:
                training.completion_loss = lambda *given: honest(*given) * (math.nan if next(calls) == 1 else 1)
            run_cells(folder)
        case "talk":
            from molf.collective import agreed, gathered

            own = {"rank": rank(), "text": "ä" * (3 * rank()), "pair": (1, None), "nan": math.nan}
            said = [gathered(own), gathered([]), agreed(lambda: {"path": "x", "rank": rank()})]
            (folder / f"said-{rank()}.json").write_text(json.dumps(said))
            pid = os.getppid()
            (folder / f"open-{rank()}.json").write_text(json.dumps([*listening(pid), *listening(os.getpid())]))
        case "wait":
            (folder / f"{rank()}.pid").write_text(str(os.getpid()))
            time.sleep(600)
        case "user":  # which every process finds
            raise UserError(["first problem", "second problem"])
    if rank() == 0 and case.startswith("aborted"):  # as NCCL's watchdog does once another is gone
        store = processes.own_store()
        while not store.check([processes.FAILURE]):
            time.sleep(0.01)
        os.abort()
    if rank() == 1:
        match case.removeprefix("aborted-"):
            case "run":
                raise RunError("the loss is no number")
            case "defect":
                raise ValueError("a defect of ours")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
    barrier()  # where the one that failed never comes


def listening(pid: int) -> list[str]:
    """Addresses on which a process listens, as /proc/net/tcp and tcp6 write them."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


if __name__ == "__main__":
    raise SystemExit(main(run))
