"""A comparison of which cells lack: what is there is compared, what lacks is said, nothing claimed that needs it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molf import gate
from molf.config import Params
from molf.errors import RunError, UserError
from molf.paths import Cell, read_json, write_json
from molf.report import lacking, page
from molf.report.comparison import build, difference, flat
from molf.report.lacking import Kind, Lack
from molf.report.verdicts import limits
from molf.stages import compare
from tests.report import fake

WHY = Lack(Kind.MEMORY, "no room for <b>this</b>")


def cell(task: str, method: str, seed: int = 0) -> Cell:
    return Cell("tiny", task, method, seed)


def tree(root: Path, cells: Sequence[Cell], seeds: tuple[int, ...] = (0,), said: bool = True) -> Params:
    """A project in which some cells failed."""
    root.mkdir(exist_ok=True)
    params = fake.write_tree(root, fake.raw_params(seeds=seeds))
    for one in cells:
        shutil.rmtree(root / one.results)
    if said:
        lacking.write(dict.fromkeys(cells, WHY), root)
    return params


def of_group(found: dict[str, Any], task: str) -> dict[str, Any]:
    return next(group for group in found["groups"] if group["task"] == task)


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_on_one_line_and_nothing_lacking_leaves_no_file(tmp_path: Path) -> None:
    one, other = cell("sql", "molf", 3), cell("sql", "base")
    lacking.write({one: Lack(Kind.FAILED, "first\nsecond \x1b[31m" + "x" * 999), other: Lack(Kind.LOST, "")}, tmp_path)
    found = lacking.read(tmp_path)
    assert found[one].kind is Kind.FAILED
    assert found[one].reason.startswith("first second [31mxxx") and len(found[one].reason) == lacking.LONGEST
    assert found[other] == Lack(Kind.LOST, "no reason was given")
    lacking.write({}, tmp_path)
    lacking.write({}, tmp_path)
    assert not (tmp_path / lacking.PATH).exists() and lacking.read(tmp_path) == {}


def test_a_reason_alone_is_that_of_a_failure(tmp_path: Path) -> None:
    write_json(tmp_path / lacking.PATH, {"tiny/sql/fft/seed-0": "gone"})
    assert lacking.read(tmp_path) == {cell("sql", "fft"): Lack(Kind.FAILED, "gone")}


GOOD = {"kind": "failed", "reason": "x"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "lacking.json cannot be read (Expecting"),
        ("[" * 100_000, "lacking.json cannot be read ("),
        ("\udcff", "lacking.json cannot be read ("),
        ("[]", "holds no object of cells' names"),
        ('{"../../x/seed-0": {}}', "'../../x/seed-0' is no cell's name (MODEL/TASK/METHOD/seed-S)"),
        (json.dumps({"tiny/sql/fft/seed-00": GOOD}), "'tiny/sql/fft/seed-00' is no cell's name"),
        (json.dumps({"tiny/sql/fft/seed-" + "9" * 5000: GOOD}), "is no cell's name"),
        ('{"tiny/sql/fft/seed-0": 7}', "'tiny/sql/fft/seed-0' needs kind and reason, both text"),
        ('{"tiny/sql/fft/seed-0": {"kind": "failed", "reason": 3}}', "needs kind and reason, both text"),
        ('{"tiny/sql/fft/seed-0": {"kind": "tired", "reason": ""}}', "has kind 'tired'; one of: out of memory, lost, "),
    ],
)
def test_an_edited_file_is_a_message(tmp_path: Path, text: str, said: str) -> None:
    params = tree(tmp_path, [])
    (tmp_path / lacking.PATH).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        build(params, tmp_path)
    assert said in str(caught.value)
    assert "remove it if no cell lacks" in str(caught.value)


# --- which cells lack ------------------------------------------------------------------------------------------------


def test_a_cell_that_lacks_unnamed_is_refused_as_ever(tmp_path: Path) -> None:
    params = tree(tmp_path, [cell("sql", "fft"), cell("fact", "molf")], said=False)
    lacking.write({cell("sql", "fft"): WHY}, tmp_path)
    with pytest.raises(UserError) as caught:
        build(params, tmp_path)
    assert "tiny/fact/molf/seed-0: " in str(caught.value) and "tiny/sql/fft" not in str(caught.value)


def test_a_named_cell_whose_results_are_there_lacks_no_more(tmp_path: Path) -> None:
    params = tree(tmp_path, [])
    before = build(params, tmp_path)
    named = [cell("sql", "fft"), cell("sql", "base"), cell("fact", "molf"), Cell("gone", "sql", "fft", 0)]
    lacking.write(dict.fromkeys(named, WHY), tmp_path)
    assert build(params, tmp_path) == before
    assert before["lacking_cells"] == [] and not page.lacking(before)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("train/run.json", {"config": {}}),  # of other params
        ("train/run.json", {"code": "other"}),  # which does not fit its neighbours
        ("evaluation/metrics.json", {"data_hash": "other"}),
        ("evaluation/metrics.json", {"primary": None, "fingerprint": []}),
    ],
)
def test_a_named_cell_whose_results_do_not_fit_lacks(tmp_path: Path, file: str, change: dict[str, Any]) -> None:
    params = tree(tmp_path, [])
    path = tmp_path / cell("sql", "fft").results / file
    if change.get("primary", "") is None:
        path.write_text("{}")
    else:
        write_json(path, {**read_json(path), **change})
    with pytest.raises(UserError):
        build(params, tmp_path)
    lacking.write({cell("sql", "fft"): WHY}, tmp_path)
    assert [of["cell"] for of in build(params, tmp_path)["lacking_cells"]] == ["tiny/sql/fft/seed-0"]


def test_where_every_cell_lacks_nothing_is_compared(tmp_path: Path) -> None:
    params = tree(tmp_path, [])
    every = params.cells()
    for one in every:
        shutil.rmtree(tmp_path / one.results)
    lacking.write(dict.fromkeys(every, WHY), tmp_path)
    with pytest.raises(UserError) as caught:
        build(params, tmp_path)
    assert len(caught.value.problems) == len(every) + 1
    assert "tiny/sql/fft/seed-0 lacks: out of memory: no room for <b>this</b>" in caught.value.problems
    assert "nothing can be compared" in caught.value.problems[-1]


# --- what is compared ------------------------------------------------------------------------------------------------


def test_a_method_without_any_cell_is_said_to_lack_and_what_needs_it_is_open(tmp_path: Path) -> None:
    found = build(tree(tmp_path, [cell("sql", "fft")]), tmp_path)
    sql, fact = of_group(found, "sql"), of_group(found, "fact")
    assert [m["method"] for m in sql["methods"]] == ["lora", "molf", "molf-e"]
    assert difference(sql, "molf", "fft") is None
    verdicts = {v["method"]: v for v in sql["verdicts"]}
    assert verdicts["molf"]["outcome"] == "undecided"  # it holds where fft is there
    assert verdicts["molf"]["sentence"].startswith("molf undecided: tiny/sql/fft/seed-0 lacks (+0.308 [")
    assert verdicts["molf"]["needs"] == "the results of tiny/sql/fft/seed-0"
    assert sql["recommendation"] == {
        "method": None,
        "candidates": [],
        "sentence": "On sql, it is undecided which method to use: tiny/sql/fft/seed-0 lacks; of those that are there "
        "molf scores highest (0.821)",
        "needs": "the results of tiny/sql/fft/seed-0",
    }
    assert fact["recommendation"]["method"] is not None
    assert {v["outcome"] for v in fact["verdicts"] if v["method"] == "molf"} == {"holds"}
    assert "1 of 8 cells lacks. " in found["sentence"]
    assert "it is undecided which method to use on sql" in found["sentence"]
    assert any(text.startswith("1 of 8 cells lacks. What needs them") for text in limits(found))
    table = flat(found)
    assert table[table["method"] == "fft"][["task", "seeds", "seeds_lacking"]].values.tolist() == [
        ["fact", 1, 0],
        ["sql", 0, 1],
    ]


def test_what_fails_by_those_that_are_there_fails(tmp_path: Path) -> None:
    """molf-e falls behind full fine-tuning, whatever LoRA would have reached."""
    found = of_group(build(tree(tmp_path, [cell("sql", "lora")]), tmp_path), "sql")
    assert {v["method"]: v["outcome"] for v in found["verdicts"]} == {"molf": "undecided", "molf-e": "fails"}


def test_a_method_of_ours_that_lacks_has_an_open_verdict(tmp_path: Path) -> None:
    found = of_group(build(tree(tmp_path, [cell("sql", "molf")]), tmp_path), "sql")
    [verdict] = [v for v in found["verdicts"] if v["method"] == "molf"]
    assert verdict["outcome"] == "undecided" and verdict["sentence"] == "molf undecided: tiny/sql/molf/seed-0 lacks"


def test_a_method_that_is_left_alone_is_not_said_to_be_the_only_one_trained(tmp_path: Path) -> None:
    absent = [cell(task, method) for task in ("sql", "fact") for method in ("lora", "molf", "molf-e")]
    found = build(tree(tmp_path, absent), tmp_path)
    assert "only one method" not in found["sentence"]
    assert "6 of 8 cells lack. " in found["sentence"]
    said = of_group(found, "sql")["recommendation"]["sentence"]
    assert said.endswith("3 cells lack; of those that are there fft is alone (0.769)") or "tiny/sql/lora/seed-0" in said


def test_seeds_that_lack_are_dropped_pair_by_pair(tmp_path: Path) -> None:
    seeds = (0, 1, 2, 3)
    full = build(tree(tmp_path / "full", [], seeds), tmp_path / "full")
    three = build(tree(tmp_path / "three", [], seeds[:3]), tmp_path / "three")
    params = tree(tmp_path / "some", [cell("sql", "molf", 3)], seeds)
    found = build(params, tmp_path / "some")
    sql = of_group(found, "sql")

    def of(table: dict[str, Any], method: str, versus: str) -> dict[str, Any]:
        return dict(difference(of_group(table, "sql"), method, versus) or {})

    assert of(found, "molf", "fft") == of(three, "molf", "fft")  # of the seeds 0 to 2 of both
    assert of(found, "fft", "lora") == of(full, "fft", "lora")
    assert of(found, "molf", "fft")["seeds"] == [0, 1, 2] and of(found, "fft", "lora")["seeds"] == [0, 1, 2, 3]
    numbers = {m["method"]: m for m in sql["methods"]}
    assert [s["seed"] for s in numbers["molf"]["per_seed"]] == [0, 1, 2]
    assert numbers["molf"]["mean"] == pytest.approx(np.mean([32, 31, 30]) / 39)
    assert numbers["molf"]["over_base"] == of_group(three, "sql")["methods"][2]["over_base"]
    assert numbers["molf"]["general"] == of_group(three, "sql")["methods"][2]["general"]
    assert numbers["fft"]["general"] == of_group(full, "sql")["methods"][0]["general"]
    assert numbers["molf"]["warnings"][0].startswith("of seeds 0, 1, 2 and 3 only 0, 1 and 2 are there: ")
    assert numbers["fft"]["warnings"] == []
    assert [t["seed"] for t in sql["tests"] if (t["method"], t["versus"]) == ("fft", "molf")] == [0, 1, 2]
    [verdict] = [v for v in sql["verdicts"] if v["method"] == "molf"]
    assert verdict["outcome"] == "undecided"
    assert "against fft on seeds 0, 1 and 2 alone" in verdict["sentence"]
    assert sql["recommendation"]["method"] is None
    assert found["interval"] == "seeds and examples"
    paper = {v["method"]: v["outcome"] for v in sql["paper"]["verdicts"]}
    assert paper["molf"] == "undecided"


def test_methods_without_a_common_seed_are_not_compared(tmp_path: Path) -> None:
    params = tree(tmp_path, [cell("sql", "fft", 0), cell("sql", "lora", 1)], (0, 1))
    found = build(params, tmp_path)
    sql = of_group(found, "sql")
    assert difference(sql, "fft", "lora") is None and difference(sql, "lora", "fft") is None
    molf = difference(sql, "molf", "fft")
    assert molf is not None and molf["seeds"] == [1]
    assert found["interval"] == "exploratory, but examples only where seeds lack"
    assert "of fft and lora" not in sql["paper"]["sentence"]


def test_which_reference_is_better_on_the_papers_score_is_open_where_seeds_lack(tmp_path: Path) -> None:
    sql = of_group(build(tree(tmp_path, [cell("sql", "fft", 1)], (0, 1)), tmp_path), "sql")
    assert "of fft and lora cells lack (" in sql["paper"]["sentence"] and "on seed 0 alone" in sql["paper"]["sentence"]


def test_a_task_without_any_cell_is_left_out_and_named(tmp_path: Path) -> None:
    params = tree(tmp_path, [cell("sql", method) for method in ("fft", "lora", "molf", "molf-e")])
    found = build(params, tmp_path)
    assert [group["task"] for group in found["groups"]] == ["fact"]
    assert "4 of 8 cells lack, so nothing is said of sql. " in found["sentence"]
    assert list(flat(found)["task"]).count("sql") == 4
    shutil.rmtree(tmp_path / "results/tiny/sql")  # the untrained model's scores of it as well
    with pytest.raises(UserError, match="the untrained model, the zero row of every table, has no scores"):
        build(params, tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_without_the_untrained_models_scores_a_task_is_not_compared(tmp_path: Path, there: bool) -> None:
    """Nor with scores of another model's."""
    params = tree(tmp_path, [])
    path = tmp_path / cell("sql", "base").results / "evaluation/metrics.json"
    if there:
        write_json(path, {**read_json(path), "train_fingerprint": "of another"})
    else:
        path.unlink()
    lacking.write({cell("sql", "base"): WHY}, tmp_path)
    found = build(params, tmp_path)
    assert [group["task"] for group in found["groups"]] == ["fact"]
    kinds = {of["cell"]: of["kind"] for of in found["lacking_cells"]}
    assert kinds.pop("tiny/sql/base/seed-0") == "out of memory"
    assert kinds == {cell("sql", m).name: "not compared" for m in ("fft", "lora", "molf", "molf-e")}
    assert "4 of 8 cells lack, so nothing is said of sql. " in found["sentence"]


