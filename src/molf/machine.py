"""What a result was made on and with: hardware, library versions, git commit."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "molf")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a training."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}


def hardware(threads: int | None, processes: int = 1) -> dict[str, Any]:
    """Name, threads of each process, processes, and a hash of these: costs are ranked among cells that share it only.

    Args:
        threads: Of each process; None: what torch uses in this one.
        processes: That train a cell together.
    """
    import torch

    if torch.cuda.is_available():
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        name = f"{_cpu_name()}, {os.cpu_count()} cores"
    count = threads or torch.get_num_threads()
    several = f"|{processes}" if processes > 1 else ""
    digest = hashlib.sha256(f"{name}|{count}{several}".encode()).hexdigest()[:16]
    return {"name": name, "threads": count, "processes": processes, "fingerprint": digest}


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
