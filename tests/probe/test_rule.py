"""Cases of the forecast whose answer the theory gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molf.config import check_params, read_yaml
from molf.probe import rule

PARAMS = check_params(read_yaml(Path(__file__).parents[2] / "params.yaml"), "params.yaml")
BLOCKS = {name: PARAMS.methods[name] for name in ("fft", "lora", "molf", "molf-e")}  # ranks 32, 32 and 8 with 32
ALIKE = torch.ones(3, 1, dtype=torch.float64)  # all halvings alike


def curve(tail: float, noise: float, rank: int = 64) -> torch.Tensor:
    """Errors by rank where the tail's energy falls linearly to 0 at rank 64 and noise rises linearly."""
    ranks = torch.arange(65, dtype=torch.float64)
    left = torch.where(ranks == 0, 1.0, tail * (1 - ranks / rank).clamp(min=0))
    return ALIKE * (left + noise * ranks / 64)


def ask(errors: torch.Tensor, **choices: dict[str, dict[str, float]]) -> dict[str, Any]:
    return rule.forecast({"m": errors}, BLOCKS, choices, margin=0.015)


def test_noise_outside_the_directions_makes_low_rank_win() -> None:
    found = ask(curve(tail=0.0, noise=0.4))
    by_name = {of["method"]: of["error"] for of in found["methods"]}
    # lora pays half of the noise, fft all of it, the routed ones the mean of their experts.
    assert by_name == pytest.approx({"molf-e": 0.125, "lora": 0.2, "molf": 0.3, "fft": 0.4})
    assert found["winner"] == "molf-e" and found["agreement"] == 3 and found["best"] == 1 == found["enough"]


def test_energy_outside_the_directions_makes_the_whole_weight_win() -> None:
    found = ask(curve(tail=0.8, noise=0.1))
    assert found["winner"] == "fft" and found["best"] is None
    assert found["enough"] == 63  # one direction's energy, 1.25 %, is within the margin
    assert "fft, off by 10.0 %" in rule.sentence(found)


def test_within_the_margin_the_smallest_update_is_named() -> None:
    found = ask(curve(tail=0.02, noise=0.0))  # lora loses 1 %
    assert [of["method"] for of in found["methods"]][0] == "fft" and found["winner"] == "lora"
    assert rule.forecast({"m": curve(0.02, 0.0)}, BLOCKS, {}, margin=0.001)["winner"] == "fft"


def test_a_routed_methods_error_follows_its_choices() -> None:
    errors = curve(tail=0.0, noise=0.4)
    shares = {"molf": {"m": {"full": 0.25, "lora_r32": 0.75}}, "molf-e": {"m": {"lora_r8": 0.0, "lora_r32": 1.0}}}
    by_name = {of["method"]: of["error"] for of in ask(errors, **shares)["methods"]}
    assert by_name["molf"] == pytest.approx(0.25 * 0.4 + 0.75 * 0.2) and by_name["molf-e"] == pytest.approx(0.2)


def test_more_noise_than_gradient_counts_like_no_update() -> None:
    found = ask(curve(tail=1.0, noise=40.0))
    assert found["winner"] == "lora" and found["enough"] == found["best"] == 0
    assert "more noise than gradient" in rule.sentence(found)
    assert ask(-curve(tail=0.0, noise=1.0))["winner"] == "lora"  # an estimate of the energy below 0


def test_halvings_that_disagree_are_counted() -> None:
    errors = curve(tail=0.0, noise=0.4).clone()
    errors[0] = curve(tail=0.9, noise=0.0)[0]
    found = ask(errors)
    # Means: fft 0.267, lora 0.283, molf-e 0.342, molf 0.275; in the first halving the whole weight wins alone.
    assert found["winner"] == "fft"
    assert [rule.pick(found["methods"], 0.015, i) for i in range(3)] == ["fft", "molf-e", "molf-e"]
    assert found["agreement"] == 1 and "in 1 of 3 halvings" in rule.sentence(found)


def test_a_rank_above_a_modules_own_is_its_full_update() -> None:
    small, large = curve(0.0, 0.4)[:, :5], curve(0.0, 0.4)
    assert rule.module_errors(small, BLOCKS["lora"], None).tolist() == small[:, 4].tolist()
    torch.testing.assert_close(rule.summed([small, large])[:, 64], small[:, 4] + large[:, 64])
    assert rule.ranks_of(BLOCKS) == [8, 32]


def test_a_kind_that_the_rule_does_not_know_is_not_forecast() -> None:
    class Other:
        kind = "other"

    blocks: dict[str, Any] = {**BLOCKS, "other": Other()}
    found = rule.forecast({"m": curve(0.0, 0.4)}, blocks, {}, margin=0.0)
    assert found["not_forecast"] == ["other"] and len(found["methods"]) == 4
    assert rule.sentence(found).endswith("Not forecast: other")
