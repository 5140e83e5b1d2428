"""Champions: registered in a real store of MLflow, their weights brought back from DVC's own cache and remote."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from molf import champions, stored
from molf.champions import CHAMPION, PREVIOUS, Champion
from molf.cli import run
from molf.config import load_params
from molf.errors import RunError, UserError
from molf.models import folder_hash
from molf.paths import read_json, write_json
from molf.promotion import Action

NAME = "molf-fact"
LENIENT = {"gain": {"untrained": None}}  # these models learn nothing
ADAPTERS = {**LENIENT, "cost": {"weights_gb": 0.00005}}  # a whole model of 87 kB does not pass


@pytest.fixture(scope="module")
def kept(trained: Path, fresh: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained project under git and DVC, with a fresh store; to be copied before it is changed."""
    from dvc.repo import Repo

    root = tmp_path_factory.mktemp("kept") / "project"
    shutil.copytree(trained, root)
    (root / "mlflow.db").write_bytes(fresh)
    git(root, "init", "--quiet")
    outputs = [*root.glob("models/*"), *root.glob("weights/*/*/*/*"), *root.glob("results/*/*/*/*/*")]
    stage = {"cmd": "true", "outs": sorted(str(path.relative_to(root)) for path in outputs)}
    write_json(root / "dvc.yaml", {"stages": {"all": stage}})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Repo.init().close()
        with Repo() as repo:
            repo.commit(force=True)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "trained")
    return root


