"""The routing record: every step kept, impossible scores refused, one-sided routing said."""

import pytest
import torch

from molf import Routing, RoutingError, RoutingRecorder


def routing(step: int, scores: list[list[float]], rate: float = 0.1) -> Routing:
    tensor = torch.tensor(scores)
    winners = torch.zeros_like(tensor, dtype=torch.bool).scatter_(1, tensor.argmax(dim=1, keepdim=True), True)
    return Routing(step, ("a", "b"), ("full", "lora_r4"), tensor, winners, (rate, rate))


def test_columns_hold_every_step_module_and_expert() -> None:
    recorder = RoutingRecorder(drain_every=2)
    recorder.record(routing(1, [[0.0, 0.0], [0.0, 0.0]], rate=0.0))
    recorder.record(routing(2, [[1.0, 2.0], [4.0, 3.0]]))
    recorder.record(routing(3, [[5.0, 2.0], [4.0, 3.0]]))
    columns = recorder.columns()
    assert columns["step"].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert columns["module"] == ["a", "a", "b", "b"] * 3
    assert columns["expert"] == ["full", "lora_r4"] * 6
    assert columns["score"].tolist()[4:8] == [1.0, 2.0, 4.0, 3.0]
    assert columns["won"].tolist()[4:] == [False, True, True, False, True, False, True, False]
    assert columns["counted"].tolist() == [False] * 4 + [True] * 8


def test_steps_at_rate_0_leave_the_shares() -> None:
    recorder = RoutingRecorder()
    recorder.record(routing(1, [[0.0, 0.0], [0.0, 0.0]], rate=0.0))
    recorder.record(routing(2, [[1.0, 2.0], [4.0, 3.0]]))
    recorder.record(routing(3, [[1.0, 2.0], [3.0, 4.0]]))
    summary = recorder.summary()
    assert summary["steps"] == 2
    assert summary["share"] == {"full": 0.25, "lora_r4": 0.75}
    assert summary["share_by_module"]["b"] == {"full": 0.5, "lora_r4": 0.5}
    assert not summary["one_sided"]


def test_one_sided_routing_is_told() -> None:
    recorder = RoutingRecorder()
    recorder.record(routing(1, [[2.0, 1.0], [4.0, 3.0]]))
    assert recorder.summary()["one_sided"]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_impossible_scores_are_an_error_that_names_the_place(bad: float) -> None:
    recorder = RoutingRecorder()
    recorder.record(routing(7, [[1.0, 2.0], [bad, 3.0]]))
    with pytest.raises(RoutingError, match="step 7, module b, expert full"):
        recorder.drain()


def test_missing_scores_are_an_error() -> None:
    with pytest.raises(RoutingError, match="no routing scores"):
        RoutingRecorder().record(None)
    with pytest.raises(RoutingError, match="no step was routed"):
        RoutingRecorder().summary()
