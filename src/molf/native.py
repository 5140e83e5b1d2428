"""kernels.cpp for the host: compiled once a machine by the compiler that is there, called on whole lists of tensors.

Without a compiler `library` is None and the optimizer runs kernels.py as it stands: the same numbers, slower.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from molf.kernels import SCORES

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
KINDS = {
    (torch.float32, torch.float32): 0,
    (torch.float64, torch.float64): 1,
    (torch.bfloat16, torch.float32): 2,
}


def kind(weight: Tensor, moment: Tensor) -> int | None:
    """The number by which kernels.cpp knows a pair of dtypes that it serves on the host, else None."""
    if weight.device.type != "cpu" or not (weight.is_contiguous() and moment.is_contiguous()):
        return None
    return KINDS.get((weight.dtype, moment.dtype)) if library() is not None else None


def advance(
    kind: int,
    gradients: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    score: str | None,
) -> Tensor:
    """As `kernels.advance`, over any number of contiguous tensors of any shapes.

    Returns:
        Each tensor's score sum, (tensors,) of float64.
    """
    sums = torch.empty(len(gradients), dtype=torch.float64)
    _library().molf_advance(
        kind,
        ctypes.c_int64(len(gradients)),
        _sizes(ms),
        _addresses(gradients),
        _addresses(ms),
        _addresses(vs),
        ctypes.c_double(beta1),
        ctypes.c_double(beta2),
        ctypes.c_double(eps),
        SCORES[score],
        ctypes.c_void_p(sums.data_ptr()),
        torch.get_num_threads(),
    )
    return sums


def move(
    kind: int,
    weights: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    keeps: Sequence[float],
    rates: Sequence[float],
    roots: Sequence[float],
    eps: float,
    seeds: Sequence[int],
) -> None:
    """As `kernels.move`, over any number of contiguous tensors of any shapes, each with its own numbers."""
    count = len(weights)
    numbers = ctypes.c_double * count
    _library().molf_move(
        kind,
        ctypes.c_int64(count),
        _sizes(ms),
        _addresses(weights),
        _addresses(ms),
        _addresses(vs),
        numbers(*keeps),
        numbers(*rates),
        numbers(*roots),
        ctypes.c_double(eps),
        (ctypes.c_uint32 * count)(*(seed & 0xFFFFFFFF for seed in seeds)),
        torch.get_num_threads(),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, with a warning, where they cannot be compiled."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)
    if compiler is None:
        warnings.warn("no C++ compiler is here (g++ or clang++): the optimizer runs slower", stacklevel=2)
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        line = next(iter(said.strip().splitlines()), "")[:200]
        warnings.warn(f"{compiler} does not compile {SOURCE.name} ({line}): the optimizer runs slower", stacklevel=2)
        return None


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "`kind` gave None"
    return found


def _built(compiler: str) -> Path:
    """The shared library in the user's cache, named by all that shapes it; made if it lacks."""
    source = SOURCE.read_bytes()
    parts = [source, " ".join(FLAGS).encode(), compiler.encode(), platform.machine().encode(), _processor()]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = _folder() / f"kernels-{name}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            try:
                _compile(compiler, FLAGS, made)
            except subprocess.CalledProcessError:
                # Apple's clang has no OpenMP: then one thread does all.
                _compile(compiler, [flag for flag in FLAGS if flag != "-fopenmp"], made)
            os.replace(made, path)  # whole or not at all, however many processes do this at once
    return path


def _compile(compiler: str, flags: Sequence[str], into: Path) -> None:
    command = [compiler, *flags, "-o", str(into), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")


def _folder() -> Path:
    """Where the library is kept: only in a folder that nobody else can write to, since it is loaded as code."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molf"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or a read-only one
        pass
    folder = Path(tempfile.mkdtemp(prefix="molf-"))  # of this process alone
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> bytes:
    """What -march=native depends on: a home folder may serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return platform.processor().encode()


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(tensors))(*(tensor.numel() for tensor in tensors))
