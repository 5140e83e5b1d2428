"""Controls and ablations stand in every table, are said to be what they are, and are taken for MoLF nowhere."""

from pathlib import Path
from typing import Any

import pytest

from molf.blocks import Gate
from molf.config import check_params
from molf.paths import Cell
from molf.promotion import candidates
from molf.report import figures, page
from molf.report.comparison import build, flat
from molf.report.controls import control
from molf.report.lacking import Kind, Lack, write
from tests.report import fake

RANDOM = "molf-random is a control of MoLF, not MoLF: winners drawn at random"


def project(root: Path, patch: pytest.MonkeyPatch, right: int, **changes: Any) -> Any:
    """Results of fft, lora, molf and molf-random, which takes least memory; returns the params.

    Args:
        root: The folder.
        patch: For the results' sizes.
        right: Right answers of molf-random; fft has 30, lora 20, molf 32.
        changes: Of its block.
    """
    raw = fake.raw_params(("sql",))
    raw["methods"]["molf-random"] = {**raw["methods"]["molf"], "winners": "random", **changes}
    raw["grid"]["methods"] = ["fft", "lora", "molf", "molf-random"]
    raw["compare"]["margin"] = 0.2  # 40 examples tell no finer
    patch.setitem(fake.EXPERTS, "molf-random", ["full", "lora_r8"])
    patch.setitem(fake.RIGHT, "molf-random", right)
    return fake.write_tree(root, raw)


def test_a_control_is_judged_nowhere_and_never_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [group] = build(project(tmp_path, monkeypatch, right=32), tmp_path)["groups"]
    assert [m["method"] for m in group["methods"]] == ["fft", "lora", "molf", "molf-random"]
    assert [v["method"] for v in group["verdicts"]] == [v["method"] for v in group["paper"]["verdicts"]] == ["molf"]
    assert group["recommendation"]["method"] == "molf"  # molf-random scores as high and takes less memory
    assert group["recommendation"]["candidates"] == ["fft", "molf"]


def test_a_control_that_beats_all_leaves_nothing_to_recommend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [group] = build(project(tmp_path, monkeypatch, right=40), tmp_path)["groups"]
    assert group["recommendation"]["method"] is None
    assert "is sure of molf-random alone, there as a control" in group["recommendation"]["sentence"]


def test_an_ablation_is_not_judged_as_molf_and_may_be_recommended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = project(tmp_path, monkeypatch, right=32, winners="scores", score_per="layer")
    [group] = build(params, tmp_path)["groups"]
    assert [v["method"] for v in group["verdicts"]] == ["molf"]
    assert group["recommendation"]["method"] == "molf-random"


def test_a_lacking_control_is_no_verdict_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = project(tmp_path, monkeypatch, right=32)
    cell = Cell("tiny", "sql", "molf-random", 0)
    (tmp_path / cell.results / "train/summary.json").unlink()
    write({cell: Lack(Kind.FAILED, "it broke")}, tmp_path)
    [group] = build(params, tmp_path)["groups"]
    assert [v["method"] for v in group["verdicts"]] == ["molf"]


def test_every_table_and_figure_says_what_a_control_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = build(project(tmp_path, monkeypatch, right=31), tmp_path)
    words = " ".join(page.terminal_table(comparison).split())
    assert f"BESIDE: {RANDOM}" in words
    assert "% full (winners drawn at random)" in words
    assert f"- **beside**: {RANDOM}" in page.markdown_table(comparison)
    assert flat(comparison).set_index("method")["control"].dropna().to_dict() == {
        "molf-random": "winners drawn at random"
    }
    drawn = figures.draw(comparison, tmp_path, tmp_path / "figures")
    captions = {figure["name"]: figure["caption"] for figure in drawn}
    assert all(captions[name].endswith(f"{RANDOM}.") for name in ("routing", "share", "ratio"))
    for name in ("score", "routing", "share", "ratio"):
        assert "molf-random (control)" in (tmp_path / f"figures/tiny-sql-{name}.svg").read_text(), name
    text = page.render(comparison, drawn, tmp_path / "figures", [])
    assert f'<span class="outcome">beside</span> {RANDOM}.' in text


def test_a_control_becomes_no_champion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = build(project(tmp_path, monkeypatch, right=40), tmp_path)
    found = {one.cell.method: one.failed for one in candidates(comparison, "sql", Gate(verdict="any"))}
    assert found["molf-random"] == ("it is a control: winners drawn at random",)
    assert found["molf"] == ()


@pytest.mark.parametrize(
    ("method", "changes", "kind", "words"),
    [
        ("molf", {}, None, ""),
        ("molf", {"r": [8, 32], "top_k": 2}, None, ""),  # more experts: still MoLF
        ("molf", {"top_k": 2}, "control", "all experts win in every step"),
        ("molf", {"winners": "shuffled"}, "control", "each step's winners dealt out to the modules at random"),
        ("molf", {"winners": "full"}, "control", "the full weight always wins"),
        ("molf", {"winners": "lora"}, "control", "a LoRA expert always wins"),
        ("molf", {"winners": "alternate"}, "control", "the experts win in turn"),
        ("molf", {"score_per": "layer"}, "ablation", "one score over all modules of a layer"),
        ("molf-e", {"score_per": "model"}, "ablation", "one score over all modules of the model"),
        ("molf-e", {"score": "pfn"}, "ablation", "the score is the preconditioned Frobenius norm"),
        (
            "molf",
            {"score": "pfn", "score_per": "layer"},
            "ablation",
            "the score is the preconditioned Frobenius norm, one score over all modules of a layer",
        ),
        ("molf", {"score": "pfn", "winners": "random"}, "control", "winners drawn at random"),
        ("molf-e", {"winners": "random", "score_per": "layer"}, "control", "winners drawn at random"),
        ("lora", {}, None, ""),
    ],
)
def test_what_a_block_is(method: str, changes: dict[str, Any], kind: str | None, words: str) -> None:
    raw = fake.raw_params()
    raw["methods"][method] |= changes
    block = check_params(raw, "test").methods[method].model_dump(mode="json")
    assert control(block) == ({"kind": kind, "words": words} if kind else None)
    earlier = {key: value for key, value in block.items() if key not in ("winners", "score_per")}
    if not set(changes) & {"winners", "score_per"}:
        assert control(earlier) == control(block)
