"""What every method is told of its training, and when; by one that keeps what it hears."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from molf.batches import Collator, SeededBatches, SeededOrder, encode_examples
from molf.checkpoint import Checkpoints
from molf.config import Params, check_params, read_yaml
from molf.errors import Interrupted, RunError, UserError
from molf.methods import METHODS, fft
from molf.methods.sample import Sample, completion_loss
from molf.models import folder_hash, load_model, load_tokenizer
from molf.resume import Keeper
from molf.training import Outcome, train
from tests.conftest import ROOT, frame
from tests.test_resume import Stopper


class Memory:
    """Of a method: a number and a tensor that a checkpoint must hold."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.sums = torch.zeros(2, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.sums = list(state["steps"]), state["sums"].double()


class Told(ModuleType):
    """Full fine-tuning that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__("told")
        self.calls: list[tuple[Any, ...]] = []
        self.sample: Sample | None = None
        self.memory = Memory()
        self.weight = 0.0  # of a penalty on the sum of one weight
        self.optimizer, self.routed, self.load = fft.optimizer, fft.routed, fft.load

    def prepare(self, model: Any, block: Any, sample: Sample | None) -> Any:
        self.calls.append(("prepare",))
        self.sample, self.memory = sample, Memory()
        return fft.prepare(model, block, sample)

    def before_clip(self, model: Any) -> None:
        self.calls.append(("before_clip",))

    def penalty(self, model: Any) -> Tensor | None:
        self.calls.append(("penalty",))
        return self.weight * model.get_decoder().norm.weight.sum() if self.weight else None

    def after_step(self, model: Any, step: int, steps: int) -> None:
        gradient = model.get_decoder().norm.weight.grad
        self.calls.append(("after_step", step, steps, gradient is not None and bool(gradient.any())))
        self.memory.steps.append(step)
        self.memory.sums += torch.stack([gradient.double().sum(), gradient.double().abs().sum()])

    def stateful(self, model: Any) -> dict[str, Any]:
        return {"memory": self.memory}

    def proof(self, model: Any, optimizer: Any, block: Any) -> dict[str, Any]:
        self.calls.append(("proof",))
        return {"steps": self.memory.steps, "sums": self.memory.sums.tolist()}

    def save(self, model: Any, directory: Path, base: Path) -> None:
        self.calls.append(("save",))
        fft.save(model, directory, base)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    method = Told()
    monkeypatch.setitem(METHODS, "fft", method)
    return method


def chosen(**budget: Any) -> Params:
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= {"max_length": 32, "batch_size": 4, "epochs": 2, "threads": 1, "max_grad_norm": 1e9} | budget
    return check_params(data, "test")


def cell(base: Path, folder: Path, stop: int = 0, **budget: Any) -> Outcome:
    """18 rows: 5 micro-batches an epoch, the last of 2 rows."""
    params = chosen(**budget)
    keeper = Keeper(Checkpoints(folder / "checkpoints", {"cell": folder.name}, keep=1), 2, None)
    folder.mkdir(exist_ok=True)
    block = params.methods["fft"]
    listener = Stopper(stop) if stop else None
    places = (folder / "weights", folder / "scratch")
    return train(base, frame(18), block, params.training, 3, *places, listener, keeper)


def test_a_method_is_told_of_each_step_in_order(told: Told, base: Path, tmp_path: Path) -> None:
    summary = cell(base, tmp_path / "cell", gradient_accumulation=2).summary
    steps = [
        [*[("penalty",)] * micro_batches, ("before_clip",), ("after_step", step, 6, True)]
        for step, micro_batches in enumerate((2, 2, 1, 2, 2, 1), start=1)
    ]
    # Each micro-batch is told once; `before_clip` comes after the last of a step.
    assert told.calls == [("prepare",), *(call for step in steps for call in step), ("proof",), ("save",)]
    assert summary["adaptation"] == {"steps": [1, 2, 3, 4, 5, 6], "sums": told.memory.sums.tolist()}


def test_a_resumed_method_goes_on_where_it_was(told: Told, base: Path, tmp_path: Path) -> None:
    whole = cell(base, tmp_path / "once").summary["adaptation"]
    told.calls.clear()
    with pytest.raises(Interrupted):
        cell(base, tmp_path / "often", stop=5)
    stopped = max(call[1] for call in told.calls if call[0] == "after_step")
    told.calls.clear()
    resumed = cell(base, tmp_path / "often").summary
    assert [call[1] for call in told.calls if call[0] == "after_step"] == list(range(stopped + 1, 11))
    assert resumed["adaptation"] == whole and whole["steps"] == list(range(1, 11))
    assert folder_hash(tmp_path / "once/weights") == folder_hash(tmp_path / "often/weights")


def test_a_method_that_says_nothing_more_proves_nothing(base: Path, tmp_path: Path) -> None:
    assert cell(base, tmp_path / "cell").summary["adaptation"] is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_penalty_moves_gradients_once_a_step_and_no_loss(
    told: Told, base: Path, tmp_path: Path, accumulation: int
) -> None:
    """Of a linear penalty the gradient is known, and the first step's rate is 0, so that the second starts alike."""
    rows = {"batch_size": 8 // accumulation, "gradient_accumulation": accumulation}
    told.weight = 0.0
    plain = cell(base, tmp_path / "plain", max_steps=1, warmup=0.0, **rows)
    sums = told.memory.sums[0].item()
    told.weight = 0.5
    pulled = cell(base, tmp_path / "pulled", max_steps=1, warmup=0.0, **rows)
    width = load_model(base, torch.float32).get_decoder().norm.weight.numel()  # type: ignore[operator]
    assert told.memory.sums[0].item() - sums == pytest.approx(0.5 * width, rel=1e-4)
    assert pulled.history["loss"].tolist() == plain.history["loss"].tolist()


def test_what_a_method_took_and_warns_of_is_the_cells(
    told: Told, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(told, "proof", lambda *_: {"seconds": 1000.0, "warnings": ["ranks are alike"]})
    outcome = cell(base, tmp_path / "cell")
    assert outcome.summary["adaptation"] == {"seconds": 1000.0} and outcome.summary["warnings"] == ["ranks are alike"]
    steps = outcome.history["seconds"].iloc[-1]
    assert outcome.summary["train_seconds"] == pytest.approx(1000 + steps, abs=1)
    assert outcome.summary["tokens_per_second"] == pytest.approx(outcome.history["tokens"].sum() / steps, rel=0.5)


def test_a_penalty_that_is_no_number_stops_the_run(told: Told, base: Path, tmp_path: Path) -> None:
    told.weight = float("nan")
    with pytest.raises(RunError, match="step 1: loss nan"):
        cell(base, tmp_path / "cell")


def test_a_failed_proof_leaves_no_weights(told: Told, base: Path, tmp_path: Path) -> None:
    def disproved(model: Any, optimizer: Any, block: Any) -> dict[str, Any]:
        raise RunError("nothing moved")

    told.proof = disproved  # type: ignore[method-assign]
    with pytest.raises(RunError, match="nothing moved"):
        cell(base, tmp_path / "cell")
    assert not (tmp_path / "cell/weights").exists() and ("save",) not in told.calls


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Tensor]]]:
    """The micro-batches of which a training takes the loss."""
    seen: list[dict[str, Tensor]] = []

    def loss(model: Any, inputs: dict[str, Tensor], items: Any = None) -> Tensor:
        seen.append({name: value.clone() for name, value in inputs.items()})
        return completion_loss(model, inputs, items)

    monkeypatch.setattr("molf.training.completion_loss", loss)
    yield seen


