"""dvc.yaml declares what the stages really import, and the closure that says so sees every import."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from molf.closure import BESIDE, PACKAGE, VIEWS, closure, code_hash, files, module_path, of_method
from molf.config import read_yaml
from molf.method_blocks import KINDS

ROOT = Path(__file__).parents[1]
STAGES: dict[str, Any] = read_yaml(ROOT / "dvc.yaml")["stages"]
# What comes as a block's `path`, because a block that does not use the file need not depend on it.
GENERATOR = {"src/molf/generate.py"}
# What a stage reads without importing it.
HASHED = {"code": [of_method(kind) for kind in KINDS]}
BY_PATH = {"fetch": GENERATOR, "general": GENERATOR, "base": {"src/molf/tiny.py"}}


def declared(stage: str) -> set[str]:
    """Source files that a stage names in dvc.yaml, folders written out."""
    block = STAGES[stage].get("do", STAGES[stage])
    files = set(BY_PATH.get(stage, set()))
    for dep in block["deps"]:
        path = ROOT / dep
        if dep.startswith("src/"):
            found = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".py", *BESIDE)]
            assert found, f"{stage}: {dep} is not there"
            files |= {str(p.relative_to(ROOT)) for p in found}
    return files


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_code_that_it_imports_and_no_other(stage: str) -> None:
    command = STAGES[stage].get("do", STAGES[stage])["cmd"].split()
    modules = set().union(*(closure(module) for module in (command[2], *HASHED.get(stage, ()))))
    assert declared(stage) == {str(path.relative_to(ROOT)) for name in modules for path in files(name)}


def test_no_stage_depends_on_all_params() -> None:
    for name, stage in STAGES.items():
        assert stage.get("do", stage).get("params"), f"{name} names no params, so nothing would re-run it"


def test_another_general_text_evaluates_anew_and_trains_nothing() -> None:
    deps = {name: stage.get("do", stage)["deps"] for name, stage in STAGES.items()}
    assert [name for name, named in deps.items() if "data/general" in named] == ["baseline", "evaluate"]


def test_another_methods_code_trains_no_cell_anew(tmp_path: Path) -> None:
    package = tmp_path / "molf"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))

    def hashes() -> dict[str, str]:
        found = {kind: code_hash(of_method(kind), package=package) for kind in KINDS}
        return found | {"all": code_hash("molf.stages.train", "molf.stages.sweep", package=package)}

    before = hashes()
    (package / "methods/another.py").write_text("from molf import nn\n")
    assert hashes() == before
    with (package / "methods/fft.py").open("a") as file:
        file.write("# changed\n")
    assert {name for name, value in hashes().items() if value != before[name]} == {"fft"}
    with (package / "methods/sample.py").open("a") as file:  # which all import
        file.write("# changed\n")
    assert {name for name, value in hashes().items() if value != before[name]} == {*KINDS, "all"}
    assert {"lora", "fft"} <= set(KINDS) and code_hash(of_method("lora")) != code_hash(of_method("fft"))


def test_views_are_modules_that_exist() -> None:
    assert all(module_path(name).is_file() for name in VIEWS)


def test_no_module_imports_relatively() -> None:
    """The closure reads absolute imports only."""
    for path in PACKAGE.rglob("*.py"):
        assert "from ." not in path.read_text(), path


@pytest.fixture
def package(tmp_path: Path) -> Path:
    files = {
        "__init__.py": "",
        "a.py": "import pkg.b\ndef f():\n    from pkg.sub import c\n",
        "b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg import d\n",
        "d.py": "",
        "sub/__init__.py": "from pkg import e\n",
        "sub/c.py": "import json\n",
        "e.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "pkg"


def test_the_closure_follows_late_imports_and_packages_but_not_those_for_the_type_checker(package: Path) -> None:
    assert closure("pkg.a", package) == {"pkg", "pkg.a", "pkg.b", "pkg.e", "pkg.sub", "pkg.sub.c"}


def test_the_code_hash_changes_with_a_file_of_the_closure_only(package: Path) -> None:
    before = code_hash("pkg.a", package=package)
    (package / "d.py").write_text("x = 1\n")
    assert code_hash("pkg.a", package=package) == before
    (package / "sub" / "c.py").write_text("import csv\n")
    changed = code_hash("pkg.a", package=package)
    assert changed != before
    for leftover in ("b.py~", "b.py.orig", "b.swp", "b.cpp.bak"):
        (package / leftover).write_text("an editor's\n")
    assert code_hash("pkg.a", package=package) == changed
    (package / "b.cpp").write_text("// what b compiles\n")
    assert code_hash("pkg.a", package=package) != changed
