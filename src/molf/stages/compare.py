"""`python -m molf.stages.compare`: compares the grid's cells and writes reports/."""

import shutil
from pathlib import Path

from molf.config import load_params
from molf.errors import main
from molf.paths import REPORTS, atomic, remove_leftovers, write_json, write_text


def run() -> None:
    params, root = load_params(), Path()

    from molf import tracking
    from molf.report import comparison, examples, figures, page, verdicts

    result = comparison.build(params, root)
    folder = REPORTS / "figures"
    shutil.rmtree(folder, ignore_errors=True)
    drawn = figures.draw(result, root, folder)
    text = page.render(result, drawn, folder, verdicts.limits(result), examples.collect(result, root))
    write_json(REPORTS / "comparison.json", result)
    atomic(REPORTS / "comparison.csv", lambda path: comparison.flat(result).to_csv(path, index=False))
    write_text(REPORTS / "report.html", text)
    tracking.log_comparison(REPORTS, params.tracking.experiment)
    remove_leftovers()
    print(page.terminal_table(result))


if __name__ == "__main__":
    raise SystemExit(main(run))
