"""The gate: which models may be promoted, and what becomes of the best; on made-up comparisons."""

from typing import Any

import pytest

from molf.blocks import Gate, Promotion
from molf.config import check_params
from molf.errors import UserError
from molf.paths import Cell
from molf.promotion import Action, Candidate, Measured, Rival, best, candidates, decide, table
from molf.report.statistics import Outcome
from tests.report import fake

NOW = Measured("sql", "execution_accuracy", "d" * 16, "e" * 64)
MARGIN = 0.05


def method(name: str, mean: float, seeds: tuple[float, ...] = (), **other: Any) -> dict[str, Any]:
    return {
        "method": name,
        "mean": mean,
        "low": mean - 0.04,
        "high": mean + 0.04,
        "over_base": {"mean": mean - 0.3, "low": mean - 0.35, "high": mean - 0.25},
        "general": {"loss": 2.0, "mean": 0.1, "low": 0.05, "high": 0.15},
        "peak_memory_bytes": 2 * 10**9,
        "train_seconds": 100.0,
        "weights_bytes": 10**9,
        "contended": False,
        "per_seed": [
            {"seed": i, "score": score, "train_fingerprint": f"{name}-{i}"} for i, score in enumerate(seeds or (mean,))
        ],
        **other,
    }


def comparison(*methods: dict[str, Any], models: tuple[str, ...] = ("tiny",), half: float = 0.03) -> dict[str, Any]:
    """Of one task; every difference is that of the means, `half` to both sides."""
    pairs = [(one, other) for one in methods for other in methods if one is not other]
    differences = [
        {
            "method": one["method"],
            "versus": other["method"],
            "mean": (mean := one["mean"] - other["mean"]),
            "low": mean - half,
            "high": mean + half,
        }
        for one, other in pairs
    ]
    group = {"task": "sql", "methods": list(methods), "differences": differences}
    grid = {
        "models": list(models),
        "methods": [one["method"] for one in methods],
        "seeds": sorted({seed["seed"] for one in methods for seed in one["per_seed"]}),
    }
    return {"margin": MARGIN, "grid": grid, "groups": [{"model": model, **group} for model in models]}


def looked_at(of: dict[str, Any], **gate: Any) -> dict[str, Candidate]:
    return {one.cell.method: one for one in candidates(of, "sql", Gate.model_validate(gate))}


def test_the_best_that_passes_is_taken_not_the_best_of_all() -> None:
    of = comparison(method("fft", 0.8, weights_bytes=9 * 10**9), method("lora", 0.79))
    found = candidates(of, "sql", Gate.model_validate({"cost": {"weights_gb": 2}}))
    assert [one.cell.method for one in found] == ["fft", "lora"]
    chosen = best(found)
    assert chosen is not None and chosen.cell == Cell("tiny", "sql", "lora", 0)
    assert found[0].failed == ("cost: weights 9.00 GB, at most 2.00 GB",)


@pytest.mark.parametrize(
    ("scores", "seed"),
    [((0.7,), 0), ((0.9, 0.71, 0.6), 1), ((0.6, 0.8), 0), ((0.5, 0.5, 0.8), 0), ((0.5, 0.62, 0.8, 0.6), 1)],
)
def test_the_seed_nearest_the_mean_stands_for_a_method_never_the_best(scores: tuple[float, ...], seed: int) -> None:
    one = looked_at(comparison(method("fft", sum(scores) / len(scores), scores)))["fft"]
    assert (one.cell.seed, one.score, one.fingerprint) == (seed, scores[seed], f"fft-{seed}")


@pytest.mark.parametrize(
    ("asked", "gap", "half", "failed"),
    [
        ("holds", 0.0, 0.03, ""),
        ("holds", -0.04, 0.03, "verdict: undecided"),
        ("holds", -0.1, 0.03, "verdict: worse"),
        ("not-fails", -0.04, 0.03, ""),
        ("not-fails", -0.1, 0.03, "verdict: worse by more than 0.05"),
        ("any", -0.1, 0.03, ""),
    ],
)
def test_the_verdict_is_non_inferiority_to_every_other_method(asked: str, gap: float, half: float, failed: str) -> None:
    of = comparison(method("fft", 0.8), method("lora", 0.8 + gap), method("molf", 0.8), half=half)
    one = looked_at(of, verdict=asked)["lora"]
    assert bool(one.failed) == bool(failed)
    assert all(text.startswith(failed) for text in one.failed)


@pytest.mark.parametrize(
    ("gate", "failed"),
    [
        ({"score": 0.65}, ""),
        ({"score": 0.67}, "score: lower bound 0.660, at least 0.67"),  # the mean, 0.7, would do
        ({"gain": {"untrained": 0.35}}, ""),
        ({"gain": {"untrained": 0.36}}, "gain over the untrained model: lower bound +0.350, at least 0.36"),
        ({"gain": {"untrained": None}}, ""),
        ({"cost": {"peak_memory_gb": 2}}, ""),
        ({"cost": {"peak_memory_gb": 1.9}}, "cost: peak memory 2.00 GB, at most 1.90 GB"),
        ({"cost": {"train_seconds": 99}}, "cost: training 100 s, at most 99 s"),
        ({"forgetting": 0.15}, ""),
        ({"forgetting": 0.14}, "forgetting: upper bound +0.150 nats per token, at most 0.14"),
    ],
)
def test_each_limit_is_held_against_the_less_favourable_bound(gate: dict[str, Any], failed: str) -> None:
    one = looked_at(comparison(method("fft", 0.7)), **gate)["fft"]
    assert [text.partition(" is asked")[0] for text in one.failed] == ([failed] if failed else [])


