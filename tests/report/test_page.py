"""The page, the tables, and the stage that writes them."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from molf import cli
from molf.paths import read_json, write_json
from molf.report import page, sheets
from molf.report.verdicts import sentence
from molf.stages import compare
from tests.report.conftest import compared
from tests.report.hostile import HOSTILE, TEXTS

# What the page is made of; the SVG of the figures among it.
TAGS = set(
    "html head meta title style body main h1 h2 h3 h4 p strong em span div label select option section article ul li "
    "table thead tbody tr th td figure figcaption details summary pre code dl dt dd script "
    "svg g path use defs clippath rect text image".split()
)


class Elements(HTMLParser):
    """Every element of a page, with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def report(root: Path) -> str:
    return (root / "reports/report.html").read_text(encoding="utf-8")


def result(root: Path) -> Any:
    return read_json(root / "reports/comparison.json")


def test_stage_writes_everything_and_prints_the_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.run()
    printed = capsys.readouterr().out
    reports = root / "reports"
    assert sorted(path.name for path in reports.iterdir()) == ["comparison.csv", "comparison.json", "report.html"]
    assert len(pd.read_csv(reports / "comparison.csv")) == 10
    assert printed.strip() == page.terminal_table(result(root))


def test_stage_output_is_reproducible(hostile: Path) -> None:
    first = {path: path.read_bytes() for path in (hostile / "reports").rglob("*.*") if path.is_file()}
    compared(hostile)
    assert first == {path: path.read_bytes() for path in (hostile / "reports").rglob("*.*") if path.is_file()}
    assert {".png", ".svg", ".html", ".json", ".csv"} == {path.suffix for path in first}


