"""Sweeps of learning rates on the real DVC and as a flow: what runs, what is taken from the cache, what fails alone."""

import shutil
from pathlib import Path

import pytest

from molf.config import read_yaml
from pipelines import checkout, graph
from pipelines.exchange import Traffic, _take
from pipelines.graph import Job
from tests.conftest import ROOT
from tests.pipelines.toy import Toy

FFT, LORA = "tiny-fact-fft", "tiny-fact-lora"


def cells(*names: str) -> list[str]:
    return [f"{stage}@{name}-0" for name in names for stage in ("train", "evaluate")]


def trials(*factors: float | str) -> list[str]:
    return [f"sweep@{name}-{factor}" for name in (FFT, LORA) for factor in factors]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """Two methods, two factors; DVC alone."""
    return Toy(tmp_path, tune=[0.3, 1.0])


def test_a_new_factor_runs_its_own_trials_and_trains_only_where_the_choice_moves(toy: Toy) -> None:
    """One story, because each chapter needs the one before."""
    before = ["prepare@fact", "base@tiny", "baseline@tiny-fact"]
    assert sorted(toy.repro()) == sorted([*before, *trials(0.3, 1.0), "choose", *cells(FFT, LORA)])
    assert toy.repro() == []

    toy.edit({"grid.tune": [0.3, 1.0, 3]})
    assert sorted(toy.repro()) == sorted([*trials(3), "choose"])  # the choice is as it was

    toy.choose(lora=10)
    toy.edit({"grid.tune": [0.3, 1.0, 3, 10.0]})
    assert sorted(toy.repro()) == sorted([*trials("10.0"), "choose", "train@tiny-fact-lora-0"])

    toy.edit({"methods.fft.learning_rate": 1e-5})
    ran = toy.repro()
    assert sorted(ran) == sorted(
        [*(name for name in trials(0.3, 1.0, 3, "10.0") if FFT in name), "train@tiny-fact-fft-0"]
    )

    toy.edit({"grid.tune": []})
    toy.choose()
    assert "train@tiny-fact-lora-0" not in toy.repro()  # at the block's own rates it is cached


def test_rows_that_no_trial_reads_train_no_trial_anew(toy: Toy) -> None:
    toy.repro()
    toy.tell("prepare@fact", other="other test rows")
    toy.edit({"tasks.fact.kind": "med"})
    assert sorted(toy.repro()) == sorted(["prepare@fact", "baseline@tiny-fact", *cells(FFT, LORA)])


def test_other_test_rows_are_no_dependency_of_a_trial() -> None:
    stage = read_yaml(ROOT / "dvc.yaml")["stages"]["sweep"]
    data = [path for path in stage["deps"] if path.startswith("data/")]
    assert data == [f"data/prepared/${{item.task}}/{split}.parquet" for split in ("train", "validation")]


DOT = """strict digraph {
"prepare@t" -> "sweep@m-t-fft-0.3";
"prepare@t" -> "sweep@m-t-fft-3";
"sweep@m-t-fft-0.3" -> "choose";
"sweep@m-t-fft-3" -> "choose";
"prepare@t" -> "train@m-t-fft-3";
"choose" -> "train@m-t-fft-3";
"prepare@t" -> "baseline@m-t";
"train@m-t-fft-3" -> "evaluate@m-t-fft-3";
"evaluate@m-t-fft-3" -> "compare";
"choose" -> "compare";
"baseline@m-t" -> "compare";
}"""


