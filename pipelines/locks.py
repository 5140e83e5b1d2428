"""Locks between processes of one machine: held as long as any process has the file open, so a kill frees them."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.commands import check_ending

POLL = 0.2  # seconds between two looks


@contextlib.contextmanager
def lock(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Holds one lock; yields its file descriptor, which a child may keep open to hold it on.

    Args:
        path: Its file, made if it lacks.
        waiting: Called once if another process holds it.
    """
    with any_of([path], 1, waiting) as (held, _):
        yield held[0]


@contextlib.contextmanager
def free(path: Path) -> Iterator[bool]:
    """Holds a lock if nobody does; yields whether."""
    descriptor = _try(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def any_of(
    paths: Sequence[Path], count: int, waiting: Callable[[], object] = lambda: None
) -> Iterator[tuple[list[int], list[int]]]:
    """Holds `count` of several locks, all at once or none, as soon as so many are free.

    Yields:
        File descriptors of those held, and their places in `paths`.

    Raises:
        KeyboardInterrupt: The run ends meanwhile.
    """
    assert 0 < count <= len(paths)
    told = False
    while True:
        with contextlib.ExitStack() as stack:
            found: list[tuple[int, int]] = []
            for place, path in enumerate(paths):
                if len(found) < count and (descriptor := _try(path)) is not None:
                    stack.callback(os.close, descriptor)
                    found.append((descriptor, place))
            if len(found) == count:
                yield [descriptor for descriptor, _ in found], [place for _, place in found]
                return
        if not told:
            waiting()
            told = True
        check_ending()
        time.sleep(POLL)


def is_held(path: Path) -> bool:
    """Whether any process holds a lock at this moment."""
    if not path.exists():
        return False
    with free(path) as mine:
        return not mine


def _try(path: Path) -> int | None:
    """Takes a lock if it is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def gpus(environment: Any = None) -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty without any."""
    given = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() and name.strip() != "-1"]
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
