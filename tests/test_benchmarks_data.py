"""The benchmark of data plants what it says, and its table says what its samples say; never how fast."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data import Planted, check, floor, growth, lines, run, write_rows


def test_rows_hold_what_was_planted() -> None:
    file = io.BytesIO()
    planted = write_rows(file, 3000, seed=1)
    assert planted == Planted(3000, 6, 30, 30)
    written = file.getvalue().splitlines()
    assert len(written) == 3000
    good = []
    for line in written:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("prompt") and row.get("completion") and "\x07" not in row["prompt"]:
            good.append((row["prompt"], row["completion"]))
    assert 3000 - 6 <= len(good) <= 3000 - 3
    assert len(good) - len(set(good)) == 30
    words = [set(prompt.split()) for prompt, _ in good]
    assert 55 < sum(len(prompt.split()) for prompt, _ in good) / len(good) < 65
    for near in words[-30:]:
        assert any(len(near - other) == 1 and "otherwise" in near - other for other in words[:100])
    again = io.BytesIO()
    write_rows(again, 3000, seed=1)
    assert again.getvalue() == file.getvalue()


def test_stages_are_watched_and_their_counts_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["--rows", "400", "--rounds", "1", "--into", str(tmp_path), "--scratch", str(tmp_path), "--name", "t"])
    found: dict[str, Any] = json.loads((tmp_path / "data-t.json").read_text())
    (measured,) = found["runs"]
    assert measured["found"] == {"rows": 400, "rejected": 1, "equal rows": 4, "near copies": 4, "kept": 395}
    for samples in (*measured["samples"].values(), *measured["start_up"].values()):
        (sample,) = samples
        assert (
            sample["cpu_seconds"] > 0
            and sample["seconds"] > 0
            and 1e7 < sample["peak_bytes"] < found["limit"]["peak_bytes"]
        )
        assert sample["read_bytes"] > measured["input_bytes"]["fetch"]
    assert found["limit"]["met"] and found["growth"] == {"fetch": None, "prepare": None}
    said = capsys.readouterr().out
    assert "| 400 | fetch |" in said and "| 400 | prepare |" in said and "at most 3 GB: yes" in said


def test_a_lost_row_fails_the_benchmark(tmp_path: Path) -> None:
    folder = tmp_path / "data/prepared/rows"
    folder.mkdir(parents=True)
    train = {"raw": 1000, "rejected": 2, "duplicates": 10, "near_duplicates": 10, "kept": 900}
    summary = {"rows": {"train": train, "test": {"kept": 87}}, "leaks": [{"dropped": 1}]}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert check(tmp_path, Planted(1000, 2, 10, 10))["kept"] == 988
    for key in ("raw", "rejected", "duplicates", "near_duplicates", "kept"):
        wrong = json.loads(json.dumps(summary))
        wrong["rows"]["train"][key] -= 2
        (folder / "summary.json").write_text(json.dumps(wrong))
        with pytest.raises(RuntimeError, match="instead of"):
            check(tmp_path, Planted(1000, 2, 10, 10))


def test_the_floor_reads_every_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{broken\n\xff\n')
    assert set(floor(tmp_path / "rows.jsonl")) == {"lines", "json"}


def made(rows: int, fetch: float, prepare: float) -> dict[str, Any]:
    """Two rounds, of which the second's start-up takes ten times as long."""
    both = {"peak_bytes": 1e9, "seconds": 700.0, "load": 1.0}
    starts = [both | {"cpu_seconds": seconds, "read_bytes": 5} for seconds in (2, 20)]
    spent = {"fetch": fetch, "prepare": prepare}
    return {
        "planted": {"rows": rows},
        "input_bytes": {"fetch": 2 * rows, "prepare": 3 * rows},
        "samples": {
            stage: [s | {"cpu_seconds": s["cpu_seconds"] + spent[stage], "read_bytes": 5 + 3 * rows} for s in starts]
            for stage in spent
        },
        "start_up": {stage: starts for stage in spent},
        "floors": [{"lines": 0.1, "json": fetch / 4}],
    }


def test_start_up_is_taken_off_and_growth_is_the_exponent() -> None:
    runs = [made(100, 1, 1), made(1000, 10, 100), made(10_000, 100, 10_000)]
    assert growth(runs, "fetch") == pytest.approx(1) and growth(runs, "prepare") == pytest.approx(2)
    assert growth(runs[:1], "fetch") is None
    table = lines(runs).splitlines()
    assert table[4] == "| 1,000 | fetch | 10.0 s | 100 | 4.0 | 1,000 MB | 1.500 | 700.0 s |"
    assert table[5] == "| 1,000 | prepare | 100.0 s | 10 | 40.0 | 1,000 MB | 1.000 | 700.0 s |"