@pytest.mark.parametrize("project", ["made", "hostile"])
def test_page_loads_nothing_and_holds_no_element_of_the_data(project: str, request: pytest.FixtureRequest) -> None:
    text = report(request.getfixturevalue(project))
    elements = Elements(text).found
    assert {tag for tag, _ in elements} <= TAGS
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    # Addresses: parts of the same page, and the pictures of the colour scales.
    addresses = [a[key] or "" for _, a in elements for key in ("src", "href", "xlink:href") if key in a]
    assert all(re.match(r"#|data:image/png;base64,", address) for address in addresses)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    scripts = [attributes for tag, attributes in elements if tag == "script"]
    assert scripts[-1] == {} and all(s == {"type": "application/json"} for s in scripts[:-1])
    policy = next(a["content"] or "" for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "script-src 'sha256-" in policy
    assert len(text) < 3_000_000


def test_ids_are_unique_and_what_they_point_at_is_there(made: Path) -> None:
    elements = Elements(report(made)).found
    ids = [a["id"] for _, a in elements if "id" in a]
    pointed = [(a.get("xlink:href") or "#").removeprefix("#") for tag, a in elements if tag == "use"]
    assert len(ids) == len(set(ids)) and pointed and set(pointed) <= set(ids)


def test_page_shows_what_comes_from_data_as_text(hostile: Path) -> None:
    text = report(hostile)
    for harm in TEXTS:
        assert harm not in text or harm == "javascript:alert(4)", harm  # that is harmless but in an address
    shown = html.escape(HOSTILE, quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    assert text.count(shown) > 20
    for harm in ("<script", "<img", "<svg onload"):
        assert harm not in page.markdown_table(result(hostile)), harm


def test_figures_show_what_comes_from_data_as_text(hostile: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    for path in (hostile / "reports/figures").glob("*.svg"):
        tree = ElementTree.parse(path)  # well-formed
        assert not [e for e in tree.iter() if e.tag.rpartition("}")[2] in ("script", "img")]
        assert not [name for e in tree.iter() for name in e.attrib if name.startswith("on")]
    said = "".join(ElementTree.parse(hostile / "reports/figures/tiny-sql-moved.svg").getroot().itertext())
    assert "<script>alert(1)</script>" in said and "$x^2$" in said


def test_examples_in_the_page_are_whole(hostile: Path) -> None:
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', report(hostile), re.DOTALL)
    assert len(blocks) == 1
    assert not set("<>&\u2028\u2029") & set(blocks[0])
    example = json.loads(blocks[0])["examples"][0]
    assert example["gold"].endswith(HOSTILE) and example["answers"][0].endswith(HOSTILE)


def section(text: str, heading: str) -> str:
    """What stands between a heading of the page and the next, its tags taken out."""
    inside = text.split(f"<h2>{heading}</h2>")[1].split("<h2>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", inside).split())


def test_page_begins_with_the_verdict_and_ends_with_the_commands(made: Path) -> None:
    text, found = report(made), result(made)
    start = html.unescape(" ".join(re.sub(r"<[^>]*>", " ", text.split("<main>")[1]).split()))
    assert start.startswith(f"Full fine-tuning, LoRA or MoLF? {found['sentence']}")
    for group in found["groups"]:
        assert group["recommendation"]["sentence"] in html.unescape(section(text, "What to use"))
    last = section(text, "How it was made")
    assert f"git checkout {'0' * 40}" in last and "dvc repro compare" in last
    assert "dvc repro evaluate@tiny-sql-molf-0" in last and "hash-of-tiny" in last and "data sql: hash-of-sql" in last
    assert "margin" in last and "lora_alpha" in last


def test_page_shows_costs_forgetting_tests_and_the_paper_s_score(made: Path) -> None:
    said = html.unescape(section(report(made), "sql with tiny"))
    group = result(made)["groups"][0]
    for words in (
        "gold does not run",
        "generated",
        "tokens/s",
        "400 J",
        "CPU packages (RAPL)",
        "general loss",
        "intruders",
        "molf 2.117 +0.117",
        "McNemar",
        group["paper"]["sentence"],
        group["verdicts"][0]["sentence"],
        "Where the answers differ",
        "Answers that did not run, by reason",
        "method no such column syntax base 2 1 fft 2 1",
    ):
        assert words in said, words


def test_page_shows_the_data_of_each_task(made: Path) -> None:
    said = section(report(made), "The data")
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
    assert result(made)["data"]["sql"]["reasons"][0]["rows"] == 3


def test_page_shows_the_hashes_and_the_command_of_each_cell(made: Path) -> None:
    said = section(report(made), "How it was made")
    for name in ("tiny/sql/molf/seed-0", "tiny/fact/fft/seed-0"):
        run = read_json(made / f"results/{name}/train/run.json")
        metrics = read_json(made / f"results/{name}/evaluation/metrics.json")
        assert f"{name}: fingerprint {run['fingerprint']} molf lineage {name}" in said
        assert f"predictions (sha256) {metrics['lineage']['predictions']['sha256']}" in said
    assert "weights weights-of-molf-e" in said


def test_page_of_results_that_an_earlier_version_made(root: Path) -> None:
    for path in root.glob("results/*/*/*/*/train/*.json"):
        value = read_json(path)
        for key in ("lineage", "energy_joules", "energy_source", "contended", "other_load"):
            value.pop(key, None)
        if "data" in value:
            value["data"] = {"hash": value["data"]["hash"], "generated": True, "source": {"kind": "generated"}}
        write_json(path, value)
    for path in root.glob("results/*/*/*/*/evaluation/metrics.json"):
        value = read_json(path)
        for key in ("lineage", "general", "weights"):
            value.pop(key, None)
        write_json(path, value)
    for path in root.glob("results/*/*/*/*/evaluation/predictions.parquet"):
        pd.read_parquet(path).drop(columns=["prompt", "gold"]).to_parquet(path)
    compare.run()
    text = report(root)
    assert "the built-in generator; licence: cc-by-4.0" in section(text, "The data")
    assert "weights - data hash-of-sql" in section(text, "How it was made")
    assert "What was forgotten" not in text and "energy" not in section(text, "sql with tiny")
    assert "Where the answers differ" in text and "<dt>prompt</dt>" not in text
    assert "general loss" not in page.terminal_table(result(root))


def test_terminal_table(made: Path) -> None:
    text = page.terminal_table(result(made))
    lines = text.splitlines()
    assert lines[0].startswith("tiny / sql: execution_accuracy on 39 examples (1 left out: gold does not run)")
    assert lines[0].endswith("generated data")
    assert lines[1].split() == ["method", "score", "vs", "fft", "vs", "lora"]
    assert re.match(r"  base    0\.103 \[", lines[2])
    assert re.match(r"  molf    0\.821 \[0\.\d{3}, 0\.\d{3}\]  \+0\.051 \[", lines[5])
    costs = lines[8:13]
    assert costs[0].split() == "method time tokens/s memory trained on disk energy evaluation routed".split()
    assert costs[3].split() == "molf 8.4 s 1,100 200 MB 2 M 10 MB 200 J 1.0 s 74 % full".split()
    assert re.match(r"  fft     2\.039         \+0\.039 \[", lines[16])
    assert max(map(len, lines)) <= page.WIDTH
    said = " ".join(text.split())
    group = result(made)["groups"][0]
    assert f"USE: {group['recommendation']['sentence']}" in said and "HOLDS: molf keeps up" in said
    assert result(made)["sentence"] in said
    assert text.endswith("\n".join(page.SEEN))


def test_show_prints_the_comparison_unless_an_earlier_version_made_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["show"]) == 2
    assert "make run" in capsys.readouterr().err
    found = result(made)
    write_json(tmp_path / "reports/comparison.json", found)
    assert cli.run(["show"]) == 0
    assert found["sentence"] in " ".join(capsys.readouterr().out.split())
    for group in found["groups"]:
        del group["recommendation"]
    write_json(tmp_path / "reports/comparison.json", found)
    assert cli.run(["show"]) == 2
    assert "an earlier molf made it; `make run`" in capsys.readouterr().err


def test_what_would_decide_an_open_verdict_is_said(made: Path) -> None:
    found = result(made)
    needs = "9 seeds (now 1)"
    found["groups"][0]["verdicts"][0].update(outcome="undecided", needs=needs)
    undecided: dict[str, Any] = {
        "method": None,
        "candidates": [],
        "sentence": "On sql, it is undecided",
        "needs": needs,
    }
    found["groups"][0]["recommendation"] = undecided
    for text in (page.terminal_table(found), page.markdown_table(found), page.render(found, [], made, [])):
        assert " ".join(text.split()).count(needs) >= 2
    glance = sheets.glance(found)
    assert glance.rows[0][2] == ("undecided", None) and glance.rows[0][6] == ("undecided", None)
    assert glance.rows[1][2] == ("molf", None)
    # Where costs cannot be ranked, no one method is the cheapest.
    undecided["candidates"] = ["fft", "molf"]
    assert sheets.glance(found).rows[0][2] == ("fft or molf", None)


def test_one_sided_routing_and_unlike_hardware_are_loud(root: Path) -> None:
    path = root / "results/tiny/sql/molf/seed-0/train/summary.json"
    summary = read_json(path)
    summary["routing"].update(one_sided=True, share={"full": 1.0, "lora_r8": 0.0})
    write_json(path, {**summary, "warnings": ["one-sided routing: full won everything"]})
    run = root / "results/tiny/sql/molf/seed-0/train/run.json"
    write_json(run, {**read_json(run), "hardware": {"name": "other", "threads": 1, "fingerprint": "other"}})
    compare.run()
    text = page.terminal_table(result(root))
    assert "100 % full  ONE-SIDED" in text
    assert "WARNING: molf: one-sided routing" in text
    assert text.count("NOT COMPARABLE: times and memory") == 1
    assert "**not comparable**" in page.markdown_table(result(root))
    assert "Times and memory are not ranked" in report(root)


def test_markdown(made: Path) -> None:
    text = page.markdown_table(result(made))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * (7 + 6 + 7)
    assert [row.count("|") for row in rows[:20]] == [5] * 7 + [10] * 6 + [7] * 7
    published = page.published_readme(result(made))
    assert "tiny/fact/molf-e/seed-0" in published
    pictures = re.findall(r"\]\((.*?)\)", published)
    assert len(pictures) == 8
    assert all((made / "reports" / name).exists() for name in pictures)


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (sheets.seconds, 6.04, "6.0 s"),
        (sheets.seconds, 59.6, "60 s"),
        (sheets.seconds, 185, "3 min 05 s"),
        (sheets.seconds, 7800, "2 h 10 min"),
        (sheets.size, 820e6, "820 MB"),
        (sheets.size, 2.144e9, "2.14 GB"),
        (sheets.count, 850_000, "850 k"),
        (sheets.count, 1_720_000, "1.72 M"),
        (sheets.count, 12, "12"),
    ],
)
def test_units(function: Any, value: float, expected: str) -> None:
    assert function(value) == expected


def test_a_table_too_wide_for_the_terminal_goes_on_below() -> None:
    rows = [["method", "score", "vs fft", "vs lora"], ["molf", "0.8", "+0.1", "+0.2"]]
    assert sheets.aligned(rows, 30) == ["method  score  vs fft  vs lora", "molf    0.8    +0.1    +0.2"]
    below = ["method  score  vs fft", "molf    0.8    +0.1", "method  vs lora", "molf    +0.2"]
    assert sheets.aligned(rows, 29) == below
    assert len(sheets.aligned(rows, 5)) == 6  # nothing is left out, however narrow


def test_sentence_names_models_when_there_are_several(made: Path) -> None:
    found = result(made)
    found["grid"]["models"] = ["tiny", "other"]
    assert "sql with tiny" in sentence(found)
