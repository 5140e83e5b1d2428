"""The page, the tables, the figures and the stage that writes them."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from molf.paths import read_json, write_json, write_parquet
from molf.report import comparison, figures, page
from molf.stages import compare
from tests.report import fake

HOSTILE = "<script>alert(1)</script>"
METHODS = [("fft", "fft"), ("lora", "lora"), ("molf", "molf"), ("molf-e", "molf-e")]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with results, in which the stage logs nothing."""
    fake.write_tree(tmp_path, fake.raw_params())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("molf.tracking.log_comparison", lambda *_: None)
    return tmp_path


def test_stage_writes_everything_and_prints_the_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.run()
    printed = capsys.readouterr().out
    reports = root / "reports"
    assert sorted(path.name for path in reports.iterdir()) == [
        "comparison.csv", "comparison.json", "figures", "report.html",
    ]  # fmt: skip
    names = {path.name for path in (reports / "figures").iterdir()}
    expected = ("score", "loss", "routing", "share", "cost")
    assert names == {f"tiny-{task}-{kind}.png" for task in ("sql", "fact") for kind in expected}
    assert len(pd.read_csv(reports / "comparison.csv")) == 10
    assert printed.strip() == page.terminal_table(read_json(reports / "comparison.json"))


def test_stage_output_is_reproducible(root: Path) -> None:
    compare.run()
    first = {path: path.read_bytes() for path in (root / "reports").rglob("*.*") if path.is_file()}
    compare.run()
    assert first == {path: path.read_bytes() for path in (root / "reports").rglob("*.*") if path.is_file()}


def test_page_is_self_contained_and_complete(root: Path) -> None:
    compare.run()
    text = (root / "reports/report.html").read_text()
    assert not re.search(r"https?://|//cdn|@import|url\(|<link|<script|<iframe", text)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 10
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert 'name="viewport"' in text
    for words in (
        "generated data",
        "examples only",
        "One seed",
        "0" * 40,
        "a machine",
        "gold does not run",
        "lora_alpha",
    ):
        assert words in text


