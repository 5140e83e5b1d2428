"""Speed and memory of fetching and preparing rows of a user's own: `python -m benchmarks.data`.

A generated file of JSON lines (prompts of some 60 words, short completions, a few broken rows and copies), for each
size through `python -m molf.stages.fetch` and `prepare`, each in a process of its own; beside them the floor, what
reading the same file and parsing its JSON takes alone. CPU time and bytes read are without start-up, which is measured
right before each; the time as a whole is with it, and with whatever else the machine does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.measure import RESULTS, ROOT, run_child

SIZES = (10_000, 100_000, 1_000_000)
SMALL = 100  # rows of a run that is all start-up: imports
LIMIT = 3e9  # bytes that a stage may hold at its peak
STAGES = ("fetch", "prepare")
TASK = "rows"
BROKEN, EXACT, NEAR = 0.002, 0.01, 0.01  # shares of the rows
WORDS = 60  # of a prompt, on average
HEADER = (
    "rows",
    "stage",
    "CPU time",
    "rows per CPU second",
    "to json.loads alone",
    "peak memory",
    "read / input",
    "time",
)


@dataclass(frozen=True)
class Planted:
    """What was put into a file on purpose, in rows."""

    rows: int
    broken: int
    exact: int
    near: int


@dataclass(frozen=True)
class Sample:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int  # resident
    read_bytes: int  # by system calls, from disk or from the system's cache of it
    load: float  # processes that wanted a core in the minute before


def write_rows(file: IO[bytes], count: int, seed: int = 0) -> Planted:
    """Writes generated rows as JSON lines, their words as unevenly frequent as a language's.

    Args:
        file: Where to.
        count: Rows, at least 100.
        seed: Of all draws.

    Returns:
        How many of them are broken, equal to an earlier row, and equal but for one word.
    """
    draw = np.random.default_rng(seed)
    words = np.array(list(_words(draw, 20_000)), dtype=object)
    shares = 1 / np.arange(1, len(words) + 1)
    frequent = np.cumsum(shares / shares.sum())

    def texts(lengths: np.ndarray) -> Iterator[str]:
        chosen = words[np.minimum(np.searchsorted(frequent, draw.random(lengths.sum())), len(words) - 1)]
        for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
            yield " ".join(chosen[end - length : end].tolist())

    planted = Planted(count, *(max(1, round(count * share)) for share in (BROKEN, EXACT, NEAR)))
    # Copies are of the first rows, each of another, and come last but for the broken rows, which lie in between.
    own = count - planted.broken - planted.exact - planted.near
    breaks = set(draw.choice(np.arange(own), planted.broken, replace=False).tolist())
    originals: list[tuple[str, str]] = []
    number = broken = 0
    for start in range(0, own, 10_000):
        size = min(10_000, own - start)
        prompts = texts(draw.integers(WORDS // 2, WORDS * 3 // 2, size))
        for at, (prompt, answer) in enumerate(zip(prompts, texts(draw.integers(1, 4, size)), strict=True), start):
            number += 1
            prompt = prompt.capitalize() + "?"
            file.write(_line(number, prompt, answer))
            if len(originals) < planted.exact + planted.near:
                originals.append((prompt, answer))
            if at in breaks:
                number += 1
                file.write(_broken(broken, number, prompt + " broken", answer))
                broken += 1
    for prompt, answer in originals[: planted.exact]:
        number += 1
        file.write(_line(number, prompt, answer))
    for prompt, answer in originals[planted.exact :]:
        number += 1
        parts = prompt.split(" ")
        parts[int(draw.integers(1, len(parts)))] = "otherwise"
        file.write(_line(number, " ".join(parts), answer))
    return planted


def _words(draw: np.random.Generator, count: int) -> Iterator[str]:
    """Different made-up words, the first ones short; one in 200 is not ASCII."""
    seen: set[str] = set()
    while len(seen) < count:
        syllables = 1 + int(draw.integers(0, 1 + min(3, len(seen) // 100)))
        word = "".join(
            str(draw.choice(list("bcdfghklmnprstvw"))) + str(draw.choice(list("aeiou"))) for _ in range(syllables)
        )
        word += str(draw.choice(["", "n", "r", "s", "t"]))
        if len(seen) % 200 == 199:
            word = word.replace("e", "é").replace("a", "ä") + "ß"
        if word not in seen:
            seen.add(word)
            yield word


def _line(number: int, prompt: str, answer: str) -> bytes:
    return (json.dumps({"id": number, "prompt": prompt, "completion": answer}, ensure_ascii=False) + "\n").encode()


def _broken(kind: int, number: int, prompt: str, answer: str) -> bytes:
    """A row with something wrong, another each time."""
    good = _line(number, prompt, answer)
    prefix = f'{{"id": {number}, '
    kinds = [
        good[: len(good) // 2] + b"\n",
        _line(number, prompt, ""),
        _line(number, " \t", answer),
        _line(number, prompt + "\x07", answer),
        (prefix + '"prompt": null, "completion": "yes"}\n').encode(),
        (prefix + '"prompt": "Why?"}\n').encode(),
        (prefix + '"prompt": "Half a pair \\ud83d?", "completion": "yes"}\n').encode(),
        (prefix + '"prompt": "One?", "prompt": "Two?", "completion": "yes"}\n').encode(),
        b'["a list", "and no object"]\n',
        prefix.encode() + b'"prompt": "Not UTF-8: \xff\xfe?", "completion": "yes"}\n',
    ]
    return kinds[kind % len(kinds)]


def write_params(folder: Path) -> None:
    """params.yaml with the one task of this benchmark; JSON is YAML."""
    from molf.presets import differences

    params = differences("tiny")
    params["grid"]["tasks"] = [TASK]
    block = {
        "kind": "completion",
        "source": {"kind": "file", "path": "rows.jsonl"},
        "license": "unknown",
        "limits": {"train": None, "validation": None, "test": None},
        "split": {"validation": 0.1, "test": 0.1, "seed": 0, "group": None},
        "duplicates": {"similarity": 0.85, "across": "fail"},
        "max_rejected": 0.01,
        "options": {"prompt": "prompt", "completion": "completion"},
        "training": {},
    }
    params["tasks"] = {TASK: block}
    (folder / "params.yaml").write_text(json.dumps(params))


def run_stage(stage: str, folder: Path) -> Sample:
    """Runs a stage as DVC does, and watches it.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    command = [sys.executable, "-m", f"molf.stages.{stage}", TASK]
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=said
        )
        peak = 0
        # Not its usage's own maximum, which counts this process, out of which it was made. The memory is gone before
        # the process is, its counts are not until it is waited for.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            peak = max(peak, _peak(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        counts = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}\n{said.read().decode()[-2000:]}")
    return Sample(seconds, usage.ru_utime + usage.ru_stime, peak, int(counts["rchar"]), load)


