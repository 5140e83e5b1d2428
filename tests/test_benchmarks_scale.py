"""The benchmarks of the flow and of its bookkeeping: what they count, at tiny sizes; never how fast."""

from pathlib import Path

import pytest

from benchmarks import flow, scale
from benchmarks.flow import Ran
from molf.config import read_yaml


@pytest.mark.parametrize("cells", scale.CELLS)
def test_a_grid_has_as_many_cells_as_asked_for(cells: int) -> None:
    lists = scale.grid(cells).values()
    product = 1
    for values in lists:
        product *= len(set(values))
    assert product == cells
    with pytest.raises(ValueError, match=f"{cells + 1} cells are no grid"):
        scale.grid(cells + 1)


def test_seconds_of_a_run_are_shared_out_without_rest_or_overlap() -> None:
    ran = [
        Ran("base tiny", 10.0, 15.0, 1.0),
        Ran("train tiny fact fft 0", 18.0, 118.0, 150.0),
        Ran("evaluate tiny fact fft 0", 120.0, 140.0, 30.0),
        Ran("compare", 147.0, 150.0, 3.0),
    ]
    found = flow.between(ran, 4.0, 160.0)
    # Before the first training lie 3 seconds, which belong to no cell; before its evaluation 2; before and after the
    # comparison 7 and 10.
    expected = {"cells": 120.0, "other_stages": 8.0, "to_the_first_stage": 6.0, "between_cells": 2.0, "rest": 20.0}
    assert found == expected and sum(found.values()) == 156.0
    assert flow.between([], 4.0, 9.0)["to_the_first_stage"] == 5.0
    assert flow.added(found, {**found, "between_cells": 1.2}) == {
        "share": 2 / 120,
        "share_of_plain_dvc": 0.01,
        "limit": 0.05,
        "met": True,
    }
    assert not flow.added({**found, "between_cells": 6.0}, found)["met"]


@pytest.mark.acceptance
def test_dvc_takes_made_up_cells_for_real_ones(tmp_path: Path) -> None:
    found = scale.dvc(tmp_path, 2, 1)  # which raises if a stage is stale, or does not come from the run cache
    assert all(sample["cpu_seconds"] > 0 for name in scale.DVC for sample in found[name])
    stages = read_yaml(tmp_path / "project/dvc.lock")["stages"]
    assert sum(name.startswith("train@") for name in stages) == 2
    assert found["remote"]["run_cache_files"] == len(stages)
    table = scale.lines({"dvc": [found]}).splitlines()
    assert table[0].endswith("| 2 cells |") and len(table) == 2 + len(scale.DVC) + 2
