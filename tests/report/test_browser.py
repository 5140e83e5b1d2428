"""The page in a real browser, its data hostile: what can be clicked works, and nothing of the data runs."""

import re
from pathlib import Path

import pytest

from molf.report.examples import UNTRAINED
from tests.browser import SIZE, Window
from tests.report.hostile import HOSTILE

pytestmark = pytest.mark.acceptance
PHONE = {"width": 360, "height": 740}


def column(window: Window, table: str, number: int) -> list[str]:
    return window.page.locator(f"{table} tbody tr td:nth-child({number})").all_inner_texts()


def harmless(window: Window) -> None:
    """Nothing of the data ran, nothing was asked for, nothing failed."""
    assert not window.dialogs and not window.errors and not window.foreign()
    assert [url for url in window.requests if not url.startswith("data:image/png")] == [window.page.url.split("#")[0]]
    assert window.page.locator("img, iframe, object, embed, link, a").count() == 0


def test_nothing_of_the_data_runs(hostile: Path, window: Window) -> None:
    said: list[str] = []
    window.page.on("console", lambda message: said.append(message.text))
    window.open(hostile / "reports/report.html")
    window.page.locator(".browser").scroll_into_view_if_needed()
    window.page.locator(".browser .example").first.wait_for()
    for details in window.page.locator("details > summary").all():
        details.click()
    assert HOSTILE.split()[0] in window.text
    assert not said, said
    harmless(window)


def test_tables_are_sorted_by_click_and_by_key(made: Path, window: Window) -> None:
    window.open(made / "reports/report.html")
    table = "section.group >> nth=0 >> table.sorted >> nth=1"
    head = window.page.locator(table).locator("th").nth(3)
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    rows = window.page.locator(table).locator("tbody tr td:nth-child(4)")
    assert rows.all_inner_texts() == ["400 MB", "300 MB", "200 MB", "100 MB"]
    window.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert rows.all_inner_texts() == ["100 MB", "200 MB", "300 MB", "400 MB"]
    harmless(window)


def test_the_filter_hides_other_tasks_and_is_kept_in_the_address(made: Path, window: Window) -> None:
    window.open(made / "reports/report.html")
    window.page.get_by_label("task").first.select_option("fact")
    assert window.page.url.endswith("#task=fact")
    assert window.page.locator("section.group:visible h2").all_inner_texts() == ["fact with tiny"]
    window.page.reload()
    assert window.page.locator("section.group:visible h2").all_inner_texts() == ["fact with tiny"]
    window.page.get_by_label("task").first.select_option("")
    assert window.page.locator("section.group:visible").count() == 2


def test_figures_say_what_is_under_the_pointer(made: Path, window: Window) -> None:
    window.open(made / "reports/report.html")
    square = window.page.locator('.note[data-note="layer 1, mlp.up_proj: the full weight won 82 %"]').first
    square.scroll_into_view_if_needed()
    square.hover()
    assert window.page.locator(".tip").inner_text() == "layer 1, mlp.up_proj: the full weight won 82 %"
    window.page.mouse.move(1, 1)
    assert not window.page.locator(".tip").is_visible()


def test_examples_of_any_two_cells(made: Path, window: Window) -> None:
    window.open(made / "reports/report.html")
    box = window.page.locator(".browser").first
    box.scroll_into_view_if_needed()
    where = box.get_by_role("status")
    where.wait_for()
    box.get_by_label("first cell").select_option(label="molf")
    box.get_by_label("second cell").select_option(label=UNTRAINED)
    assert where.inner_text() == "1 to 5 of 28"
    assert "question 4: <script>" in box.locator(".example").first.inner_text()
    assert re.search(r"molf: right\s+answer 4\s", box.locator(".example").first.inner_text())
    box.get_by_label("further examples").click()
    assert where.inner_text() == "6 to 10 of 28"
    box.get_by_label("show where").select_option("second")
    assert where.inner_text() == "no such example here" and box.locator(".example").count() == 0
    box.get_by_label("show where").select_option("first")
    assert where.inner_text() == "1 to 5 of 28"
    harmless(window)


def test_on_a_phone_nothing_is_wider_than_the_screen(hostile: Path, window: Window) -> None:
    window.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    window.open(hostile / "reports/report.html")
    for details in window.page.locator("details > summary").all():
        details.click()
    assert window.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"] < SIZE[0]
    harmless(window)


def test_without_scripts_and_on_paper_all_can_be_read(made: Path, chromium: "object", tmp_path: Path) -> None:
    with chromium.new_context(java_script_enabled=False) as context:  # type: ignore[attr-defined]
        page = context.new_page()
        page.goto((made / "reports/report.html").as_uri())
        said = page.inner_text("body")
        assert "What to use" in said and "question 4: <script>" in said and "molf lineage" not in said
        assert page.locator(".controls:visible").count() == 0
        page.emulate_media(media="print")
        assert "molf lineage tiny/sql/fft/seed-0" in page.inner_text("body")
        assert page.pdf().startswith(b"%PDF")
