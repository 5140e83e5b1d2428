"""MLflow's page as a person sees it: a real server, a real browser, runs built from files."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from molf import tracking
from molf.mlflow_store import Store
from molf.paths import write_json
from molf.report import comparison, figures, page
from tests.browser import Window
from tests.conftest import QUIET
from tests.report import fake
from tests.served import molf_ui

pytestmark = pytest.mark.acceptance
METHODS = ("fft", "lora", "molf", "molf-e")
# A panel that opens at the first visit stays closed; a sandboxed frame has no storage.
FIRST_VISIT = "try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch {}"


@dataclass
class Served:
    """A project of two tasks and two seeds, its store and the address of its page."""

    address: str
    store: Store
    sentence: str

    @property
    def server(self) -> str:
        return self.address.partition("/#")[0]

    def run(self, **tags: str) -> str:
        """The page of a run."""
        run = self.store.find(**tags)
        assert run is not None
        return f"{self.server}/#/experiments/{self.store.experiment_id}/runs/{run.info.run_id}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        params = fake.write_tree(root, fake.raw_params(seeds=(0, 1)))
        result, reports = comparison.build(params, root), root / "reports"
        drawn = figures.draw(result, root, reports / "figures")
        write_json(reports / "comparison.json", result)
        comparison.flat(result).to_csv(reports / "comparison.csv", index=False)
        (reports / "report.html").write_text(page.render(result, drawn, reports / "figures", []))
        tracking.track(root, params)
        with molf_ui(root, {**os.environ, **QUIET}) as address:
            yield Served(address, Store("molf", root), result["sentence"])


@pytest.fixture
def look(window: Window, tmp_path: Path) -> Iterator[Window]:
    """A window that was here before; at the end it saw no error and asked no other machine."""
    window.page.add_init_script(FIRST_VISIT)
    window.page.set_viewport_size({"width": 1500, "height": 1000})
    yield window
    print(window.screenshot(tmp_path / "page.png"))
    assert not window.blank() and not window.errors and not window.foreign()


def test_the_experiment_lists_methods_and_below_them_their_seeds(served: Served, look: Window) -> None:
    look.open(served.address)
    for name in ("comparison", *(f"tiny/{task}/{method}" for task in ("sql", "fact") for method in METHODS)):
        look.page.get_by_role("link", name=name, exact=True).wait_for()
    assert served.sentence.split(":")[0] in look.text  # the description begins with the verdict
    assert "seed-1" not in look.text
    row = look.page.get_by_role("row").filter(has=look.page.get_by_role("link", name="tiny/sql/molf", exact=True))
    row.get_by_role("button").first.click()  # the plus sign
    for seed in (0, 1):
        look.wait_for(f"tiny/sql/molf/seed-{seed}")


def test_the_saved_view_of_scores_is_the_comparisons_table(served: Served, look: Window) -> None:
    look.open(f"{served.address}&viewStateShareKey=molf-tiny-sql-scores")
    look.wait_for("test/primary_low")
    look.page.get_by_role("link", name="tiny/sql/base", exact=True).wait_for()
    names = look.page.locator("[role=row] a[href*='/runs/']").all_inner_texts()
    assert names == [f"tiny/sql/{method}" for method in ("molf", "fft", "molf-e", "lora", "base")]  # best first
    look.wait_for("cost/train_seconds")


@pytest.mark.parametrize(
    ("view", "charts"),
    [
        ("training", ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second")),
        ("routing", ("routing/score_ratio", "routing/share/full", "routing/share/lora_r8")),
    ],
)
def test_the_saved_views_of_curves_show_every_method(
    served: Served, look: Window, view: str, charts: tuple[str, ...]
) -> None:
    look.open(f"{served.address}&viewStateShareKey=molf-tiny-sql-{view}&compareRunsMode=CHART")
    for method in METHODS:
        look.page.get_by_role("link", name=f"tiny/sql/{method}", exact=True).wait_for()
    for chart in charts:
        look.page.get_by_text(chart, exact=True).first.wait_for(state="attached")
    look.page.locator(".scatterlayer .trace").first.wait_for(state="attached")
    for hidden in ("cost/train_seconds", "test/primary_low", "tiny/sql/base"):
        assert not look.page.get_by_text(hidden, exact=True).count()


def test_two_methods_runs_compare(served: Served, look: Window) -> None:
    ids = [served.run(kind="method", task="sql", method=m).rpartition("/")[2] for m in METHODS]
    listed = "[" + ",".join(f'"{run}"' for run in ids) + "]"
    look.open(f'{served.server}/#/compare-runs?runs={listed}&experiments=["{served.store.experiment_id}"]')
    look.wait_for("Comparing 4 Runs")
    for text in (*(f"tiny/sql/{method}" for method in METHODS), "test/primary"):
        look.wait_for(text)


def test_a_seeds_heat_map_shows(served: Served, look: Window) -> None:
    look.open(served.run(kind="cell", cell="tiny/sql/molf/seed-1") + "/artifacts/routing/heat_map.png")
    picture = look.page.locator("img[src^='blob:'], img[src*='get-artifact'], img[src*='heat_map']").first
    picture.wait_for()
    width = "image => image.complete ? image.naturalWidth : 0"
    for _ in range(100):
        if picture.evaluate(width):
            break
        time.sleep(0.1)
    assert picture.evaluate(width) > 500


def test_the_comparisons_run_says_the_verdict(served: Served, look: Window) -> None:
    look.open(served.run(kind="comparison"))
    look.wait_for("Description")
    look.page.get_by_text(served.sentence.split(":")[0]).first.wait_for()


def test_the_comparisons_run_holds_tables(served: Served, look: Window) -> None:
    look.open(served.run(kind="comparison") + "/artifacts/tables/tiny/sql/costs.json")
    for text in ("molf-e", "routed", "74 % full"):
        look.wait_for(text)


def test_the_comparisons_run_holds_the_report(served: Served, look: Window) -> None:
    look.open(served.run(kind="comparison") + "/artifacts/report.html")
    report = look.page.frame_locator("iframe").first
    report.get_by_role("heading", name="What to use").wait_for()
    assert served.sentence.partition(". ")[0] in report.locator("body").inner_text()


def test_what_a_model_wrote_is_text(served: Served, look: Window) -> None:
    look.open(served.run(kind="cell", cell="tiny/sql/lora/seed-0") + "/artifacts/tables/predictions.json")
    look.wait_for(fake.HOSTILE)
    assert not look.dialogs