# --- where it is said ------------------------------------------------------------------------------------------------


@pytest.mark.acceptance
def test_page_terminal_and_markdown_say_first_what_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole stage with all figures: a seed of one method lacks, another wholly on one task."""
    tree(tmp_path, [cell("sql", "molf", 1), cell("fact", "molf", 0), cell("fact", "molf", 1)], (0, 1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("molf.tracking.log_comparison", lambda *_: None)
    compare.run()
    found = read_json(tmp_path / "reports/comparison.json")
    names = ["tiny/sql/molf/seed-1", "tiny/fact/molf/seed-0", "tiny/fact/molf/seed-1"]
    assert [of["cell"] for of in found["lacking_cells"]] == names
    terminal, markdown = page.terminal_table(found), page.markdown_table(found)
    assert terminal.startswith(f"LACKING: {', '.join(names[:2])}")
    assert "(out of memory: no room for <b>this</b>)" in " ".join(terminal.split("\n\n")[0].split())
    first, _, second, *_ = markdown.split("\n")
    assert "3 of 16 cells lack. " in first
    assert second.startswith("- **lacking**: tiny/sql/molf/seed-1") and "&#60;b&#62;this" in second
    text = (tmp_path / "reports/report.html").read_text()
    at = [text.index(part) for part in ("</h1>", ">lacking</span>", "<h2>What to use</h2>")]
    assert at == sorted(at)
    assert "<b>this</b>" not in text and "no room for &lt;b&gt;this&lt;/b&gt;" in text
    assert "13 cells are there" in text
    assert len(list((tmp_path / "reports/figures").glob("*.png"))) > 10


def test_a_record_of_an_earlier_molf_lacks_nothing(tmp_path: Path) -> None:
    found = build(tree(tmp_path, []), tmp_path)
    whole = page.terminal_table(found)
    del found["lacking_cells"]
    for group in found["groups"]:
        del group["lacking"]
    assert page.terminal_table(found) == whole and "LACKING" not in whole


@pytest.mark.parametrize(("method", "code"), [("fft", True), ("molf-e", False)])
def test_a_gate_does_not_pass_where_a_cell_lacks_that_had_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, code: bool
) -> None:
    from molf import commands

    result = {"fell": [], "lacking": [cell("sql", "fft").name] if code else [], "rows": [], "from": "a", "to": "b"}
    monkeypatch.setattr(gate, "against", lambda *_: {**result, "confidence": 0.95, "only_then": [], "only_now": []})
    monkeypatch.setattr(commands, "load_params", lambda: None)
    if code:
        with pytest.raises(RunError, match="tiny/sql/fft/seed-0: scored at HEAD and lacking here"):
            commands.compare_with("HEAD", True)
    else:
        commands.compare_with("HEAD", True)
