"""The report of sweeps: the table, the figure, the warnings, and cells that were not trained at what was chosen."""

from pathlib import Path
from typing import Any

import pytest

from molf.errors import UserError
from molf.paths import RATES, Trial, read_json, write_json
from molf.report import comparison, page, sheets
from molf.report.verdicts import limits
from tests.report import fake
from tests.report.conftest import compared


def swept() -> dict[str, Any]:
    raw = fake.raw_params(("sql",))
    raw["grid"]["tune"] = [0.3, 1.0, 3.0]
    return raw


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task whose methods were swept, compared. Only to be read."""
    root = tmp_path_factory.mktemp("swept")
    fake.write_tree(root, swept())
    return compared(root)


def test_the_table_shows_what_each_factor_scored_and_which_was_taken(made: Path) -> None:
    group = read_json(made / "reports/comparison.json")["groups"][0]
    sheet = sheets.rates(group)
    assert sheet is not None
    assert sheet.texts() == [
        ["method", "rate x 0.3", "rate x 1", "rate x 3", "chosen rate", "time of the sweep"],
        ["fft", "0.500", "0.700 *", "0.600", "0.001", "3.0 s"],
        ["lora", "0.400", "0.500", "0.600 *", "0.003", "3.0 s"],
        ["molf", "0.600", "0.800 *", "0.800", "0.001, 0.001", "3.0 s"],
        ["molf-e", "0.500", "0.600 *", "diverged", "0.001", "3.0 s"],
    ]
    assert "60 validation rows" in sheet.note and "Decided among equal scores: molf." in sheet.note


def test_page_terminal_and_markdown_show_the_sweeps(made: Path) -> None:
    found = read_json(made / "reports/comparison.json")
    text = (made / "reports/report.html").read_text()
    assert "<h3>Learning rates</h3>" in text and "No test row was read" in text
    drawn = (made / "reports/figures/tiny-sql-rates.svg").read_text()
    assert "<title>fft at 0.0003: 0.500</title>" in drawn and "<title>lora, chosen: 0.003</title>" in drawn
    assert "<title>diverged at factor 3: molf-e</title>" in drawn
    for shown in (page.terminal_table(found), page.markdown_table(found)):
        assert "rate x 0.3" in shown and "0.700 *" in shown.replace("\\", "")
        said = " ".join(shown.split())
        assert "lora: the best learning rate is the highest of its sweep (factor 3 of 0.3, 1, 3)" in said
        assert "molf-e: its training diverged at factor 3 of its sweep" in said
    factors = comparison.flat(found).set_index("method")["learning_rate_factor"]
    assert factors.dropna().to_dict() == {"fft": 1.0, "lora": 3.0, "molf": 1.0, "molf-e": 1.0}


def test_what_the_rates_leave_open_is_said(made: Path) -> None:
    found = read_json(made / "reports/comparison.json")
    said = [text for text in limits(found) if "learning rate" in text]
    assert said == [
        "The best learning rate of lora (tiny, sql) is at an end of the sweep; a wider one may find a better."
    ]
    assert "![sql: rates](figures/tiny-sql-rates.png)" in page.published_readme(found)
    found["groups"][0]["sweeps"] = []
    said = [text for text in limits(found) if "learning rates" in text]
    assert len(said) == 1 and "grid.tune is empty" in said[0]
    assert "rates.png" not in page.published_readme(found)


def test_cells_at_other_rates_than_the_sweep_chose_are_refused(tmp_path: Path) -> None:
    params = fake.write_tree(tmp_path, swept())
    rates = read_json(tmp_path / RATES)
    rates["chosen"]["tiny"]["sql"]["fft"] = 3.0
    write_json(tmp_path / RATES, rates)
    with pytest.raises(UserError) as caught:
        comparison.build(params, tmp_path)
    assert "tiny/sql/fft/seed-0: trained with other params" in str(caught.value)
    assert "method.learning_rate was 0.001, is 0.003" in str(caught.value)
    (tmp_path / RATES).unlink()
    with pytest.raises(UserError, match="results/rates.json has no learning rate for tiny/sql/molf"):
        comparison.build(params, tmp_path)


def test_a_method_without_rates_may_lack_like_any_other(tmp_path: Path) -> None:
    raw = swept()
    params = fake.write_tree(tmp_path, raw)
    fake.write_trial(tmp_path, params, Trial("tiny", "sql", "lora", 0.3), None)
    for factor in (1.0, 3.0):
        fake.write_trial(tmp_path, params, Trial("tiny", "sql", "lora", factor), None)
    from molf import tuning

    write_json(tmp_path / RATES, tuning.choose(params, tmp_path))
    write_json(tmp_path / "results/lacking.json", {"tiny/sql/lora/seed-0": "its sweep failed"})
    group = comparison.build(params, tmp_path)["groups"][0]
    assert [m["method"] for m in group["methods"]] == ["fft", "molf", "molf-e"]
    sheet = sheets.rates(group)
    assert sheet is not None and "lora: nothing was chosen, for at every factor it diverged" in sheet.note
    assert sheet.texts()[2] == ["lora", "diverged", "diverged", "diverged", "none", "3.0 s"]
