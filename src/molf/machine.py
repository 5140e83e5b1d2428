"""What a result was made on and with: hardware, library versions, git commit."""

import contextlib
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "molf")


def versions(moments: str = "float32", base_bits: int | None = None) -> dict[str, str | None]:
    """Versions of Python and of the libraries that shape a training; None: not installed.

    Args:
        moments: `training.moments`; 8-bit ones are torchao's, of which no other training depends.
        base_bits: Of the method's block, likewise bitsandbytes'.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: metadata.version(name) for name in LIBRARIES}
    for library in ["torchao"] * (moments == "8bit") + ["bitsandbytes"] * (base_bits is not None):
        found[library] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def hardware(threads: int | None, processes: int = 1, micro_batches: int = 1, hosts: int = 1) -> dict[str, Any]:
    """What a cell is trained on and how, and a hash of that: costs are ranked among cells that share it only.

    Args:
        threads: Of each process; None: what torch uses in this one.
        processes: That train a cell together.
        micro_batches: Parts in which each micro-batch of params.yaml is taken (`Training.split`).
        hosts: On which the processes run; this one stands for all.
    """
    import torch

    if torch.cuda.is_available():
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        name = f"{_cpu_name()}, {os.cpu_count()} cores"
    count = threads or torch.get_num_threads()
    several = f"|{processes}" if processes > 1 else ""
    several += f"|{micro_batches} micro-batches" if micro_batches > 1 else ""
    several += f"|{hosts} hosts" if hosts > 1 else ""
    digest = hashlib.sha256(f"{name}|{count}{several}".encode()).hexdigest()[:16]
    how = {"threads": count, "processes": processes, "micro_batches": micro_batches, "hosts": hosts}
    return {"name": name, **how, "fingerprint": digest}


def memory_free() -> int | None:
    """Bytes that a training may take: of the GPU where there is one, else of this machine or its container."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    free = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: then there is no limit
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(free, default=None)


def git_commit() -> str | None:
    """The checked-out commit, with `+` when tracked files differ from it; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        # DVC itself rewrites dvc.lock while it runs, which says nothing about the code.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
