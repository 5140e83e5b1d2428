"""Which method is recommended, in which words, and whose costs are ranked."""

from pathlib import Path
from typing import Any

import pytest

from molf.paths import Cell, read_json, write_json
from molf.report.comparison import build
from molf.report.verdicts import limits, listed, recommendation, sentence, verdicts
from tests.report import fake

MARGIN = 0.015


def group(
    methods: dict[str, tuple[float, float, float]], differences: dict[tuple[str, str], tuple[float, float]]
) -> dict[str, Any]:
    """A group with just what a recommendation reads.

    Args:
        methods: Mean score, peak memory and time by name; a name is its kind.
        differences: Bounds of the differences that are not sure to be greater than the margin.
    """
    found = []
    for name in methods:
        for versus in methods:
            if name != versus:
                low, high = differences.get((name, versus), (0.1, 0.2))
                gap = {"method": name, "versus": versus, "kind_versus": versus, "mean": (low + high) / 2}
                found.append({**gap, "low": low, "high": high, "seeds_needed": 7, "examples_needed": 2345})
    return {
        "task": "sql",
        "examples": 300,
        "methods": [
            {
                "method": name,
                "kind": name,
                "mean": mean,
                "peak_memory_bytes": memory,
                "train_seconds": time,
                "over_base": {"mean": 0.2, "low": 0.1, "high": 0.3},
            }
            for name, (mean, memory, time) in methods.items()
        ],
        "base": {"mean": 0.1},
        "differences": found,
        "costs_comparable": True,
        "why_not_comparable": None,
    }


def test_the_cheapest_of_those_that_are_not_worse_is_recommended() -> None:
    of = group(
        {"fft": (0.8, 400, 9), "lora": (0.79, 100, 5), "molf": (0.82, 300, 7)}, {("lora", "molf"): (-0.06, -0.02)}
    )
    found = recommendation(of, MARGIN, 3)
    assert found["method"] == "molf"  # lora takes less, but is worse
    assert "use molf (0.820): no other method beats it by more than 0.015" in found["sentence"]
    assert "of fft and molf, for which that holds, it takes the least memory" in found["sentence"]
    assert found["needs"] is None


def test_time_decides_between_methods_that_take_the_same_memory() -> None:
    found = recommendation(group({"fft": (0.8, 100, 9), "lora": (0.8, 101, 5), "molf": (0.8, 300, 1)}, {}), MARGIN, 3)
    assert found["method"] == "lora"
    assert "it is the fastest of those that take the least memory" in found["sentence"]


def test_no_method_is_said_to_lead_where_several_score_alike() -> None:
    bounds = {pair: (-0.05, 0.05) for pair in (("fft", "lora"), ("lora", "fft"))}
    said = recommendation(group({"fft": (0.8, 1, 1), "lora": (0.8, 1, 1)}, bounds), MARGIN, 3)["sentence"]
    assert "fft scores as high as any (0.800), but lora may beat it" in said


@pytest.mark.parametrize(("references", "word"), [(["fft", "lora"], "both"), (["fft", "lora", "lora-r4"], "all")])
def test_a_verdict_counts_its_references(references: list[str], word: str) -> None:
    of = group({name: (0.8, 1, 1) for name in [*references, "molf"]}, {})
    for method in of["methods"]:
        method["kind"] = method["kind"].partition("-")[0]
    [verdict] = verdicts(of, MARGIN, 3)
    assert f"molf keeps up: {word} lower bounds lie above -0.015" in verdict["sentence"]


def test_where_none_is_sure_not_to_be_worse_it_says_what_would_decide() -> None:
    of = group(
        {"fft": (0.80, 1, 1), "lora": (0.81, 1, 1)}, {("fft", "lora"): (-0.05, 0.03), ("lora", "fft"): (-0.03, 0.05)}
    )
    found = recommendation(of, MARGIN, 3)
    assert found["method"] is None
    assert "undecided" in found["sentence"]
    assert "lora scores highest (0.810), but fft may beat it by more than 0.015" in found["sentence"]
    assert found["needs"] == "7 seeds (now 3) or some 2,400 examples (now 300)"
    for d in of["differences"]:
        d["seeds_needed"] = None
    assert recommendation(of, MARGIN, 1)["needs"] == "some 2,400 examples (now 300), for these very weights"
    for d in of["differences"]:
        d["examples_needed"] = None
    assert recommendation(of, MARGIN, 3)["needs"] == "no number of seeds alone, nor of examples alone"


