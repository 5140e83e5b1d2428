"""A cell's model as a folder that transformers or PEFT loads without molf."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from molf import export
from molf.cards import Made
from molf.cli import run
from molf.config import load_params
from molf.errors import RunError, UserError
from molf.methods import ADAPTERS, METHODS
from molf.models import folder_hash, load_tokenizer
from molf.paths import Cell, file_hash, read_json, write_json
from tests.conftest import QUIET

ALL = ("fft", "lora", "molf", "molf-e")
# Nothing but transformers and PEFT: what a colleague has.
COLLEAGUE = """
import re, sys
import numpy as np
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder, adapter in zip(sys.argv[1::2], sys.argv[2::2]):
    kind = AutoPeftModelForCausalLM if adapter == "adapter" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)("w1 w2 w3", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        np.save(folder + ".npy", model(ids).logits[0].numpy())
assert not [name for name in sys.modules if name.partition(".")[0] == "molf"]
"""


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr("molf.models.quiet", lambda: None)  # which is for good
    return tmp_path / "project"


def cell(method: str) -> Cell:
    return Cell("tiny", "fact", method, 0)


def write(method: str, directory: Path, merge: bool = False, force: bool = False) -> list[str]:
    return export.export(cell(method), directory, load_params(), merge, force)


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): file_hash(path) for path in directory.rglob("*") if path.is_file()}


def leftovers(directory: Path) -> list[Path]:
    return list(directory.parent.glob(f".{directory.name}.*"))


def test_transformers_and_peft_load_every_method_without_molf(project: Path, tmp_path: Path) -> None:
    arguments = []
    for method in ALL:
        write(method, tmp_path / method)
        arguments += [str(tmp_path / method), "adapter" if method in ADAPTERS else "whole"]
    for method in sorted(ADAPTERS.intersection(ALL)):
        write(method, tmp_path / f"{method}-merged", merge=True)
        arguments += [str(tmp_path / f"{method}-merged"), "whole"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", COLLEAGUE, *arguments]
    done = subprocess.run(command, env={**environment, **QUIET}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = load_tokenizer(Path("models/tiny"))("w1 w2 w3", return_tensors="pt")["input_ids"]
    for folder, _ in zip(arguments[::2], arguments[1::2], strict=True):
        method = Path(folder).name.removesuffix("-merged")
        own = METHODS[method].load(Path("models/tiny"), cell(method).weights, torch.float32).eval()
        with torch.inference_mode():
            expected = own(input_ids=ids).logits[0].numpy()
        np.testing.assert_allclose(np.load(f"{folder}.npy"), expected, atol=1e-5)


@pytest.mark.parametrize("method", ALL)
def test_the_folder_holds_safetensors_a_tokenizer_and_a_card_whose_code_runs(
    project: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    lines = write(method, out)
    names = set(contents(out))
    weights = {"adapter_model.safetensors", "adapter_config.json"} if method in ADAPTERS else {"model.safetensors"}
    assert weights | {"README.md", "tokenizer.json", "tokenizer_config.json", export.MANIFEST} <= names
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".md"}
    assert re.search(r"logits differ by at most \d", lines[1])
    manifest = read_json(out / export.MANIFEST)
    assert manifest["weights"] == folder_hash(cell(method).weights)
    assert set(manifest["files"]) == names - {export.MANIFEST}
    assert not leftovers(out)
    (code,) = re.findall(r"```python\n(.+?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(out)
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(found["answer"][0]) > len(found["ids"])


def test_an_adapters_base_is_named_as_it_is_elsewhere(project: Path, tmp_path: Path) -> None:
    lines = write("lora", tmp_path / "local")
    config = read_json(tmp_path / "local" / export.ADAPTER)
    assert config["base_model_name_or_path"] == str(project / "models/tiny")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert any("not on the hub" in line for line in lines) and any("--merge" in line for line in lines)
    assert "The base model is not on the hub" in (tmp_path / "local/README.md").read_text()
    path = cell("lora").results / "train/run.json"
    told = read_json(path)
    told["model"] |= {"kind": "hub", "id": "google/gemma-3-1b-pt", "revision": "e" * 40}
    write_json(path, told)
    lines = write("lora", tmp_path / "hub")
    config = read_json(tmp_path / "hub" / export.ADAPTER)
    assert (config["base_model_name_or_path"], config["revision"]) == ("google/gemma-3-1b-pt", "e" * 40)
    assert f"google/gemma-3-1b-pt at {'e' * 40}" in lines[2]
    assert "not on the hub" not in (tmp_path / "hub/README.md").read_text()


def test_a_folder_that_is_not_empty_is_refused(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "own.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; take a new one"):
        write("fft", out)
    assert contents(out).keys() == {"own.txt"}
    (out / "own.txt").unlink()
    write("fft", out)  # an empty one is taken
    with pytest.raises(UserError, match="is not empty; --force replaces what the earlier export wrote"):
        write("lora", out)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write("fft", tmp_path / "file")


def test_force_replaces_what_an_export_wrote_and_nothing_else(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write("fft", out)
    (out / "notes").mkdir()
    (out / "notes/own.txt").write_text("mine")
    (out / "empty").mkdir()
    (out / "link").symlink_to("notes")
    (out / "dangling").symlink_to("nowhere")
    write("lora", out, force=True)
    assert (out / "notes/own.txt").read_text() == "mine"
    assert (out / "empty").is_dir()
    assert [os.readlink(out / name) for name in ("link", "dangling")] == ["notes", "nowhere"]
    assert not (out / "model.safetensors").exists() and (out / "adapter_model.safetensors").exists()
    assert "notes/own.txt" not in read_json(out / export.MANIFEST)["files"]
    before = contents(out)
    (out / "README.md").write_text("edited by hand")
    with pytest.raises(UserError, match="README.md changed since the export wrote it"):
        write("fft", out, force=True)
    assert contents(out) == {**before, "README.md": file_hash(out / "README.md")}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json was not written by an export"):
        write("fft", other, force=True)
    assert contents(other).keys() == {"config.json"}
    (out / "README.md").unlink()
    write("fft", out, force=True)
    (out / export.MANIFEST).write_text("[]")
    with pytest.raises(UserError, match="is not what an export writes"):
        write("fft", out, force=True)
    with pytest.raises(UserError, match="holds the folder that this runs in"):
        write("fft", Path("."), force=True)
    assert not leftovers(out) and not leftovers(other)


@pytest.mark.parametrize("name", [export.ADAPTER, "pytorch_model.bin", "model-00001-of-00002.safetensors", "code.py"])
def test_what_would_be_loaded_with_the_export_is_not_left_beside_it(project: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name} would be loaded with the export"):
        write("fft", tmp_path / "out", force=True)
    assert contents(tmp_path / "out").keys() == {name}


@pytest.mark.parametrize("folder", ["weights/tiny/fact/fft/seed-0/out", "models/new", "data/cards", ".molf/out"])
def test_no_export_goes_where_stages_write(project: Path, folder: str) -> None:
    with pytest.raises(UserError, match="which the pipeline's stages empty"):
        write("fft", Path(folder), force=True)
    assert not (Path(folder) / export.MANIFEST).exists()


def test_other_weights_than_the_lineages_are_not_written(project: Path, tmp_path: Path) -> None:
    path = cell("fft").weights / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(RunError, match=r"have hash .*, its training wrote .*dvc checkout weights/tiny/fact/fft"):
        write("fft", tmp_path / "out")
    path = Path("models/tiny/config.json")
    path.write_text(path.read_text() + " ")
    with pytest.raises(RunError, match="dvc checkout models/tiny"):
        write("lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_here_is_named(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run(["export", "tiny/fact/base/seed-0", out]) == 2
    assert "was not trained" in capsys.readouterr().err
    assert run(["export", "tiny/fact/nothing/seed-0", out]) == 2
    assert "there is no cell" in capsys.readouterr().err
    shutil.rmtree(cell("fft").weights)
    assert run(["export", cell("fft").name, out]) == 2
    assert "`dvc pull weights/tiny/fact/fft/seed-0`" in capsys.readouterr().err
    write_json(cell("fft").weights / "not_kept.json", {"path": ".molf/weights/gone", "hash": "0"})
    assert run(["export", cell("fft").name, out]) == 2
    assert "were not kept" in capsys.readouterr().err
    path = cell("lora").results / "train/summary.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != "lineage"})
    assert run(["export", cell("lora").name, out]) == 2
    assert "noted no hash of its weights" in capsys.readouterr().err
    shutil.rmtree("models/tiny")
    assert run(["export", cell("molf-e").name, out]) == 2
    assert "`dvc pull models/tiny`" in capsys.readouterr().err
    assert not Path(out).exists()


def test_an_adapter_over_rounded_weights_is_exported_merged_or_not_at_all(project: Path, tmp_path: Path) -> None:
    made = Made.read(cell("lora"), load_params())
    made.run["config"]["method"]["base_bits"] = 4
    with pytest.raises(UserError, match="trained over weights rounded to 4 bits, .*; export it with --merge"):
        export.write(made, tmp_path / "out", merge=False, force=False)
    assert not (tmp_path / "out").exists()
    assert export.write(made, tmp_path / "out", merge=True, force=False)


def test_weights_that_wait_elsewhere_are_exported(project: Path, tmp_path: Path) -> None:
    weights, elsewhere = cell("fft").weights, Path(".molf/weights/fft")
    shutil.copytree(weights, elsewhere)
    shutil.rmtree(weights)
    write_json(weights / "not_kept.json", {"path": str(elsewhere), "hash": folder_hash(elsewhere)})
    write("fft", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_failure_leaves_what_was_there(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write("fft", out)
    before = contents(out)

    def broken(*_: Any) -> Any:
        raise OSError("No space left on device")

    for name in ("_load", "_write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(export, name, broken)
            with pytest.raises(OSError, match="No space left"):
                write("lora", out, force=True)
        assert contents(out) == before and not leftovers(out)
    with monkeypatch.context() as patch:
        rename = os.rename

        def once(source: Any, target: Any) -> None:
            if str(source).endswith(".tmp"):
                raise OSError("Input/output error")
            rename(source, target)

        patch.setattr(os, "rename", once)
        with pytest.raises(OSError, match="Input/output"):
            write("lora", out, force=True)
    assert contents(out) == before and not leftovers(out)


def test_another_model_is_refused() -> None:
    logits = torch.tensor([[1.0, -8.0], [0.5, 2.0]])
    assert export._compare(logits, logits + 1e-4, "auto") == pytest.approx(1e-4, rel=0.01)
    assert export._compare(logits, logits + 0.5, "bfloat16") == pytest.approx(0.5)
    with pytest.raises(RunError, match="the logits differ by 0.5"):
        export._compare(logits, logits + 0.5, "float32")
    with pytest.raises(RunError, match="differ by nan"):
        export._compare(logits, logits * float("nan"), "float32")


def test_a_chat_models_tokenizer_has_its_template(project: Path, tmp_path: Path) -> None:
    made = Made.read(cell("fft"), load_params())
    export._save_tokenizer(made, Path("models/tiny"), tmp_path / "plain")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template is None
    export._save_tokenizer(replace(made, options={"messages": "messages"}), Path("models/tiny"), tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    turns = [{"role": "user", "content": "w1"}]
    asked = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    assert asked.startswith("<s>User: w1")


def test_the_command_says_what_it_did(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", cell("molf-e").name, str(tmp_path / "a b/out"), "--merge"]) == 0
    said = capsys.readouterr().out
    assert f"{cell('molf-e').name} -> {tmp_path}/a b/out: whole model, its adapter merged, tokenizer and card" in said
    assert json.loads((tmp_path / "a b/out" / export.MANIFEST).read_text())["merged"] is True