def git(root: Path, *arguments: str) -> None:
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *author, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def project(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(kept, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("molf.models.quiet", lambda: None)  # which is for good
    gate(LENIENT)
    return tmp_path / "project"


def gate(block: dict[str, Any]) -> None:
    write_json(Path("params.yaml"), {**read_json(Path("params.yaml")), "promotion": block})


def promote(dry_run: bool = False) -> champions.Result:
    (result,) = champions.promote(load_params(), ["fact"], dry_run)
    return result


def client() -> Any:
    found = champions._client()
    assert found is not None
    return found


def aliases() -> dict[str, str]:
    return {alias: str(version) for alias, version in client().get_registered_model(NAME).aliases.items()}


def versions() -> list[Any]:
    return list(client().search_model_versions(f"name = '{NAME}'"))


def test_the_best_is_registered_once_with_what_is_known_of_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["promote", "--dry-run"]) == 0
    assert "dry run: nothing was changed" in capsys.readouterr().out
    assert client().search_registered_models() == []
    assert run(["promote", "--task", "fact"]) == 0
    said = capsys.readouterr().out
    best = max(read_json(Path("reports/comparison.json"))["groups"][0]["methods"], key=lambda method: method["mean"])
    name = f"tiny/fact/{best['method']}/seed-0"
    assert f"-> promoted: {name} passes the gate and is the first champion" in said
    (version,) = versions()
    folder, record = Path("results") / name, read_json(Path("results") / name / "train/run.json")
    metrics = read_json(folder / "evaluation/metrics.json")
    told = {key.removeprefix("molf."): value for key, value in version.tags.items()}
    assert told["cell"] == name
    assert told["fingerprint"] == record["fingerprint"]
    assert float(told["score"]) == metrics["primary"]
    assert [float(told[f"score_{key}"]) for key in ("low", "mean", "high")] == pytest.approx(
        [best[key] for key in ("low", "mean", "high")], abs=1e-4
    )
    assert told["examples"] == str(metrics["n"])
    assert told["data_hash"] == record["data"]["hash"]
    assert told["weights_hash"] == folder_hash(Path("weights") / name)
    assert told["dvc_path"] == f"weights/{name}"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert told["git_commit"] == f"{head}+"  # params.yaml has another gate than was committed
    lock = Path("dvc.lock").read_text()
    assert all(digest in lock for digest in json.loads(told["dvc"]).values())
    assert "molf champion --task fact" in version.description

    from mlflow.server import handlers  # which sources a server takes

    handlers._validate_source_run(version.source, version.run_id)
    with pytest.raises(Exception, match="Invalid model version source"):
        handlers._validate_source_run(str(project / "weights" / name), version.run_id)
    lineage = Path(client().download_artifacts(version.run_id, "champion/lineage.txt", str(project)))
    assert lineage.read_text().startswith(f"{name}: score ")
    card = Path(client().download_artifacts(version.run_id, "champion/README.md", str(project))).read_text()
    assert f"# {name}" in card
    assert told["weights_hash"] in card

    assert run(["promote"]) == 0
    assert f"-> unchanged: {name} is the champion already" in capsys.readouterr().out
    assert len(versions()) == 1
    assert aliases() == {CHAMPION: "1"}


def test_a_better_one_takes_over_a_worse_one_never_and_a_rollback_is_an_alias(project: Path) -> None:
    gate(ADAPTERS)
    assert promote().decision.action is Action.PROMOTED
    (first,) = versions()
    assert first.tags["molf.cell"] == "tiny/fact/lora/seed-0"
    gate(LENIENT)
    assert promote().decision.action is Action.PROMOTED
    assert aliases() == {CHAMPION: "2", PREVIOUS: "1"}
    gate(ADAPTERS)
    kept = promote()
    assert kept.decision.action is Action.KEPT
    assert "no better" in kept.decision.sentence
    assert aliases() == {CHAMPION: "2", PREVIOUS: "1"}
    assert champions.find(load_params(), "fact", previous=True).cell.method == "lora"
    # Back to the earlier, by hand as the docs say; it stays until a better one passes, which is version 2 again.
    client().set_registered_model_alias(NAME, CHAMPION, "1")
    assert promote().decision.action is Action.UNCHANGED
    gate(LENIENT)
    assert promote().decision.action is Action.PROMOTED
    assert aliases() == {CHAMPION: "2", PREVIOUS: "1"}
    assert len(versions()) == 2


def test_a_champion_comes_back_from_the_remote_after_the_checkout_moved_on(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dvc.repo import Repo

    gate(ADAPTERS)
    promote()
    with Repo() as repo:
        with repo.config.edit() as config:
            config["remote"]["disk"] = {"url": str(tmp_path / "remote")}
            config["core"]["remote"] = "disk"
        repo.push(remote="disk")
    expected = folder_hash(Path("weights/tiny/fact/lora/seed-0"))
    for name in ("weights", "models", "results", "data", "reports", ".dvc/cache"):
        shutil.rmtree(name)
    for name in ("dvc.lock", "dvc.yaml"):
        Path(name).unlink()
    params = read_json(Path("params.yaml"))
    params["models"]["tiny"]["license"] = "mit"  # of now, not of the champion
    write_json(Path("params.yaml"), params)

    assert run(["champion", "--task", "fact"]) == 0
    assert "next: molf champion --task fact --out FOLDER" in capsys.readouterr().out
    out = tmp_path / "out"
    assert run(["champion", "--task", "fact", "--out", str(out)]) == 0
    assert not list(Path(".molf").glob("champion-*"))
    assert (out / "lineage.txt").read_text().startswith("tiny/fact/lora/seed-0: score ")
    card = (out / "README.md").read_text()
    assert expected in card
    assert "license: unknown" in card
    assert read_json(out / "molf_export.json")["weights"] == expected

    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Its base model is on no hub: the folder is whole, without it.
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    ids = AutoTokenizer.from_pretrained(out)("w1 w2", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape[:2] == ids.shape

    capsys.readouterr()
    shutil.rmtree(tmp_path / "remote")
    shutil.rmtree(".dvc/cache")
    assert run(["champion", "--task", "fact", "--out", str(tmp_path / "other")]) == 1
    assert "the remote disk" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_two_promotions_at_once_make_one_version(project: Path) -> None:
    found: list[Action] = []

    def one() -> None:
        found.append(promote().decision.action)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [Action.PROMOTED, Action.UNCHANGED]
    assert len(versions()) == 1
    assert aliases() == {CHAMPION: "1"}


def edit_comparison() -> None:
    path = Path("reports/comparison.json")
    found = read_json(path)
    found["groups"][0]["methods"][0]["low"] = 0.99
    write_json(path, found)


def lose_cell() -> None:
    shutil.rmtree("results/tiny/fact/molf/seed-0/evaluation")


def change_params() -> None:
    params = read_json(Path("params.yaml"))
    params["compare"]["margin"] = 0.5
    write_json(Path("params.yaml"), params)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (edit_comparison, "groups.0.methods.0.low"),
        (lose_cell, "tiny/fact/molf/seed-0"),
        (change_params, "comparison.json is not up to date: the results here give another sentence, margin"),
        (lambda: Path("reports/comparison.json").unlink(), "there is no reports/comparison.json yet"),
    ],
)
def test_nothing_is_promoted_from_a_comparison_that_is_not_up_to_date(
    project: Path, spoil: Callable[[], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil()
    assert run(["promote"]) == 2
    assert said in capsys.readouterr().err
    assert client().search_registered_models() == []


def touch_weights() -> None:
    for path in Path("weights").glob("*/*/*/*/*.safetensors"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"\0\0")


def lose_cache() -> None:
    shutil.rmtree(".dvc/cache")


def change_predictions_record() -> None:
    for path in Path("results").glob("*/*/*/*/train/summary.json"):
        summary = read_json(path)
        summary["lineage"]["weights"]["kept"] = False
        write_json(path, summary)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (touch_weights, "as it lies here, is not in DVC's cache"),
        (lose_cache, "as it lies here, is not in DVC's cache"),
        (change_predictions_record, "its weights were not kept"),
    ],
)
def test_a_model_that_could_not_be_brought_back_is_not_promoted(
    project: Path, spoil: Callable[[], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil()
    assert run(["promote"]) == 1
    assert said in capsys.readouterr().err
    assert client().search_registered_models() == []


def test_exit_codes(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    gate({"score": 0.99})
    assert run(["promote"]) == 1
    captured = capsys.readouterr()
    assert "at least 0.99 is asked" in captured.out
    assert "nothing passed the gate" in captured.err
    assert run(["promote", "--task", "sql"]) == 2
    assert run(["champion", "--task", "fact"]) == 2
    assert "`molf promote --task fact` makes one" in capsys.readouterr().err
    assert run(["champion", "--task", "../x"]) == 2
    gate(LENIENT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hushhush@127.0.0.1:9")
    for command in (["promote"], ["champion", "--task", "fact"]):
        assert run(command) == 1
        captured = capsys.readouterr()
        assert "MLflow (http://me:***@127.0.0.1:9)" in captured.err
        assert "hushhush" not in captured.out + captured.err


def test_a_task_of_which_nothing_was_compared_fails_its_gate_alone(project: Path) -> None:
    comparison = {**champions.current_comparison(load_params()), "groups": []}
    result = champions._promote(load_params(), comparison, "fact", NAME, False)
    assert result.decision.action is Action.NONE
    assert result.lines[0] == "fact: the comparison holds none of its cells; registered model molf-fact"


# --- without a store -------------------------------------------------------------------------------------------------


def version(**changed: Any) -> Any:
    cell = "tiny/sql/lora/seed-0"
    folders = [f"weights/{cell}", "models/tiny", f"results/{cell}/train", f"results/{cell}/evaluation"]
    tags = {
        "cell": cell,
        "dvc": json.dumps({folder: f"{'a' * 32}.dir" for folder in folders}),
        "score": "0.5",
        "task_kind": "sql",
        "primary": "execution_accuracy",
        **dict.fromkeys(("fingerprint", "weights_hash", "model_hash", "data_hash"), "b" * 16),
        **changed,
    }
    return SimpleNamespace(
        name="molf-sql",
        version="1",
        run_id="r",
        tags={f"molf.{key}": value for key, value in tags.items() if value is not None},
    )


def test_a_version_of_molf_is_read() -> None:
    assert Champion.of(version()).cell.method == "lora"


@pytest.mark.parametrize(
    "changed",
    [
        {"cell": None},
        {"cell": "../../etc/seed-0"},
        {"cell": "../sql/lora/seed-0"},
        {"cell": "tiny/sql/lora/seed-x"},
        {"score": "nan"},
        {"score": "high"},
        {"weights_hash": "../../x"},
        {"test_rows": "x"},
        {"dvc": "[]"},
        {"dvc": json.dumps({"weights/tiny/sql/lora/seed-0": "a" * 32 + ".dir"})},
        {"dvc": version().tags["molf.dvc"].replace("a" * 32, "../" * 10)},
        {"dvc": version().tags["molf.dvc"].replace("models/tiny", "../outside")},
    ],
)
def test_a_version_whose_tags_are_not_molfs_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="version 1 of molf-sql is none that molf registered, or its tags were changed"):
        Champion.of(version(**changed))


@pytest.mark.parametrize("experiment", ["a/b", "a:b", "it's", "../x", "", "x\n"])
def test_an_experiment_that_cannot_name_a_registered_model_is_refused(experiment: str, trained: Path) -> None:
    params = load_params(trained / "params.yaml")
    renamed = params.model_copy(update={"tracking": params.tracking.model_copy(update={"experiment": experiment})})
    with pytest.raises(UserError, match=re.escape("tracking.experiment")):
        champions.registered_name(renamed, "fact")
    assert champions.registered_name(params, "fact") == NAME


@pytest.mark.parametrize("parts", [("..", "x"), ("a", "..", "..", "x"), ("/etc", "x"), ("",), ()])
def test_a_list_of_files_that_leads_out_of_its_folder_is_refused(parts: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="lies outside of it"):
        stored._copy(None, [(parts, "a" * 32)], tmp_path / "into")
    assert list(tmp_path.iterdir()) == []