def spoil(value: Any) -> Any:
    """Plain data with every text but hashes and splits made hostile."""
    if isinstance(value, dict):
        return {key: item if key in ("hash", "split") else spoil(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spoil(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_page_escapes_what_comes_from_data(root: Path) -> None:
    for path in root.glob("results/*/*/*/*/train/run.json"):
        run = read_json(path)
        run["hardware"]["name"] = run["versions"][HOSTILE] = HOSTILE
        run["data"] = {**spoil(run["data"]), "noticed": spoil(run["data"]["reasons"])}
        write_json(path, run)
    for path in root.glob("results/*/*/*/*/train/summary.json"):
        write_json(path, {**read_json(path), "warnings": [HOSTILE]})
    for path in root.glob("results/*/*/*/*/evaluation/metrics.json"):
        metrics = read_json(path)
        metrics["left_out"], metrics["metrics"][HOSTILE] = {HOSTILE: 1}, 1.0
        write_json(path, metrics)
    compare.run()
    text = (root / "reports/report.html").read_text()
    assert "<script" not in text
    shown = "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert f"<td>3</td><td>{shown}</td><td>{shown}</td><td>row 7</td><td>{shown}</td>" in text
    assert text.count(shown) > 20
    assert "<script" not in page.markdown_table(read_json(root / "reports/comparison.json"))


def section(text: str, heading: str) -> str:
    """What stands between a heading of the page and the next, its tags taken out."""
    inside = text.split(f"<h2>{heading}</h2>")[1].split("<h2>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", inside).split())


def test_page_shows_the_data_of_each_task(root: Path) -> None:
    compare.run()
    said = section((root / "reports/report.html").read_text(), "The data")
    for task in ("sql", "fact"):
        assert f"{task} generated data From the built-in generator, seed 3; licence: cc-by-4.0" in said
        assert f"hash-of-{task}" in said
    for words in (
        "train 60 48 3 4 1",
        "validation of train 5",
        f"train 3 question is not empty row 7 {'w' * 30}",
        "train test 1 1 0",
        "test 4 55.0% A",
        "test prompt 50 80 1,234",
        "warning test: 55% of the answers are &#39;A&#39;",
    ):
        assert said.count(words) == 2, words
    assert read_json(root / "reports/comparison.json")["data"]["sql"]["reasons"][0]["rows"] == 3


def test_page_shows_the_hashes_and_the_command_of_each_cell(root: Path) -> None:
    compare.run()
    said = section((root / "reports/report.html").read_text(), "How it was made")
    for name in ("tiny/sql/molf/seed-0", "tiny/fact/fft/seed-0"):
        run = read_json(root / f"results/{name}/train/run.json")
        metrics = read_json(root / f"results/{name}/evaluation/metrics.json")
        assert f"{name}: fingerprint {run['fingerprint']} molf lineage {name}" in said
        assert f"predictions (sha256) {metrics['lineage']['predictions']['sha256']}" in said
    assert "weights weights-of-molf-e" in said


def test_page_of_results_that_an_earlier_version_made(root: Path) -> None:
    for path in root.glob("results/*/*/*/*/train/*.json"):
        value = read_json(path)
        value.pop("lineage", None)
        if "data" in value:
            value["data"] = {"hash": value["data"]["hash"], "generated": True, "source": {"kind": "generated"}}
        write_json(path, value)
    for path in root.glob("results/*/*/*/*/evaluation/metrics.json"):
        value = read_json(path)
        del value["lineage"]
        write_json(path, value)
    compare.run()
    text = (root / "reports/report.html").read_text()
    assert "the built-in generator; licence: cc-by-4.0" in section(text, "The data")
    assert "weights - data hash-of-sql" in section(text, "How it was made")


def test_terminal_table(root: Path) -> None:
    compare.run()
    text = page.terminal_table(read_json(root / "reports/comparison.json"))
    lines = text.splitlines()
    assert lines[0].startswith("tiny / sql: execution_accuracy on 39 examples (1 left out: gold does not run)")
    assert lines[0].endswith("generated data")
    assert lines[1].split() == ["method", "score", "vs", "fft", "vs", "lora", "time", "memory", "trained", "routed"]
    assert re.match(r"  base    0\.103 \[", lines[2])
    molf = lines[5]
    assert re.match(r"  molf    0\.821 \[0\.\d{3}, 0\.\d{3}\]  \+0\.051 \[", molf)
    assert molf.endswith("8.4 s  200 MB  2 M      74 % full")
    assert "HOLDS: molf keeps up" in text
    assert text.endswith("\n".join(page.SEEN))


def test_one_sided_routing_and_unlike_hardware_are_loud(root: Path) -> None:
    path = root / "results/tiny/sql/molf/seed-0/train/summary.json"
    summary = read_json(path)
    summary["routing"].update(one_sided=True, share={"full": 1.0, "lora_r8": 0.0})
    write_json(path, {**summary, "warnings": ["one-sided routing: full won everything"]})
    run = root / "results/tiny/sql/molf/seed-0/train/run.json"
    write_json(run, {**read_json(run), "hardware": {"name": "other", "threads": 1, "fingerprint": "other"}})
    compare.run()
    text = page.terminal_table(read_json(root / "reports/comparison.json"))
    assert "100 % full  ONE-SIDED" in text
    assert "WARNING: molf: one-sided routing" in text
    assert "not comparable" in text
    assert not (root / "reports/figures/tiny-sql-cost.png").exists()


def test_markdown(root: Path) -> None:
    compare.run()
    result = read_json(root / "reports/comparison.json")
    text = page.markdown_table(result)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * 7
    assert all(row.count("|") == 9 for row in rows)
    published = page.published_readme(result)
    assert "tiny/fact/molf-e/seed-0" in published
    for name in re.findall(r"\]\((.*?)\)", published):
        assert (root / "reports" / name).exists()


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (page.seconds, 6.04, "6.0 s"),
        (page.seconds, 59.6, "60 s"),
        (page.seconds, 185, "3 min 05 s"),
        (page.seconds, 7800, "2 h 10 min"),
        (page.size, 820e6, "820 MB"),
        (page.size, 2.144e9, "2.14 GB"),
        (page.count, 850_000, "850 k"),
        (page.count, 1_720_000, "1.72 M"),
        (page.count, 12, "12"),
    ],
)
def test_units(function: Any, value: float, expected: str) -> None:
    assert function(value) == expected


def test_colours_stay_with_the_kind_and_never_repeat() -> None:
    assert figures.colours(METHODS) == figures.KIND_COLOURS
    many = figures.colours([*METHODS, ("lora-r8", "lora"), ("lora-r64", "lora"), ("dora", "dora")])
    assert len(set(many.values())) == 7


def test_routing_reductions(root: Path) -> None:
    routing = figures.read_routing(root / "results/tiny/sql/molf/seed-0/train")
    assert set(routing["step"]) == set(range(2, fake.STEPS + 1))  # the step with rate 0 does not count
    share = figures.share_so_far(routing)
    assert list(share.columns) == ["full", "lora_r8"]
    assert share.loc[2, "full"] == pytest.approx(5 / 6)
    assert share.sum(axis=1).tolist() == pytest.approx([1.0] * len(share))
    table = figures.first_expert_share(routing)
    assert list(table.index) == ["self_attn.q_proj", "mlp.up_proj"]
    assert list(table.columns) == [0, 1, 2]
    assert table.loc["mlp.up_proj", 1] == pytest.approx(9 / 11)


def test_sentence_names_models_when_there_are_several(root: Path) -> None:
    compare.run()
    result = read_json(root / "reports/comparison.json")
    result["grid"]["models"] = ["tiny", "other"]
    assert "sql with tiny" in comparison.sentence(result)


def test_routing_of_no_counted_step_is_left_out(root: Path) -> None:
    for method in ("molf", "molf-e"):
        path = root / f"results/tiny/sql/{method}/seed-0/train/routing.parquet"
        write_parquet(path, pd.read_parquet(path).assign(counted=False))
    compare.run()
    assert not (root / "reports/figures/tiny-sql-routing.png").exists()
    assert figures.share_so_far(figures.read_routing(root / "results/tiny/sql/molf/seed-0/train")).empty