def test_a_sample_is_what_training_will_see(
    told: Told, base: Path, tmp_path: Path, heard: list[dict[str, Tensor]]
) -> None:
    cell(base, tmp_path / "cell", gradient_accumulation=2)
    assert told.sample is not None and (told.sample.accumulation, told.sample.steps) == (2, 6)
    for _ in range(2):  # asking changes nothing
        sample = told.sample.batches(10)
        assert len(heard) == len(sample) == 10
        for mine, its in zip(sample, heard, strict=True):
            assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    assert told.sample.batches(3)[2]["input_ids"].equal(heard[2]["input_ids"])


def test_a_sample_is_the_same_for_several_processes(base: Path) -> None:
    """Of one step, the rows are those of one process, in the same order, however they are shared out."""
    tokenizer, model = load_tokenizer(base), load_model(base, torch.float32)
    examples = encode_examples(tokenizer, frame(18), 32)

    def rows_of(processes: int, **changes: Any) -> list[Tensor]:
        training = chosen(processes=processes, **changes).training
        rows, micro_batches = training.micro_batches()
        sample = Sample(
            SeededBatches(SeededOrder(18, 3), rows),
            examples.rows,
            Collator(tokenizer.pad_token_id),
            model,
            micro_batches * processes,
        )
        batches = sample.batches(sample.accumulation)
        return [
            ids[mask.bool()] for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        ]

    one = rows_of(1, gradient_accumulation=2)
    for way in (rows_of(2, gradient_accumulation=2), rows_of(2, batch_size=8)):
        assert len(one) == len(way) == 8 and all(a.equal(b) for a, b in zip(one, way, strict=True))


@pytest.mark.parametrize(
    ("way", "unfit", "said"),
    [
        ("fsdp", {"fsdp": "its ranks are whole"}, "under fsdp: its ranks are whole; set training.sharding to ddp, or"),
        ("ddp", {"ddp": "each draws its own"}, "under ddp: each draws its own; set training.processes to 1"),
        ("auto", {"ddp": "each draws its own"}, "under ddp: each draws its own; set training.processes to 1"),
        ("auto", {"fsdp": "its ranks are whole"}, None),
        ("ddp", {"fsdp": "its ranks are whole"}, None),
    ],
)
def test_a_way_that_a_method_cannot_be_shared_in_is_refused_before_anything_runs(
    way: str, unfit: dict[str, str], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from molf.method_blocks import LoraMethod

    monkeypatch.setattr(LoraMethod, "unfit", lambda self: unfit)
    budget = {"processes": 2, "batch_size": 8, "sharding": way}
    if said is None:
        assert chosen(**budget).training.processes == 2
        return
    with pytest.raises(UserError) as caught:
        chosen(**budget)
    assert len(caught.value.problems) == 3  # a task each
    assert "methods.lora: 2 processes cannot train sql with it " + said in caught.value.problems[0]


def test_auto_takes_ddp_where_a_method_cannot_be_sharded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molf import sharding
    from molf.method_blocks import LoraMethod

    params = chosen(processes=2, batch_size=8)
    monkeypatch.setattr(sharding, "memory_of", lambda processes: 1)
    block, memory = params.methods["lora"], pytest.fail
    monkeypatch.setattr(LoraMethod, "unfit", lambda self: {"fsdp": "its ranks are whole"})
    assert sharding.of(memory, block, params.training) == "ddp"  # type: ignore[arg-type]
