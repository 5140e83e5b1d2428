"""The stages on the real DVC: what runs when something changes, and what does not."""

import json
import re

from tests.conftest import Project


def test_a_change_reruns_what_it_touches_and_nothing_else(project: Project) -> None:
    """One story, because each chapter needs the one before: first run, no change, LoRA's block, the report's code."""
    first = project.repro("compare")
    cells = [f"tiny-fact-{method}-0" for method in ("fft", "lora")]
    # The grid's task alone is fetched: nothing is made for blocks that it does not name.
    assert sorted(first) == sorted(
        [
            "fetch@fact",
            "prepare@fact",
            "base@tiny",
            "general",
            "code",
            "baseline@tiny-fact",
            "choose",
            *(f"{stage}@{cell}" for stage in ("train", "evaluate") for cell in cells),
            "compare",
        ]
    )
    rows = json.loads((project.root / "reports/comparison.json").read_text())["groups"][0]
    assert rows["model"] == "tiny" and rows["task"] == "fact"

    assert project.repro("compare") == []

    project.edit({"methods.lora.r": 2})
    lora = ["train@tiny-fact-lora-0", "evaluate@tiny-fact-lora-0", "compare"]
    assert project.repro("compare") == ["code", *lora]  # whose hashes are as they were
    config = json.loads((project.root / "results/tiny/fact/lora/seed-0/train/run.json").read_text())["config"]
    assert config["method"]["r"] == 2

    page = project.root / "src/molf/report/page.py"
    page.write_text(page.read_text() + "\n# changed\n")
    assert project.repro("compare") == ["compare"]

    # A new method's file trains nothing anew, a changed one what is made of it.
    methods = project.root / "src/molf/methods"
    (methods / "another.py").write_text('"""Another method."""\n')
    assert project.repro("compare") == ["code"]
    (methods / "lora.py").write_text((methods / "lora.py").read_text() + "\n# changed\n")
    assert project.repro("compare") == ["code", *lora]

    # A licence and the words of cards and of lineage train nothing anew.
    for name in ("cards", "lineage", "notes"):
        view = project.root / f"src/molf/{name}.py"
        view.write_text(view.read_text() + "\n# changed\n")
    assert project.repro("compare") == []
    project.edit({"tasks.fact.license": "mit", "general.license": "mit"})
    assert sorted(project.repro("compare")) == ["general", "prepare@fact"]
    assert "license: mit" in (project.root / "data/cards/fact/README.md").read_text()

    # A seed that leaves the grid changes the comparison, and trains nothing.
    project.edit({"grid.methods": ["fft"]})
    assert project.repro("compare") == ["choose", "compare"]
    table = project.run("molf", "show")
    assert re.findall(r"^  (\w+) +\d\.\d{3} \[", table, flags=re.MULTILINE) == ["base", "fft"], table
