"""Cards: the hub's fields parse back, text from data stays text, and the code in them runs."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard, ModelCard

from molf.cards import LICENSES, Made, Place, data_card, license_fields, made_up_prompt, model_card
from molf.config import load_params
from molf.errors import UserError
from molf.paths import Cell, read_json, write_json
from molf.report.markdown import clean, literal
from molf.tasks import TASKS
from tests.conftest import ROOT
from tests.report.fake import describe_data

CELL = Cell("tiny", "fact", "molf-e", 0)
HOSTILE = [
    "<script>alert(1)</script>",
    "a\n---\nlicense: mit\n---\n# Title",
    "| a | b |\n|---|---|\n",
    "`code` ``` [a](https://evil.example) ![x](https://evil.example/y.png) https://evil.example www.evil.example",
    "**bold** _soft_ ~~gone~~ @someone $x^2$ &lt; {{ value }} [^1] #1",
    "key: [a, {b: 'c\"\\",
    "\x00\x1b[31m\u202eright to left\u2028",
    "- item\n1. one\n> quote\n\n    code",
    "\ud800 half a pair",
]


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def summary(**changes: Any) -> dict[str, Any]:
    told = describe_data("sql")
    del told["license"]
    return {**told, "data_hash": told.pop("hash"), **changes}


def tokens(card: str) -> list[Any]:
    """What a Markdown reader makes of a card's body, flat."""
    parser = (
        pytest.importorskip("markdown_it")
        .MarkdownIt("commonmark", {"linkify": False})
        .enable(["table", "strikethrough"])
    )
    found = parser.parse(ModelCard(card, ignore_metadata_errors=True).text)
    return [inner for token in found for inner in [token, *(token.children or [])]]


def shape(card: str) -> list[str]:
    """The kinds of a card's parts, without its text: two cards of unlike words have the same."""
    return [token.type for token in tokens(card) if token.type not in ("text", "text_special", "entity")]


def test_a_data_cards_fields_parse_back() -> None:
    card = data_card(summary(), "cc-by-4.0")
    fields: Any = DatasetCard(card).data
    assert fields.license == "cc-by-4.0"
    assert fields.pretty_name == "sql"
    assert fields.size_categories == "n<1K"
    assert "synthetic" in fields["tags"]
    assert fields["dataset_info"]["splits"][0] == {"name": "train", "num_examples": 48}
    assert fields["configs"][0]["data_files"][2] == {"split": "test", "path": "test.parquet"}
    for words in (
        "> **GENERATED DATA.**",
        "- Source: the built-in generator, seed 3",
        "- Rejected rows: 3;",
        "- Rows with a copy in another split: 2, of which 2 were kept there",
        "- Warning: test: 55% of the answers are 'A'",
        "| train | 60 | 48 | 3 | 4 | 1 |",
        "| test | prompt | 50 | 80 | 1,234 |",
        "hash-of-sql",
    ):
        assert words in card, words