def test_trials_and_their_choice_come_before_cells(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    lists = "models: [m], tasks: [t], methods: [fft], seeds: [3], tune: [0.3, 3]"
    (tmp_path / "params.yaml").write_text(f"grid: {{{lists}}}\n")
    found = graph.read(tmp_path, DOT)
    assert found.before == ("prepare@t",) and found.choose == ("choose",) and found.after == ("compare",)
    assert {job.key: job.stages for job in found.trials} == {
        "m.t.fft.tune-0.3": ("sweep@m-t-fft-0.3",),
        "m.t.fft.tune-3": ("sweep@m-t-fft-3",),
    }
    assert {job.key: job.stages for job in found.jobs} == {
        "m.t": ("baseline@m-t",),
        "m.t.fft.3": ("train@m-t-fft-3", "evaluate@m-t-fft-3"),  # seed 3 and factor 3 are two things
    }
    trial = found.trials[0]
    assert trial.name == "m/t/fft/factor-0.3" and trial.results == Path("sweeps/m/t/fft/factor-0.3")
    for job in (trial, found.jobs[-1]):
        checkout.narrow(tmp_path / "params.yaml", job)
        assert "tune: [0.3, 3]" in (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text("grid: {models: [m], tasks: [t], methods: [fft], seeds: [3], tune: []}\n")
    without = "\n".join(line for line in DOT.splitlines() if "sweep" not in line)
    found = graph.read(tmp_path, without)
    assert "choose" in found.before and not found.trials and not found.choose


def test_another_machine_knows_trials_and_cells_by_the_parts_of_outputs_that_they_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial depends on a file of a folder, a cell on a value of a file: neither is there before it is brought."""
    toy = Toy(tmp_path / "toy", tune=[0.3, 1.0], methods=["fft"])
    config = toy.root / ".dvc/config"
    config.write_text(f"{config.read_text()}    remote = disk\n['remote \"disk\"']\n    url = {tmp_path / 'remote'}\n")
    toy.repro()
    trial, [training, evaluation] = f"sweep@{FFT}-0.3", cells(FFT)
    monkeypatch.chdir(toy.root)
    traffic = Traffic()
    assert traffic.needed([trial]) == ["data/prepared/fact", "models/tiny"]
    assert traffic.needed([trial], looked_into=True) == ["data/prepared/fact"]
    assert traffic.needed([training, evaluation], looked_into=True) == ["results/rates.json"]
    traffic.repo.push(targets=traffic.needed([trial, training]))
    for stage in (trial, training):
        Traffic().put(stage)

    away = ("cache", "tmp", "data", "models", "weights", "results", "reports", "tiny")
    other = tmp_path / "other"
    shutil.copytree(toy.root, other, ignore=shutil.ignore_patterns(*away))
    checkout.narrow_lock(other, Job("", (), (), ()))
    monkeypatch.chdir(other)
    assert _take(Traffic(), [trial]) == [trial]
    assert not (other / "models").exists(), "a finished trial's model was brought"
    assert _take(Traffic(), [training, evaluation]) == [training]
    for name in ("models/tiny", "results/rates.json", "weights/tiny/fact/fft/seed-0", "data/prepared/fact"):
        assert (other / name).exists(), name


@pytest.mark.acceptance
def test_a_flow_fans_out_trials_and_a_failed_one_costs_its_method_alone(tmp_path: Path, prefect_server: str) -> None:
    toy = Toy(tmp_path, server=prefect_server, tune=[0.3, 1.0])
    toy.tell(f"sweep@{LORA}-0.3", exit=1, say="failed: a reason", times=9)
    said = toy.flow(code=1)
    ran = [entry["stage"] for entry in toy.ran()]
    assert sorted(ran) == sorted(
        ["prepare@fact", "base@tiny", "baseline@tiny-fact", *trials(0.3, 1.0), "choose", *cells(FFT), "compare"]
    )
    assert ran.index("choose") > max(map(ran.index, trials(0.3, 1.0)))
    assert "failed: 1 of 3 cells lack" in said and f"sweep@{LORA}-0.3 failed: failed: a reason" in said
    assert not list((toy.root / ".molf/flow/cells").glob("*fft*")), "a finished trial's worktree stays"

    [branch] = toy.git("branch", "--list", "molf/*", "--format", "%(refname:short)").split()
    toy.git("merge", "--quiet", branch)
    toy.notes.joinpath(f"sweep@{LORA}-0.3").unlink()
    said = toy.flow()
    ran = [entry["stage"] for entry in toy.ran()]
    assert sorted(ran) == sorted([f"sweep@{LORA}-0.3", "choose", *cells(LORA), "compare"])
