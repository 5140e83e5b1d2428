"""Which examples the page holds, and how."""

import json
from pathlib import Path

import pandas as pd
import pytest

from molf.paths import read_json, write_parquet
from molf.report import comparison, examples
from tests.report import fake


def test_all_examples_on_which_any_two_cells_differ(made: Path) -> None:
    found = examples.collect(read_json(made / "reports/comparison.json"), made)
    assert [(of["model"], of["task"], of["metric"]) for of in found] == [
        ("tiny", "sql", "execution_accuracy"),
        ("tiny", "fact", "efficacy"),
    ]
    sql = found[0]
    assert sql["cells"] == ["fft", "lora", "molf", "molf-e", examples.UNTRAINED]
    # The untrained model has the first 4 right, molf the first 32; beyond, all are wrong alike.
    assert [e["id"] for e in sql["examples"]] == [f"e{i}" for i in range(4, 32)]
    assert sql["differing"] == 28 and sql["cut"] == 0
    first = sql["examples"][0]
    assert first["prompt"].startswith("question 4: <script>") and first["gold"] == "answer 4"
    assert first["answers"] == ["answer 4", f"{fake.HOSTILE} answer 4"]
    assert first["given"] == [[0, 1]] * 4 + [[1, 0]]


def test_wrong_in_unlike_ways_differs_and_left_out_does_not(tmp_path: Path) -> None:
    params = fake.write_tree(tmp_path, fake.raw_params(("sql",), seeds=(0, 1)))
    path = tmp_path / "results/tiny/sql/lora/seed-1/evaluation/predictions.parquet"
    frame = pd.read_parquet(path)
    frame.loc[[36, fake.EXAMPLES - 1], "prediction"] = "another answer"
    write_parquet(path, frame)
    found = examples.collect(comparison.build(params, tmp_path), tmp_path)[0]
    assert "lora, seed 1" in found["cells"] and len(found["cells"]) == 9
    assert [e["id"] for e in found["examples"]][-1] == "e36"
    last = found["examples"][-1]
    assert last["given"][found["cells"].index("lora, seed 1")] == [1, 0] and last["answers"][1] == "another answer"


def test_too_many_or_too_long_are_cut_alike_each_time(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = read_json(made / "reports/comparison.json")
    monkeypatch.setattr(examples, "MOST", 10)
    monkeypatch.setitem(examples.LONGEST, "prompt", 12)
    first, again = (examples.collect(result, made)[0] for _ in range(2))
    assert first == again
    assert first["differing"] == 28 and len(first["examples"]) == first["cut"] == 10
    assert first["examples"][0]["prompt"].startswith("question ") and "[cut: 4" in first["examples"][0]["prompt"]
    assert {e["id"] for e in first["examples"]} != {f"e{i}" for i in range(4, 14)}  # by hash, not the first
    monkeypatch.setattr(examples, "BYTES", 2 * 1000)
    few = examples.collect(result, made)[0]
    assert 0 < len(few["examples"]) < 10
    assert len(json.dumps(few["examples"])) < 1500
    assert {e["id"] for e in few["examples"]} < {e["id"] for e in first["examples"]}


def test_json_cannot_end_the_element_that_holds_it() -> None:
    value = {"a": "</script><!-- & \u2028\u2029"}
    text = examples.as_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
