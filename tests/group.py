"""`python -m tests.group CASE FOLDER`: two processes of one group, for test_processes.py. It is not a test."""

import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path

from molf import processes
from molf.errors import RunError, UserError, main


def run() -> None:
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
        case "wait":
            (folder / f"{rank()}.pid").write_text(str(os.getpid()))
            time.sleep(600)
        case "user":  # which every process finds
            raise UserError(["first problem", "second problem"])
    if rank() == 1:
        match case:
            case "run":
                raise RunError("the loss is no number")
            case "defect":
                raise ValueError("a defect of ours")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
    barrier()  # where the one that failed never comes


if __name__ == "__main__":
    raise SystemExit(main(run))
