"""Base models from every kind of source; what lacks is named before anything is trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from molf import base, sources, tiny
from molf.blocks import ModelBlock
from molf.config import Params, check_params, read_yaml
from molf.errors import UserError
from molf.methods import keeps_weights
from molf.models import INFO, describe, find_weights, folder_hash, load_model, load_tokenizer
from molf.paths import Cell, read_json, remove_leftovers, write_json

ROOT = Path(__file__).parents[1]
COMMIT = "c" * 40


def params(model: dict[str, Any], **sections: Any) -> Params:
    """params.yaml with one more model, `mine`, and other sections."""
    data = read_yaml(ROOT / "params.yaml") | sections
    data["models"]["mine"] = model
    return check_params(data, "params.yaml")


def block(**model: Any) -> ModelBlock:
    return params(model).models["mine"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny.build(directory, seed=0, layers=1, width=32, heads=2, vocabulary=400, steps=1, progress=False)
    return directory


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_tiny_is_built_and_described_alike_each_time(tmp_path: Path) -> None:
    size = {"layers": 1, "width": 32, "heads": 2, "vocabulary": 400, "steps": 1}
    made = block(kind="tiny", path="src/molf/tiny.py", seed=0, **size)
    for name in ("a", "b"):
        info = base.build("mine", made, tmp_path / name)
        assert info["seconds"] > 0 and info["generated"]
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b")
    assert describe(tmp_path / "a") == {
        "name": "mine",
        "kind": "tiny",
        "generated": True,
        "hash": folder_hash(tmp_path / "a"),
    }


def test_a_local_checkpoint_is_copied_without_code_or_pickles(copy: Path, tmp_path: Path) -> None:
    (copy / "modeling_evil.py").write_text("raise SystemExit")
    (copy / "extra.bin").write_bytes(b"pickle")
    info = base.build("mine", block(kind="path", path=str(copy)), tmp_path / "out")
    assert info["kind"] == "path" and not info["generated"]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    model, tokenizer = load_model(tmp_path / "out", torch.float32), load_tokenizer(tmp_path / "out")
    assert model.num_parameters() > 0 and tokenizer.pad_token_id is not None


def test_a_hub_model_comes_at_its_pin_from_the_hubs_cache(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = block(kind="hub", path="sources.lock", id="org/model", revision="main")
    with pytest.raises(UserError, match=r"models.mine: sources.lock pins no revision; run `molf pin`"):
        base.build("mine", hub, tmp_path / "out")
    write_json(tmp_path / "sources.lock", {"models.mine": {"revision": COMMIT}})
    with pytest.raises(UserError, match=rf"models.mine: org/model at {COMMIT} cannot be fetched"):
        base.build("mine", hub, tmp_path / "out")
    shutil.copytree(copy, tmp_path / "hub" / "models--org--model" / "snapshots" / COMMIT)
    assert base.build("mine", hub, tmp_path / "out")["revision"] == COMMIT
    assert read_json(tmp_path / "out" / INFO)["id"] == "org/model"
    load_model(tmp_path / "out", torch.float32)


def test_pinning_writes_commits_and_says_what_moved(tmp_path: Path) -> None:
    mine = params({"kind": "hub", "path": "sources.lock", "id": "org/model", "revision": "main"})
    lock = tmp_path / "sources.lock"
    write_json(lock, {"models.other": {"sha256": "1"}})
    first = sources.pin(mine, lambda kind, id, revision: f"{kind} {id} {revision}", str, lock)
    assert first == {"models.mine revision": (None, "model org/model main")}
    again = sources.pin(mine, lambda kind, id, revision: "moved", str, lock)
    assert again == {"models.mine revision": ("model org/model main", "moved")}
    assert read_json(lock) == {"models.mine": {"revision": "moved"}, "models.other": {"sha256": "1"}}
    assert sources.pinned("models.mine", "revision", lock) == "moved"


def test_the_general_text_is_pinned_like_a_task(tmp_path: Path) -> None:
    data = read_yaml(ROOT / "src/molf/presets/paper.yaml")
    mine = params({"kind": "path", "path": "x"}, general=data["general"])
    found = sources.pin(mine, lambda kind, id, revision: f"{kind} {id} {revision}", str, tmp_path / "sources.lock")
    assert found == {"general revision": (None, "dataset Salesforce/wikitext main")}
    fixed = params({"kind": "path", "path": "x"}, general=data["general"] | {"revision": COMMIT})
    assert sources.pin(fixed, lambda *_: "", str, tmp_path / "sources.lock") == {}


# --- what lacks ----------------------------------------------------------------------------------------------------


def problem(model: ModelBlock, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        base.build("mine", model, tmp_path / "out")
    return str(caught.value)


def test_a_folder_that_lacks_is_named(tmp_path: Path) -> None:
    assert "models.mine.path: there is no folder" in problem(block(kind="path", path=str(tmp_path / "no")), tmp_path)


def test_a_folder_without_weights_is_named(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    said = problem(block(kind="path", path=str(copy)), tmp_path)
    assert "models.mine.path" in said and "has no *.safetensors weights" in said


def test_pickled_weights_are_not_taken(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin is pickled and never loaded" in problem(block(kind="path", path=str(copy)), tmp_path)


def test_a_folder_that_is_no_checkpoint_tells_all_that_lacks(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = problem(block(kind="path", path=str(tmp_path / "empty")), tmp_path)
    assert all(f"has no {what}" in said for what in ("config.json", "*.safetensors weights", "tokenizer"))


def test_a_tokenizer_that_lacks_or_has_no_end_is_named(copy: Path, tmp_path: Path) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token": None}))
    said = problem(block(kind="path", path=str(copy)), tmp_path)
    assert "the tokenizer has no end-of-sequence token" in said
    path.write_text(json.dumps(config | {"eos_token": "<new>"}))
    said = problem(block(kind="path", path=str(copy)), tmp_path)
    assert "end-of-sequence token <new> has number" in said and "the model knows 0 to 399" in said
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer (tokenizer.json" in problem(block(kind="path", path=str(copy)), tmp_path)


def test_weights_that_do_not_load_are_named(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UserError, match="does not load|no tokenizer loads"):
        base.build("mine", block(kind="path", path=str(copy)), tmp_path / "out")
        load_model(tmp_path / "out", torch.float32)


def test_a_gguf_that_lacks_or_is_none_is_named(tmp_path: Path) -> None:
    assert "there is no file" in problem(block(kind="gguf", path=str(tmp_path / "no.gguf")), tmp_path)
    missing = block(kind="gguf", path="sources.lock", package="no_such_package")
    assert "models.mine.package: no_such_package is not installed" in problem(missing, tmp_path)


# --- weights that go after their evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "kind", "stays"),
    [("all", "fft", True), ("adapter-only", "fft", False), ("adapter-only", "molf-e", True), ("none", "lora", False)],
)
def test_what_stays_is_what_keep_says(keep: str, kind: str, stays: bool) -> None:
    assert keeps_weights(keep, kind) is stays


def test_weights_that_went_are_missed_with_a_way_out(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    assert find_weights(kept) == kept
    elsewhere = tmp_path / "scratch"
    elsewhere.mkdir()
    (elsewhere / "w").write_text("1")
    write_json(kept / "not_kept.json", {"path": str(elsewhere), "hash": folder_hash(elsewhere)})
    assert find_weights(kept) == elsewhere
    (elsewhere / "w").write_text("2")
    with pytest.raises(UserError, match="these weights were not kept"):
        find_weights(kept)


def test_what_an_evaluated_cell_left_goes_and_nothing_else(tmp_path: Path) -> None:
    began, later = "2026-01-02T03:04:05+00:00", "2026-01-02T03:05:05+00:00"
    # name of a method: its run.json and its metrics.json, as far as they say which training they are of
    cells: dict[str, tuple[Any, Any]] = {
        "evaluated": (("f", began), ("f", began)),
        "another": (("f", began), ("f", began)),
        "trained": (("f", began), None),
        "changed": (("g", later), ("f", began)),
        "forced": (("f", later), ("f", began)),
        "training": (None, ("f", began)),
        "never-trained": (None, None),
    }
    folders = ("checkpoints", "weights", "trainer")
    for method, (run, metrics) in cells.items():
        results = tmp_path / Cell("tiny", "fact", method, 0).results
        if run:
            write_json(results / "train/run.json", dict(zip(("fingerprint", "started"), run, strict=True)))
        if metrics:
            of = dict(zip(("train_fingerprint", "train_started"), metrics, strict=True))
            write_json(results / "evaluation/metrics.json", of)
        for folder in folders:
            write_json(tmp_path / ".molf" / folder / "tiny/fact" / method / "seed-0/x/y.json", {})

    def left(folder: str) -> set[str]:
        return {path.parts[-4] for path in (tmp_path / ".molf" / folder).glob("*/*/*/*/x/y.json")}

    remove_leftovers(but=Cell("tiny", "fact", "another", 0), root=tmp_path)
    assert all(left(folder) == set(cells) - {"evaluated"} for folder in folders)
    remove_leftovers(root=tmp_path)
    assert all(left(folder) == set(cells) - {"evaluated", "another"} for folder in folders)


def test_no_bar_of_a_library_is_drawn_where_nobody_watches() -> None:
    program = (
        "from molf.models import quiet\nquiet()\n"
        "from transformers.modeling_gguf_pytorch_utils import tqdm\nlist(tqdm(range(3)))\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("change", ["renamed", "truncated", "of another shape"])
def test_weights_that_do_not_fit_the_config_are_named(copy: Path, tmp_path: Path, change: str) -> None:
    """transformers would fill them with random numbers and only warn."""
    path = copy / "model.safetensors"
    weights = load_file(path)
    if change == "renamed":
        save_file({f"other.{name}": value for name, value in weights.items()}, path, {"format": "pt"})
    elif change == "of another shape":
        save_file({name: value[:1].clone() for name, value in weights.items()}, path, {"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not in its safetensors files or|does not load as"):
        base.build("mine", block(kind="path", path=str(copy)), tmp_path / "out")