def test_what_was_not_measured_passes_no_limit() -> None:
    of = comparison(method("fft", 0.7, general=None, low=float("nan")))
    assert len(looked_at(of, forgetting=9, score=0.1)["fft"].failed) == 2
    assert not looked_at(of)["fft"].failed


def test_lacking_cells_fail_what_needs_them() -> None:
    of = comparison(method("fft", 0.7, (0.7, 0.7)), method("lora", 0.7, (0.7, 0.7)))
    of["grid"]["methods"].append("molf")
    lora = of["groups"][0]["methods"][1]
    del lora["per_seed"][1]
    found = looked_at(of)
    assert found["fft"].failed == ("verdict: the comparison lacks cells of molf, which it must be held against",)
    assert found["fft"].verdict is None
    assert found["lora"].failed[0] == "the comparison lacks seed 1 of it"
    found = looked_at(of, verdict="any")
    assert not found["fft"].failed
    assert found["lora"].failed == ("the comparison lacks seed 1 of it",)


def test_models_of_a_task_compete_and_other_tasks_do_not() -> None:
    of = comparison(method("fft", 0.7), models=("tiny", "large"))
    of["groups"][1]["methods"] = [method("fft", 0.8)]
    of["groups"].append({"model": "tiny", "task": "med", "methods": [method("fft", 0.9)], "differences": []})
    assert [one.cell.name for one in candidates(of, "sql", Gate())] == ["large/sql/fft/seed-0", "tiny/sql/fft/seed-0"]


def rival(score: float, fingerprint: str = "old", measured: Measured = NOW) -> Rival:
    return Rival("version 3 of molf-sql (tiny/sql/fft/seed-0)", fingerprint, score, measured)


@pytest.mark.parametrize(
    ("champion", "least", "action"),
    [
        (None, 0.0, Action.PROMOTED),
        (rival(0.69), 0.0, Action.PROMOTED),
        (rival(0.7), 0.0, Action.KEPT),
        (rival(0.71), 0.0, Action.KEPT),
        (rival(0.69), 0.02, Action.KEPT),
        (rival(0.67), 0.02, Action.PROMOTED),
        (rival(0.1, "fft-0"), 0.0, Action.UNCHANGED),
        (rival(0.9, "fft-0", Measured("sql", "execution_accuracy", "0" * 16, "1" * 64)), 0.0, Action.UNCHANGED),
    ],
)
def test_a_worse_or_equal_model_never_replaces_the_champion(
    champion: Rival | None, least: float, action: Action
) -> None:
    gate = Gate.model_validate({"gain": {"champion": least}})
    one = best(candidates(comparison(method("fft", 0.7)), "sql", gate))
    assert decide(one, NOW, champion, gate).action is action


@pytest.mark.parametrize(
    ("then", "action"),
    [
        (Measured("sql", "execution_accuracy", "0" * 16, "1" * 64), Action.PROMOTED),  # other test rows
        (Measured("sql", "execution_accuracy", "0" * 16, None), Action.PROMOTED),
        (Measured("sql", "exact_match", "d" * 16, "e" * 64), Action.PROMOTED),
        (Measured("sql", "execution_accuracy", "0" * 16, "e" * 64), Action.KEPT),  # only the train rows are others
        (Measured("sql", "execution_accuracy", "d" * 16, None), Action.KEPT),
    ],
)
def test_a_champion_that_was_scored_on_other_rows_is_said_not_to_be_comparable(then: Measured, action: Action) -> None:
    one = best(candidates(comparison(method("fft", 0.7)), "sql", Gate()))
    found = decide(one, NOW, rival(0.9, measured=then), Gate())
    assert found.action is action
    assert ("The gate alone decides" in found.sentence) == (action is Action.PROMOTED)


def test_nothing_passes() -> None:
    gate = Gate.model_validate({"score": 0.99})
    found = candidates(comparison(method("fft", 0.7)), "sql", gate)
    decision = decide(best(found), None, rival(0.2), gate)
    assert (decision.action, decision.sentence) == (
        Action.NONE,
        "nothing passes the gate; the champion stays version 3 of molf-sql (tiny/sql/fft/seed-0)",
    )
    lines = table(found)
    assert lines[1].startswith("tiny/fft") and lines[1].endswith("fails")
    assert lines[2] == "  score: lower bound 0.660, at least 0.99 is asked"


def test_a_method_that_is_alone_has_nothing_to_be_worse_than() -> None:
    assert looked_at(comparison(method("fft", 0.7)), verdict="holds")["fft"].verdict is Outcome.HOLDS


# --- params ----------------------------------------------------------------------------------------------------------


def test_a_task_overrides_single_keys() -> None:
    block = Promotion.model_validate(
        {"score": 0.5, "cost": {"weights_gb": 3}, "tasks": {"sql": {"score": None, "cost": {"train_seconds": 60}}}}
    )
    assert (block.gate("med").score, block.gate("sql").score) == (0.5, None)
    cost = block.gate("sql").cost
    assert (cost.weights_gb, cost.train_seconds, cost.peak_memory_gb) == (3, 60, None)


def test_mistakes_in_the_gate_are_said_with_their_keys() -> None:
    raw = fake.raw_params()
    raw["promotion"] = {
        "verdict": "wins",
        "gain": {"champion": -1},
        "tasks": {"sql": {"scroe": 1, "cost": {"weights_gb": "1 GB"}}, "other": {}},
    }
    with pytest.raises(UserError) as caught:
        check_params(raw, "params.yaml")
    keys = [problem.split(": ")[1] for problem in caught.value.problems]
    assert keys == [
        "promotion.verdict",
        "promotion.gain.champion",
        "promotion.tasks.sql.cost.weights_gb",
        "promotion.tasks.sql.scroe",
        "promotion.tasks",
    ]