def _peak(pid: int) -> int:
    """The most bytes that a process has held so far; 0 once it ends."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def check(folder: Path, planted: Planted) -> dict[str, Any]:
    """The counts of summary.json, held against what was planted.

    Raises:
        RuntimeError: A row is lost, or a broken row or a copy was not found.
    """
    summary = json.loads((folder / f"data/prepared/{TASK}/summary.json").read_text())
    rows = summary["rows"]
    found = rows["train"]
    kept = sum(split["kept"] for split in rows.values()) + sum(leak["dropped"] for leak in summary["leaks"])
    wrong = {
        "rows": (found["raw"], planted.rows, 0),
        "rejected": (found["rejected"], planted.broken, 0),
        "equal rows": (found["duplicates"], planted.exact, 0),
        "near copies": (found["near_duplicates"], planted.near, max(1, planted.near // 50)),
        "kept": (kept, planted.rows - planted.broken - planted.exact, 0),
    }
    for what, (got, expected, slack) in wrong.items():
        if abs(got - expected) > slack:
            raise RuntimeError(f"{what}: {got} instead of {expected}: {json.dumps(summary)[:2000]}")
    return {what: got for what, (got, _, _) in wrong.items()}


def floor(file: Path) -> dict[str, float]:
    """CPU seconds that reading a file's lines takes, and parsing each as JSON besides, broken ones passed over."""
    started = time.process_time()
    with file.open("rb") as lines:
        for _ in lines:
            pass
    read = time.process_time()
    with file.open("rb") as lines:
        for line in lines:
            try:
                json.loads(line)
            except ValueError:
                continue
    return {"lines": read - started, "json": time.process_time() - read}


def plant(folder: Path, count: int) -> Planted:
    """Makes a project with a file of so many rows."""
    folder.mkdir()
    with (folder / "rows.jsonl").open("wb") as file:
        planted = write_rows(file, count)
    write_params(folder)
    return planted


