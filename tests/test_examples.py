"""The examples run as a user runs them, learn, and leave what their last line promises."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
transformers = pytest.importorskip("transformers")


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs an example that writes into a folder; returns what it printed."""
    monkeypatch.setattr("sys.argv", [name, str(folder)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    (first, last), *_ = re.findall(r"^loss ([\d.]+) -> ([\d.]+) in \d+ steps$", shown, flags=re.MULTILINE)
    assert float(last) < 0.5 * float(first), shown
    shares = [int(share) for share in re.findall(r"(\d+)%", shown.partition("updates won:")[2])]
    assert sum(shares) == pytest.approx(100, abs=1) and min(shares) > 0, shown
    assert shown.splitlines()[-1].startswith(f"next: {'Peft' if name == 'sft' else 'AutoModelForCausalLM'}")
    return shown


@pytest.mark.parametrize("name", ["loop", "trainer"])
def test_the_loop_and_the_trainer_leave_an_ordinary_model_that_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, tmp_path, monkeypatch, capsys)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    ids = (torch.arange(32)[:, None] + 2 * torch.arange(12)) % 32
    right = (model(ids).logits[:, 1:-1].argmax(-1) == ids[:, 2:]).float().mean()
    assert right > 0.8


def test_sft_leaves_an_ordinary_adapter_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="TRL is not installed (pip install 'molf[dev]')")
    peft = pytest.importorskip("peft")
    run("sft", tmp_path, monkeypatch, capsys)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model: Any = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert model.peft_config["default"].r == 12
    numbers = torch.arange(4, 36)  # a number's token; "count from" is 2 3
    ids = torch.stack([torch.full((32,), 2), torch.full((32,), 3), numbers], dim=1)
    assert (model(input_ids=ids).logits[:, -1].argmax(-1) == numbers.roll(-1)).float().mean() > 0.8
    with model.disable_adapter():
        assert (model(input_ids=ids).logits[:, -1].argmax(-1) == numbers.roll(-1)).float().mean() < 0.2


def test_the_readme_lists_the_examples_and_they_are_short() -> None:
    """An example that is not listed is not found, and a long one is not read."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in path.read_text() and len(path.read_text().splitlines()) < 60
        assert path.name in readme, path.name
