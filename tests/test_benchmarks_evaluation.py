"""The benchmark of evaluation asks both models the same and counts what they run; never how fast."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks.evaluation import KINDS, PlainLoop, counted, floor, run, same
from molf.encoding import encode_prompt
from molf.errors import UserError
from tests.random_models import network, own_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return own_tokenizer()


def test_every_kind_is_measured_on_a_miniature(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network("qwen2", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    threads = torch.get_num_threads()
    try:
        run(["--model", str(tmp_path / "model"), "--share", "0.02", "--rounds", "1", "--into", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    [file] = tmp_path.glob("evaluation-quick-*.json")
    cases = json.loads(file.read_text())["cases"]
    assert list(cases) == [*KINDS, "endings"]
    for kind in KINDS:
        [row] = cases[kind]["rows"]
        assert row["limit"] is None and row["samples"][0] > 0 and row["reference"][0] > 0
        data = cases[kind]["data"]
        assert data["floor"]["tokens"] <= data["ours"]["tokens"] and data["floor"]["flops"] > 0
        assert data["ours"]["forwards"] < data["plain"]["forwards"]
    assert len(cases["endings"]["rows"]) == 2
    assert "| med: 4 examples " in capsys.readouterr().out


def test_without_a_model_it_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro base@tiny"):
        run(["--model", str(tmp_path)])


def test_the_floor_counts_each_token_in_its_context_once(tokenizer: Any) -> None:
    model = network("llama", tokenizer)
    plain = PlainLoop(model, tokenizer)
    prompt = encode_prompt(tokenizer, "Name")
    asked = counted(model, lambda: plain.answer([("Name", ["A@", "A#", "A"], 0), ("Name", ["A@"], 0)]))
    assert (asked.forwards, asked.tokens) == (4, 4 * len(prompt) + 7)
    # After the prompt and after A something is predicted; of the completions A alone is run.
    found = floor(model, plain)
    assert (found["tokens"], found["predictions"]) == (len(prompt) + 1, 2)
    layers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    assert found["flops"] == 2 * (layers * (len(prompt) + 1) + model.lm_head.weight.numel() * 2)
    # Of greedy text the last token within the limit is not run.
    plain.answer([("Name", [], 2)])
    assert (floor(model, plain)["tokens"], floor(model, plain)["predictions"]) == (len(prompt) + 2, 3)


def test_other_predictions_fail_the_benchmark() -> None:
    made = pd.DataFrame({"prediction": ["a", None], "logprob_A": [-1.0, float("nan")], "lists_logprob": [[-1.0], []]})
    same("med", made, made.assign(logprob_A=[-1.00001, float("nan")]))
    for other in ({"prediction": ["b", None]}, {"logprob_A": [-1.1, float("nan")]}, {"lists_logprob": [[-2.0], []]}):
        with pytest.raises(RuntimeError, match=f"med: the plain loop predicts another {next(iter(other))}"):
            same("med", made, made.assign(**other))
