"""Forecasts beside measured winners."""

import json
from pathlib import Path
from typing import Any

import pytest

from molf.errors import UserError
from molf.probe import hits

ERRORS = {"lora": 0.1, "fft": 0.2, "molf": 0.2}


def found(errors: dict[str, float] = ERRORS, **more: Any) -> dict[str, Any]:
    size = {"lora": 32}
    methods = [{"method": m, "error": e, "halvings": [e], "size": size.get(m)} for m, e in errors.items()]
    return {"forecast": {"methods": methods, "margin": 0.015, "agreement": 1, "halvings": 1}, **more}


def group(means: dict[str, float], highs: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    best = max(means, key=lambda m: means[m])
    differences = [{"method": m, "versus": best, "high": high} for m, high in (highs or {}).items()]
    methods = [{"method": m, "mean": mean} for m, mean in means.items()]
    return {"model": "tiny", "task": "t", "methods": methods, "differences": differences, **more}


def test_a_hit_is_a_method_within_the_margin_of_the_best_mean() -> None:
    for means, expected in (({"lora": 0.50, "fft": 0.51}, True), ({"lora": 0.49, "fft": 0.51}, False)):
        judged = hits.judge(found(), group(means), 0.015)
        assert judged is not None and judged["hit"] is expected and judged["best"] == "fft"
        assert judged["good"] == (["lora", "fft"] if expected else ["fft"])


def test_the_margin_of_the_forecast_prefers_the_smaller_update_and_the_least_error_stands_beside() -> None:
    judged = hits.judge(found({"fft": 0.1, "lora": 0.11}), group({"fft": 0.9, "lora": 0.5}), 0.015)
    assert judged is not None and (judged["forecast"], judged["hit"]) == ("lora", False)
    assert (judged["least"], judged["least_hit"]) == ("fft", True)


def test_only_methods_that_were_both_forecast_and_measured_count() -> None:
    judged = hits.judge(found(), group({"fft": 0.5, "molf": 0.9, "dora": 0.95}), 0.015)
    assert judged is not None and judged["methods"] == ["fft", "molf"] and judged["forecast"] == "fft"
    assert judged["best"] == "molf" and not judged["hit"]
    assert hits.judge(found(), group({"fft": 0.5, "dora": 0.9}), 0.015) is None


def test_it_says_whether_the_comparison_tells_methods_apart_and_saw_the_same_data() -> None:
    means = {"lora": 0.5, "fft": 0.7, "molf": 0.69}
    for high, apart in ((-0.05, True), (0.01, False)):
        judged = hits.judge(found(), group(means, {"lora": high, "molf": 0.1}), 0.015)
        assert judged is not None and judged["tells_apart"] is apart and judged["other_data"] is None
    judged = hits.judge(found(data_hash="a"), group(means, data={"data_hash": "b"}), 0.015)
    assert judged is not None and judged["other_data"]


def test_the_tally_stands_beside_guesses_without_a_probe() -> None:
    means = [{"lora": 0.5, "fft": 0.7}, {"lora": 0.5, "fft": 0.5}, {"lora": 0.8, "fft": 0.7}, {"lora": 0.1, "fft": 0.7}]
    judged = [hits.judge(found(), group(of), 0.015) for of in means]
    sums = hits.tally([of for of in judged if of is not None])
    assert (sums["hits"], sums["of"], sums["chance"], sums["least_hits"]) == (2, 4, 2.5, 2)
    assert sums["always"] == {"method": "fft", "hits": 3, "by_method": {"lora": 2, "fft": 3}}


def test_the_interval_is_exact() -> None:
    # None of 3: the upper bound p has (1 - p)^3 = 0.025; 3 of 3 mirrors it.
    assert hits.exact_interval(0, 3) == pytest.approx((0, 1 - 0.025 ** (1 / 3)))
    assert hits.exact_interval(3, 3) == pytest.approx((0.025 ** (1 / 3), 1))


def test_forecasts_lie_beside_their_comparison(tmp_path: Path) -> None:
    (tmp_path / "probe/tiny").mkdir(parents=True)
    with pytest.raises(UserError, match="no forecast lies beside a comparison"):
        hits.find([tmp_path])
    comparison = {"margin": 0.015, "groups": [group({"lora": 0.5, "fft": 0.7})]}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    with pytest.raises(UserError, match="`molf probe` makes the forecasts"):
        hits.find([tmp_path])
    (tmp_path / "probe/tiny/t.json").write_text(json.dumps(found()))
    judged = hits.find([tmp_path])
    assert [(of["folder"], of["hit"]) for of in judged] == [(str(tmp_path), False)]
    text = hits.table(judged)
    assert "0 of 1 forecasts hit" in text and "interval 0.00 to 0.97" in text and "always fft" in text
