"""Every kind of method: it learns, freezes what it says, goes on where it stopped, exports, and shows in the report.

A kind is checked once its block stands in `KINDS`; one that does not fails the first test (docs/add-a-method.md).
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from molf import export
from molf.batches import read_examples
from molf.checkpoint import Checkpoints
from molf.config import load_params, read_yaml
from molf.evaluation import LanguageModel
from molf.methods import ADAPTERS, METHODS
from molf.models import folder_hash, load_model, load_tokenizer
from molf.paths import Cell, read_json
from molf.resume import Keeper
from molf.training import Outcome, train
from tests.cells import ADAPTIVE, StopAfter, Stopped
from tests.conftest import ROOT
from tests.trained import make

FUNCTIONS = ("prepare", "optimizer", "before_clip", "routed", "save", "load")
BASE = Path("models/tiny")
EPOCHS, STEPS = 8, 40  # 20 examples in batches of 4
MODULES = 2 * 7  # of the base model
PER_RANK = 2 * (4 * (32 + 32) + 3 * (32 + 48))  # parameters of LoRA of rank 1 on all of them


@dataclass(frozen=True)
class Kind:
    """A block, and what follows from it by hand."""

    block: dict[str, Any]  # over the block of the same kind in params.yaml, if there is one
    trained: Callable[[int], int]  # parameters, from those of the base model
    figures: tuple[str, ...] = ()  # of the report: those that name it, besides score and loss
    slack: int = 0  # parameters by which it may train fewer


KINDS = {
    "fft": Kind({}, lambda whole: whole),
    "lora": Kind({"r": 8, "learning_rate": 5e-3}, lambda _: 8 * PER_RANK),
    "molf": Kind({"r": [3]}, lambda whole: whole + 3 * PER_RANK, ("routing", "share", "ratio")),
    "molf-e": Kind({"r": [2, 6], "learning_rate": 5e-3}, lambda _: 8 * PER_RANK, ("routing", "share", "ratio")),
    "adalora": Kind(ADAPTIVE["adalora"], lambda _: 6 * (PER_RANK + MODULES), ("ranks",)),  # as many lambda as ranks
    "eva": Kind(ADAPTIVE["eva"], lambda _: 4 * MODULES * (32 + 48), ("ranks",), slack=4 * MODULES * (48 - 32)),
    "selected": Kind(ADAPTIVE["selected"], lambda _: 4 * PER_RANK, ("ranks",), slack=32 + 48),
}


def blocks() -> dict[str, dict[str, Any]]:
    """A method of each kind, by the kind's name."""
    ready = read_yaml(ROOT / "params.yaml")["methods"]
    return {name: {**ready.get(name, {}), "kind": name, **kind.block} for name, kind in KINDS.items()}


def cell(kind: str) -> Cell:
    return Cell("tiny", "fact", kind, 0)