def measure(folder: Path, small: Path, count: int, rounds: int) -> dict[str, Any]:
    """Stages over a file of some size, each right behind its start-up alone, and the floor, in turn, `rounds` times."""
    planted = plant(folder, count)
    starts: dict[str, list[Sample]] = {stage: [] for stage in STAGES}
    samples: dict[str, list[Sample]] = {stage: [] for stage in STAGES}
    floors = []
    for _ in range(rounds):
        for stage in STAGES:
            starts[stage].append(run_stage(stage, small))
            samples[stage].append(run_stage(stage, folder))
        command = [sys.executable, "-m", "benchmarks.data", "--floor", str(folder / "rows.jsonl")]
        floors.append(run_child(command, threads=1))
    inputs = {"fetch": folder / "rows.jsonl", "prepare": folder / f"data/raw/{TASK}/train.parquet"}
    return {
        "planted": asdict(planted),
        "found": check(folder, planted),
        "input_bytes": {stage: path.stat().st_size for stage, path in inputs.items()},
        "samples": {stage: [asdict(sample) for sample in taken] for stage, taken in samples.items()},
        "start_up": {stage: [asdict(sample) for sample in taken] for stage, taken in starts.items()},
        "floors": floors,
    }


def median(run: dict[str, Any], stage: str, what: str) -> float:
    """Of a stage's samples."""
    return statistics.median(sample[what] for sample in run["samples"][stage])


def above(run: dict[str, Any], stage: str, what: str) -> float:
    """What a stage takes besides the start-up that was measured right before it; the median pair's."""
    pairs = zip(run["samples"][stage], run["start_up"][stage], strict=True)
    return statistics.median(sample[what] - start[what] for sample, start in pairs)


def growth(runs: Sequence[dict[str, Any]], stage: str) -> float | None:
    """The exponent with which CPU time grows with the rows (1: in proportion), by least squares of the logarithms."""
    points = [(run["planted"]["rows"], above(run, stage, "cpu_seconds")) for run in runs]
    logarithms = np.log(np.array([point for point in points if point[1] > 0]))
    if len(logarithms) < 2:
        return None
    return float(np.polyfit(logarithms[:, 0], logarithms[:, 1], deg=1)[0])


def lines(runs: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown: a row a size and stage."""
    text = ["| " + " | ".join(HEADER) + " |", "| " + " | ".join("---" for _ in HEADER) + " |"]
    for run in runs:
        parse = statistics.median(sample["json"] for sample in run["floors"])
        for stage in STAGES:
            rows, seconds = run["planted"]["rows"], above(run, stage, "cpu_seconds")
            read = above(run, stage, "read_bytes") / run["input_bytes"][stage]
            cells = [f"{rows:,}", stage, f"{seconds:.1f} s", f"{rows / seconds:,.0f}", f"{seconds / parse:.1f}"]
            cells += [f"{median(run, stage, 'peak_bytes') / 1e6:,.0f} MB", f"{read:.3f}"]
            cells += [f"{median(run, stage, 'seconds'):.1f} s"]
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def run(arguments: Sequence[str]) -> None:
    """Measures every size, prints the table and writes the samples."""
    options = _options(arguments)

    from benchmarks import table
    from benchmarks.device import Device
    from benchmarks.measure import Settings
    from molf.paths import write_json

    settings = Settings(Device("cpu"), os.cpu_count() or 1, options.rounds, False, None, Path())
    facts = table.environment(settings)
    print(table.heading(facts) + "\n", flush=True)
    runs = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        small = Path(scratch) / "small"
        plant(small, SMALL)
        for stage in STAGES:  # fills the system's cache, and prepare needs what fetch wrote
            run_stage(stage, small)
        for count in options.rows:
            print(f"measuring {count:,} rows ...", file=sys.stderr, flush=True)
            runs.append(measure(Path(scratch) / f"{count}", small, count, options.rounds))
    print(lines(runs))
    grows = {stage: growth(runs, stage) for stage in STAGES}
    peak = max(sample["peak_bytes"] for run in runs for taken in run["samples"].values() for sample in taken)
    print(f"\nCPU time grows as rows to the power of {', '.join(f'{e:.2f} ({s})' for s, e in grows.items() if e)}")
    print(f"peak memory {peak / 1e9:.2f} GB; at most {LIMIT / 1e9:.0f} GB: {'yes' if peak <= LIMIT else 'NO'}")
    path: Path = options.into / f"data-{options.name or table.slug(facts)}.json"
    limit = {"peak_bytes": LIMIT, "met": peak <= LIMIT}
    write_json(path, {"environment": facts, "limit": limit, "growth": grows, "runs": runs})
    print(f"\nall samples: {path}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="sizes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each (default: %(default)s)")
    parser.add_argument("--name", help="of the file (default: the hardware)")
    parser.add_argument("--into", type=Path, default=RESULTS, help="its folder (default benchmarks/results)")
    parser.add_argument("--scratch", type=Path, help="folder for the rows, some gigabytes (default: the system's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from molf.errors import main

    if sys.argv[1:2] == ["--floor"]:
        print(json.dumps(floor(Path(sys.argv[2]))))
    else:
        raise SystemExit(main(lambda: run(sys.argv[1:])))