def test_without_comparable_costs_there_is_no_cheapest() -> None:
    of = group({"fft": (0.8, 4, 9), "lora": (0.8, 1, 5)}, {})
    unlike = {**of, "costs_comparable": False, "why_not_comparable": "the cells ran on unlike hardware (a, b)"}
    found = recommendation(unlike, MARGIN, 3)
    assert found["method"] is None
    assert "On sql, fft or lora: no other method beats one of these" in found["sentence"]
    assert "the cheapest cannot be said, for the cells ran on unlike hardware" in found["sentence"]
    # One alone needs no ranking.
    of["differences"][1] |= {"low": -0.09, "high": -0.02}
    assert recommendation({**of, "costs_comparable": False}, MARGIN, 3)["method"] == "fft"


def test_a_recommended_method_that_may_be_no_better_than_no_training_says_so() -> None:
    of = group({"fft": (0.8, 4, 9), "lora": (0.8, 1, 5)}, {})
    of["methods"][1]["over_base"]["low"] = -0.01
    assert recommendation(of, MARGIN, 3)["sentence"].endswith("not surely better than the untrained model (0.100)")


def test_one_method_alone_leaves_nothing_to_choose() -> None:
    found = recommendation(group({"molf": (0.8, 4, 9)}, {}), MARGIN, 3)
    assert (found["method"], found["candidates"]) == (None, [])
    assert found["sentence"] == "On sql, molf alone was trained: nothing to choose"


def test_an_undecided_verdict_says_what_would_decide_it() -> None:
    of = group({"fft": (0.8, 1, 1), "lora": (0.8, 1, 1), "molf": (0.8, 1, 1)}, {("molf", "lora"): (-0.03, 0.02)})
    (found,) = verdicts(of, MARGIN, 3)
    assert (found["outcome"], found["versus"]) == ("undecided", ["fft", "lora"])
    assert found["needs"] == "7 seeds (now 3) or some 2,400 examples (now 300)"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fake.write_tree(tmp_path, fake.raw_params())
    return tmp_path


def change(root: Path, file: str, **values: Any) -> None:
    path = root / Cell("tiny", "sql", "lora", 0).results / "train" / file
    write_json(path, {**read_json(path), **values})


def built(root: Path) -> dict[str, Any]:
    return build(fake.check_params(fake.raw_params(), "params.yaml"), root)


def test_the_sentence_names_the_method_of_each_task_first(root: Path) -> None:
    comparison = built(root)
    assert comparison["sentence"].startswith("On sql and fact, use molf (generated data). MoLF: molf keeps up")
    comparison["groups"][1]["recommendation"] = {"method": None, "candidates": []}
    undecided = "it is undecided which method to use on fact (molf scores highest)"
    assert sentence(comparison).startswith(f"On sql, use molf; {undecided} (generated data).")
    comparison["groups"][1]["recommendation"] = {"method": None, "candidates": ["fft", "molf"]}
    assert "; on fact, use fft or molf, whose costs cannot be compared (generated data)." in sentence(comparison)


def test_costs_of_one_quiet_machine_are_ranked(root: Path) -> None:
    comparison = built(root)
    assert comparison["costs_comparable"] is True
    # lora is beaten by fft in time and score; molf-e takes less memory than molf, which scores higher.
    assert comparison["groups"][0]["pareto"] == {
        "train_seconds": ["fft", "molf"],
        "peak_memory_bytes": ["molf-e", "molf"],
    }


@pytest.mark.parametrize(
    ("file", "values", "why"),
    [
        (
            "run.json",
            {"hardware": {"name": "another machine", "threads": 8, "fingerprint": "gpu"}},
            "the cells ran on unlike hardware (a machine with 1 threads, another machine with 8 threads)",
        ),
        (
            "summary.json",
            {"contended": True, "other_load": 1.5},
            "other programs kept the machine busy while tiny/sql/lora/seed-0 was trained",
        ),
    ],
)
def test_other_costs_are_not_ranked_and_it_says_why(root: Path, file: str, values: dict[str, Any], why: str) -> None:
    change(root, file, **values)
    comparison = built(root)
    sql, fact = comparison["groups"]
    assert (sql["costs_comparable"], sql["why_not_comparable"], sql["pareto"]) == (False, why, None)
    assert (fact["costs_comparable"], fact["why_not_comparable"]) == (True, None)
    assert comparison["costs_comparable"] is False
    assert f"tiny, sql: times and memory are not comparable and are not ranked: {why}." in limits(comparison)


def test_many_busy_cells_are_counted(root: Path) -> None:
    for path in root.glob("results/tiny/sql/*/seed-0/train/summary.json"):
        write_json(path, {**read_json(path), "contended": True})
    assert "while 4 of 4 cells were trained" in built(root)["groups"][0]["why_not_comparable"]


def test_a_load_that_nobody_measured_is_said(root: Path) -> None:
    change(root, "summary.json", contended=None)
    comparison = built(root)
    assert comparison["groups"][0]["costs_comparable"] is True
    assert any("is not known of every cell" in text for text in limits(comparison))


def test_listed() -> None:
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