def test_a_hub_sets_card_names_it_and_says_when_the_licence_is_not_known() -> None:
    source: dict[str, Any] = {"kind": "hub", "id": "a/b", "config": None, "revision": "f" * 40, "files": {}}
    card = data_card(summary(generated=False, source=source), "unknown")
    fields: Any = DatasetCard(card).data
    assert fields.source_datasets == ["a/b"]
    assert "GENERATED" not in card
    assert "The licence is not known" in card


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_of_the_data_stays_text_in_its_card(hostile: str) -> None:
    def spoilt(text: str) -> str:
        reason = {"split": "train", "column": text, "check": text, "rows": 1}
        return data_card(
            summary(
                source={
                    "kind": "file",
                    "files": {"train": [{"from": text, "rows": 3, "bytes": 4, "sha256": "0" * 64}]},
                },
                reasons=[{**reason, "first": {"file": 0, "source_row": 1, "value": text}}],
                answers={"test": {"most_common": text, "share": 0.5, "distinct": 2}},
                warnings=[text],
            ),
            text,
        )

    card = spoilt(hostile)
    fields: Any = DatasetCard(card).data
    assert fields.license == "other" and re.fullmatch(r"[a-z0-9.+_-]+", fields.license_name)
    assert fields.pretty_name == "sql"
    assert shape(card) == shape(spoilt("plain words"))
    assert "\x1b" not in card and "\u202e" not in card and "<script" not in card
    assert not re.search(r"https?://evil|www\.evil|@someone", card.split("---\n", 2)[2])
    card.encode("utf-8")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_literal_is_read_back_as_the_text(hostile: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    (inline,) = parser.parseInline(f"x {literal(hostile)}")
    assert {token.type for token in inline.children} <= {"text", "text_special"}
    assert "".join(token.content for token in inline.children) == f"x {clean(hostile)}"


def test_licences_in_the_hubs_spelling() -> None:
    assert license_fields("Apache-2.0") == {"license": "apache-2.0"}
    assert license_fields("") == {"license": "unknown"}
    assert license_fields("qwen-research", "Qwen/Qwen2.5-3B") == {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
    }
    assert license_fields("own-terms", "a/b")["license_link"] == "https://huggingface.co/a/b"
    for preset in ("tiny", "gemma", "paper"):
        for given in re.findall(r"license: ([\w.-]+)", (ROOT / f"src/molf/presets/{preset}.yaml").read_text()):
            assert given in LICENSES or given == "qwen-research", given


def test_the_stages_write_the_cards(project: Path) -> None:
    text = Path("data/cards/fact/README.md").read_text()
    assert text == data_card(read_json(Path("data/prepared/fact/summary.json")), "apache-2.0")
    for method in ("fft", "lora", "molf", "molf-e"):
        cell = replace(CELL, method=method)
        made = Made.read(cell, load_params())
        assert (cell.results / "evaluation/README.md").read_text() == model_card(made, made.here())
    assert not Path("results/tiny/fact/base/seed-0/evaluation/README.md").exists()


def test_a_model_cards_fields_parse_back(project: Path) -> None:
    made = Made.read(CELL, load_params())
    card = (CELL.results / "evaluation/README.md").read_text()
    fields: Any = ModelCard(card).data
    assert (fields.license, fields.library_name, fields.pipeline_tag) == ("unknown", "peft", "text-generation")
    assert {"molf", "molf-e", "fact"} <= set(fields.tags or [])
    assert fields.model_name == "tiny-fact-molf-e-seed-0"
    results = fields.eval_results or []
    first = results[0]
    assert (first.metric_type, first.metric_value) == ("score", made.metrics["primary"])
    assert (first.dataset_name, first.dataset_split) == ("fact", "test")
    assert first.metric_args == {"examples": 20, "left_out": {}}
    assert {result.metric_type for result in results} == set(made.metrics["metrics"]) | {"score"}
    for words in (
        f"`{made.summary['lineage']['weights']['hash']}`",
        f"`{made.metrics['lineage']['predictions']['sha256']}`",
        f"`{made.run['data']['hash']}`",
        "`molf lineage tiny/fact/molf-e/seed-0`",
        "| r | \\[2, 5\\] |",
        "| training.batch\\_size | 4 |",
        "On 20 test examples; left out: none.",
        f"- On 20 texts that are no task's: {made.metrics['general']['loss']:.4f} nats per token",
        f"of 140 directions looked at, {made.metrics['weights']['intruders']} are new (intruder dimensions).",
    ):
        assert words in card, words
    bare = model_card(replace(made, metrics={**made.metrics, "general": None, "weights": None}), made.here())
    assert "nats per token" not in bare and "intruder" not in bare


def test_a_model_of_the_hub_and_of_generated_data_says_so(project: Path) -> None:
    made = Made.read(CELL, load_params())
    source: dict[str, Any] = {"kind": "hub", "id": "a/data", "config": None, "revision": "d" * 40, "files": {}}
    run = {
        **made.run,
        "model": {**made.run["model"], "kind": "hub", "id": "google/gemma-3-1b-pt", "revision": "e" * 40},
        "data": {**made.run["data"], "generated": True, "source": source},
    }
    place = Place(".", ".", True, "google/gemma-3-1b-pt", "e" * 40)
    card = model_card(replace(made, run=run, license="gemma"), place)
    fields: Any = ModelCard(card).data
    assert (fields.base_model, fields["base_model_relation"]) == ("google/gemma-3-1b-pt", "adapter")
    assert (fields.license, fields.datasets) == ("gemma", ["a/data"])
    assert (fields.eval_results or [])[0].dataset_revision == "d" * 40
    assert "> **GENERATED DATA.**" in card
    assert f"AutoModelForCausalLM.from_pretrained('google/gemma-3-1b-pt', revision='{'e' * 40}'" in card


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_of_names_and_warnings_stays_text_in_a_models_card(project: Path, hostile: str) -> None:
    made = Made.read(CELL, load_params())

    def spoilt(text: str) -> str:
        run = {**made.run, "hardware": {**made.run["hardware"], "name": text}, "versions": {"torch": text}}
        run["model"] = {**run["model"], "id": text, "revision": "main"}
        run["data"] = {**run["data"], "source": {"kind": "hub", "id": text, "revision": text}}
        metrics = {**made.metrics, "left_out": {text: 2}}
        metrics["metrics"] = {**metrics["metrics"], text: 0.5}
        told = {**made.summary, "warnings": [text]}
        options = {"prompt": text}
        spoiled = replace(made, run=run, metrics=metrics, summary=told, options=options)
        return model_card(replace(spoiled, license=text, data_license=text), Place(text, text, True, text, text))

    card = spoilt(hostile)
    fields: Any = ModelCard(card).data
    assert fields.license == "other"
    assert shape(card) == shape(spoilt("plain words"))
    card.encode("utf-8")


@pytest.mark.parametrize("method", ["fft", "lora", "molf", "molf-e"])
def test_the_code_in_a_models_card_runs(project: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    card = (replace(CELL, method=method).results / "evaluation/README.md").read_text()
    (code,) = re.findall(r"```python\n(.+?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert capsys.readouterr().out.endswith("\n")
    assert len(names["answer"][0]) > len(names["ids"])


def test_the_code_in_a_data_card_runs(project: Path) -> None:
    (code,) = re.findall(r"```python\n(.+?)```", Path("data/cards/fact/README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["rows"]) == 20


def test_code_of_a_chat_model(project: Path) -> None:
    made = replace(Made.read(CELL, load_params()), options={"messages": "messages"})
    (code,) = re.findall(r"```python\n(.+?)```", model_card(made, made.here()), flags=re.DOTALL)
    assert "apply_chat_template" in code
    compile(code, "card", "exec")


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_a_prompt_that_shows_the_form_holds_nothing_of_the_data(kind: str) -> None:
    options = {"completion": {"prompt": "Say {x}"}, "choice": {"question": "{q}"}}.get(kind, {})
    prompt = made_up_prompt(kind, options)
    assert prompt and prompt == made_up_prompt(kind, options)


def test_weights_that_were_not_kept_are_named_so(project: Path) -> None:
    path = CELL.results / "train/summary.json"
    told = read_json(path)
    told["lineage"]["weights"]["kept"] = False
    write_json(path, told)
    made = Made.read(CELL, load_params())
    assert "These weights were not kept" in model_card(made, made.here())


def test_what_lacks_for_a_card_is_named(project: Path) -> None:
    (CELL.results / "evaluation/metrics.json").unlink()
    params = load_params().model_copy(update={"models": {}})
    with pytest.raises(UserError) as caught:
        Made.read(CELL, params)
    assert len(caught.value.problems) == 2
    assert "`dvc pull results/tiny/fact/molf-e/seed-0/evaluation/metrics.json`" in str(caught.value)