@pytest.fixture(scope="module")
def project(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind trained, evaluated and compared by the stages."""
    return make(tmp_path_factory.mktemp("registry") / "project", base, blocks=blocks(), epochs=EPOCHS)


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


@dataclass
class Watched:
    """What a method was seen to do from outside."""

    frozen: dict[str, Tensor] = field(default_factory=dict)  # as they were before the first step
    trained: set[str] = field(default_factory=set)
    of_optimizer: int = 0
    after: dict[str, Tensor] = field(default_factory=dict)  # the frozen ones after the last step
    logits: np.ndarray[Any, Any] = field(
        default_factory=lambda: np.empty(0)
    )  # of the trained model, before it is saved


@pytest.fixture(scope="module")
def watched(project: Path) -> dict[str, tuple[Watched, Path]]:
    """Each kind trained once more, stopped on the way and gone on with."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        for kind in KINDS:
            watch, folder = Watched(), Path("again") / kind
            with patch.context() as own:  # one kind may call another's functions
                _watch(watch, kind, own)
                with pytest.raises(Stopped):
                    again(kind, folder, StopAfter(23))
                assert again(kind, folder).summary["resumed_at_steps"] == [21]
            found[kind] = watch, project / folder / "weights"
    return found


def again(kind: str, folder: Path, listener: Any = None) -> Outcome:
    """The training that the stage made."""
    params = load_params()
    keeper = Keeper(Checkpoints(folder / "checkpoints", {"cell": kind}, keep=1), 7, None)
    examples = read_examples(Path("data/prepared/fact/train.parquet"))
    block, budget = params.methods[kind], params.training_for("fact")
    return train(BASE, examples, block, budget, 0, folder / "weights", folder / "scratch", listener, keeper)


def _watch(watch: Watched, kind: str, patch: pytest.MonkeyPatch) -> None:
    method = METHODS[kind]
    prepare, optimizer, save = method.prepare, method.optimizer, method.save

    def prepared(*arguments: Any) -> nn.Module:
        model: nn.Module = prepare(*arguments)
        watch.frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        watch.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        return model

    def made(*arguments: Any) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = optimizer(*arguments)
        own = {id(p): p.numel() for group in found.param_groups for p in group["params"] if p.requires_grad}
        watch.of_optimizer = sum(own.values())
        return found

    def saved(model: nn.Module, *rest: Any) -> None:
        watch.after = {name: p.detach().clone() for name, p in model.named_parameters() if name in watch.frozen}
        watch.logits = logits(model)
        save(model, *rest)

    for name, function in (("prepare", prepared), ("optimizer", made), ("save", saved)):
        patch.setattr(method, name, function)


def logits(model: nn.Module) -> np.ndarray[Any, Any]:
    ids = load_tokenizer(BASE)("w1 w2 w3 w4 w5", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return np.asarray(model.eval()(input_ids=ids).logits[0])


# --- what every kind must show ---------------------------------------------------------------------------------------


def test_every_kind_is_checked_here() -> None:
    assert set(KINDS) == set(METHODS), "a kind needs a block in KINDS, so that the tests below check it"


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_functions_of_all_in_their_order(kind: str) -> None:
    own = dict(inspect.getmembers(METHODS[kind], inspect.isfunction))
    lines = [inspect.getsourcelines(own[name])[1] for name in FUNCTIONS]
    assert lines == sorted(lines) and all(own[name].__module__ == METHODS[kind].__name__ for name in FUNCTIONS)
    arguments = [list(inspect.signature(own[name]).parameters) for name in FUNCTIONS]
    assert arguments == [list(inspect.signature(getattr(METHODS["fft"], name)).parameters) for name in FUNCTIONS]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind: str, here: Path) -> None:
    history = pd.read_parquet(cell(kind).results / "train/history.parquet")
    assert history["step"].tolist() == list(range(1, STEPS + 1))
    assert history["loss"].tail(4).mean() < history["loss"].head(4).mean() - 0.15
    rows = pd.read_parquet("data/prepared/fact/train.parquet")
    asked = [(prompt, [text], 0) for prompt, text in zip(rows["prompt"], rows["completion"], strict=True)]
    tokenizer = load_tokenizer(BASE)
    trained = METHODS[kind].load(BASE, cell(kind).weights, torch.float32)
    before, after = (
        sum(float(answer.logprobs[0].sum()) for answer in LanguageModel(model, tokenizer, batch_size=32).answer(asked))
        for model in (load_model(BASE, torch.float32), trained)
    )
    assert after > before + 1  # a frozen head bounds what can be gained


def test_all_begin_at_the_base_model_and_see_the_same_batches(here: Path) -> None:
    histories = [pd.read_parquet(cell(kind).results / "train/history.parquet") for kind in KINDS]
    assert len({tuple(history["tokens"]) for history in histories}) == 1
    assert len({round(float(history["loss"].iloc[0]), 5) for history in histories}) == 1
    assert len({read_json(cell(kind).results / "train/summary.json")["order_hash"] for kind in KINDS}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_it_freezes_what_it_says(kind: str, watched: dict[str, tuple[Watched, Path]], here: Path) -> None:
    watch, _ = watched[kind]
    if kind not in ADAPTERS:
        assert not watch.frozen and watch.trained
        return
    assert all("lora_" in name for name in watch.trained)
    base = dict(load_model(BASE, torch.float32).named_parameters())
    names = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): name for name in watch.frozen}
    for name, weight in base.items():
        own = names[name]
        assert torch.equal(watch.frozen[own], weight) and torch.equal(watch.after[own], weight), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_reports_what_it_trains(kind: str, watched: dict[str, tuple[Watched, Path]], here: Path) -> None:
    summary = read_json(cell(kind).results / "train/summary.json")
    most = KINDS[kind].trained(sum(p.numel() for p in load_model(BASE, torch.float32).parameters()))
    assert most - KINDS[kind].slack <= summary["trained_parameters"] <= most
    assert watched[kind][0].of_optimizer == summary["trained_parameters"]
    frozen = sum(p.numel() for p in watched[kind][0].frozen.values())
    assert summary["total_parameters"] == frozen + summary["trained_parameters"]
    assert summary["method_kind"] == kind and (summary["routing"] is not None) == METHODS[kind].routed(None)


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_to_the_same_bits(kind: str, watched: dict[str, tuple[Watched, Path]], here: Path) -> None:
    _, weights = watched[kind]
    assert folder_hash(weights) == folder_hash(cell(kind).weights)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_saves_is_what_it_trained(kind: str, watched: dict[str, tuple[Watched, Path]], here: Path) -> None:
    watch, weights = watched[kind]
    loaded = METHODS[kind].load(BASE, weights, torch.float32)
    np.testing.assert_allclose(logits(loaded), watch.logits, atol=1e-4)
    assert np.abs(watch.logits - logits(load_model(BASE, torch.float32))).max() > 1e-2
    assert {path.suffix for path in weights.iterdir()} <= {".safetensors", ".json", ".md", ".jinja"}


@pytest.mark.parametrize("kind", KINDS)
def test_it_exports(kind: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molf.models.quiet", lambda: None)  # which is for good
    said = export.export(cell(kind), tmp_path / "out", load_params(), merge=False, force=False)
    assert ("adapter" in said[0]) == (kind in ADAPTERS) and "logits differ by at most" in said[1]


@pytest.mark.parametrize("kind", KINDS)
def test_its_figures_are_in_the_report(kind: str, here: Path) -> None:
    comparison = json.loads(Path("reports/comparison.json").read_text())
    [group] = comparison["groups"]
    assert [m["kind"] for m in group["methods"] if m["method"] == kind] == [kind]
    assert kind in Path("reports/report.html").read_text()
    for figure in ("score", "loss", *KINDS[kind].figures):
        drawn = Path(f"reports/figures/tiny-fact-{figure}.svg").read_text()
        assert f">{kind}" in drawn or f" {kind}<" in drawn or f"{kind}:" in drawn, figure
