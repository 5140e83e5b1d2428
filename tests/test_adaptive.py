"""AdaLoRA and EVA move ranks: to the budget, as their equations say, alike after a kill, and what is saved is what was
trained."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from molf import estimate
from molf.batches import Collator, SeededBatches, SeededOrder, encode_examples
from molf.checkpoint import Checkpoints
from molf.config import Params, check_params, read_yaml
from molf.errors import RunError, UserError
from molf.methods import adalora, eva
from molf.methods.sample import Sample
from molf.models import folder_hash, load_model, load_tokenizer
from molf.resume import Keeper
from molf.training import Outcome, train
from tests.cells import ADAPTIVE, StopAfter, Stopped
from tests.conftest import ROOT, frame

KINDS = ["adalora", "eva"]
STEPS = 20  # 18 rows in batches of 4, 4 epochs
MODULES = 14  # of the random base


def chosen(kind: str, budget: dict[str, Any] | None = None, **changes: Any) -> Params:
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= {"max_length": 32, "batch_size": 4, "epochs": 4, "threads": 1} | (budget or {})
    data["methods"][kind] = ADAPTIVE[kind] | changes
    data["grid"]["methods"] = [kind]
    return check_params(data, "test")


def cell(
    base: Path,
    folder: Path,
    kind: str,
    stop: int = 0,
    budget: dict[str, Any] | None = None,
    **changes: Any,
) -> Outcome | None:
    """18 rows, 20 steps; None where it was stopped after a step, with a checkpoint every two."""
    params = chosen(kind, budget, **changes)
    keeper = Keeper(Checkpoints(folder / "checkpoints", {"cell": kind}, keep=1), 2, None)
    folder.mkdir(exist_ok=True)
    places = (folder / "weights", folder / "scratch")
    try:
        listener = StopAfter(stop) if stop else None
        return train(base, frame(18), params.methods[kind], params.training, 3, *places, listener, keeper)
    except Stopped:
        return None


def adaptation(outcome: Outcome | None) -> dict[str, Any]:
    assert outcome is not None
    found: dict[str, Any] = outcome.summary["adaptation"]
    return found


def sample_of(base: Path, model: torch.nn.Module, rows: int = 4) -> Sample:
    tokenizer = load_tokenizer(base)
    examples = encode_examples(tokenizer, frame(18), 32)
    order = SeededBatches(SeededOrder(18, 3), rows)
    return Sample(order, examples.rows, Collator(tokenizer.pad_token_id), model, 1, STEPS)


def prepared(base: Path, kind: str, dtype: torch.dtype = torch.float32, uniform: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = load_model(base, dtype)
    block: Any = chosen(kind, **changes).methods[kind]
    return {"adalora": adalora, "eva": eva}[kind].prepare(model, block, None if uniform else sample_of(base, model))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(input_ids=torch.arange(4, 24)[None]).logits[0].float()
    return found


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The trained models, as they were when they were saved."""
    models: list[Any] = []
    for method in (adalora, eva):

        def save(model: Any, directory: Path, base: Path, inner: Callable[..., None] = method.save) -> None:
            models.append(copy.deepcopy(model))
            inner(model, directory, base)

        monkeypatch.setattr(method, "save", save)
    yield models


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_move_within_the_budget_and_what_is_saved_is_what_was_trained(
    kind: str, dtype: str, base: Path, tmp_path: Path, kept: list[Any]
) -> None:
    found = adaptation(cell(base, tmp_path, kind, budget={"dtype": dtype}))
    ranks = found["ranks"]
    assert len(ranks) == MODULES and sum(ranks.values()) == found["budget"] == 4 * MODULES
    assert len(set(ranks.values())) > 1
    assert json.loads(json.dumps(found)) == found
    [model] = kept
    weights = torch.float32 if dtype == "float32" else torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {weights}
    loaded = {"adalora": adalora, "eva": eva}[kind].load(base, tmp_path / "weights", weights)
    mine, trained, plain = logits(loaded), logits(model), logits(load_model(base, weights))
    rounding = 1e-5 if dtype == "float32" else 0.03  # merging rounds each weight once more
    assert (mine - trained).abs().max() < rounding < 5 * rounding < (trained - plain).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_an_ordinary_lora(kind: str, base: Path, tmp_path: Path, kept: list[Any]) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    ranks = adaptation(cell(base, tmp_path, kind))["ranks"]
    written = load_file(tmp_path / "weights/adapter_model.safetensors")
    shapes = {name: len(written[f"base_model.model.{name}.lora_A.weight"]) for name, rank in ranks.items() if rank}
    assert shapes == {name: rank for name, rank in ranks.items() if rank} and len(written) == 2 * len(shapes)
    config = json.loads((tmp_path / "weights/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(base)
    adapted = PeftModel.from_pretrained(load_model(base, torch.float32), tmp_path / "weights")
    assert torch.allclose(logits(adapted), logits(kept[0]), atol=1e-5)


def starved(model: Any, batches: list[dict[str, Tensor]], forward_fn: Any, **_: Any) -> None:
    """EVA's start in which one module leaves its rank to another of the same width."""
    from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights

    found = get_eva_state_dict(model, batches, forward_fn=forward_fn, show_progress_bar=False)
    poor, rich = (f"base_model.model.model.layers.0.self_attn.{name}_proj" for name in "kq")
    found[rich] = torch.cat([found[rich], torch.randn_like(found[poor])])
    found[poor] = found[poor][:0]
    initialize_lora_eva_weights(model, eva_state_dict=found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_rank_0_is_left_out(
    kind: str, base: Path, tmp_path: Path, kept: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    low: dict[str, Any] = {"target_r": 1, "init_r": 3} if kind == "adalora" else {}
    if kind == "eva":
        monkeypatch.setattr("peft.initialize_lora_eva_weights", starved)
    ranks = adaptation(cell(base, tmp_path, kind, **low))["ranks"]
    assert min(ranks.values()) == 0 and sum(ranks.values()) == MODULES * (1 if low else 4)
    config = json.loads((tmp_path / "weights/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(name for name, rank in ranks.items() if rank)
    loaded = {"adalora": adalora, "eva": eva}[kind].load(base, tmp_path / "weights", torch.float32)
    assert torch.allclose(logits(loaded), logits(kept[0]), atol=1e-5)


@pytest.mark.parametrize(("kind", "stop"), [("adalora", 3), ("adalora", 7), ("adalora", 15), ("eva", 7)])
def test_a_killed_training_ends_alike_to_the_bit(kind: str, stop: int, base: Path, tmp_path: Path) -> None:
    """AdaLoRA: killed before the first cut, between two, and after the last."""
    whole = cell(base, tmp_path / "once", kind)
    assert cell(base, tmp_path / "often", kind, stop) is None
    resumed = cell(base, tmp_path / "often", kind)
    assert whole is not None and resumed is not None and resumed.summary["resumed_at_steps"] == [stop - stop % 2]
    assert resumed.history["loss"].tolist() == whole.history["loss"].tolist()
    own, other = ({**adaptation(outcome), "seconds": 0} for outcome in (whole, resumed))
    assert own == other
    assert folder_hash(tmp_path / "once/weights") == folder_hash(tmp_path / "often/weights")


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_refused_before_anything_runs(kind: str) -> None:
    with pytest.raises(UserError, match=f"methods.{kind}: 2 processes cannot train sql with it under fsdp"):
        chosen(kind, {"processes": 2, "sharding": "fsdp"})
    assert chosen(kind, {"processes": 2, "sharding": "ddp"}).training.processes == 2


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_estimated(kind: str, base: Path) -> None:
    params = chosen(kind)
    memory = estimate.for_cell(base, params.methods[kind], params.training)
    model = prepared(base, kind, uniform=True)
    assert memory.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert memory.total > 0


def test_importance_is_part_of_the_memory(base: Path) -> None:
    params = chosen("adalora")
    memory = estimate.for_cell(base, params.methods["adalora"], params.training)
    assert memory.phases["optimizer step"]["importance"] == 8 * memory.trained
    assert memory.checkpoint == (4 + 8 + 8) * memory.trained


# --- AdaLoRA ---------------------------------------------------------------------------------------------------------


def test_ranks_are_cut_when_the_schedule_says(base: Path, tmp_path: Path) -> None:
    """Cut by cut to the budget, by the cubic schedule of the paper's equation."""
    found = adaptation(cell(base, tmp_path, "adalora"))
    first, last = 2, 14  # 0.1 and 0.7 of the steps
    cuts = [*range(first + 2, last, 2), last]
    path = found["trajectory"]
    assert path["step"] == cuts and found["allocations"] == len(cuts) and found["ranks_at_start"] == 6
    for step, mean in zip(cuts, path["mean"], strict=True):
        left = 1 - (step - first) / (last - first)
        assert mean == int(MODULES * (4 + 2 * left**3)) / MODULES
    assert path["min"][-1] == min(found["ranks"].values()) and path["max"][-1] == max(found["ranks"].values())


def random_steps(model: Any, allocator: Any, count: int) -> dict[str, list[bool]]:
    """Masks after some steps of random weights and gradients, cut to half at the end."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                for field in ("data", "grad"):
                    setattr(parameter, field, torch.randn(parameter.shape, generator=generator))
        allocator.update_ipt(model)
    masks: dict[str, list[bool]] = allocator.mask_to_budget(model, allocator.init_bgt // 2)
    return masks


def test_the_allocator_is_pefts_where_nothing_ties(base: Path) -> None:
    from peft.tuners.adalora.layer import RankAllocator

    from molf.methods.allocator import Allocator

    masks = []
    for kind in (RankAllocator, Allocator):
        tuner = prepared(base, "adalora").base_model
        allocator = kind(tuner.model, tuner.peft_config["default"], "default")
        masks.append(random_steps(tuner.model, allocator, 6))
        for name, mask in masks[-1].items():
            values = tuner.model.get_parameter(name)
            assert values.squeeze(1).bool().tolist() == mask
    assert masks[0] == masks[1] and sum(map(sum, masks[0].values())) == 3 * MODULES


def test_ties_cost_no_rank(base: Path) -> None:
    """PEFT's own falls below the budget where scores tie."""
    from peft.tuners.adalora.layer import RankAllocator

    from molf.methods.allocator import Allocator

    left = []
    for kind in (RankAllocator, Allocator):
        tuner = prepared(base, "adalora").base_model
        allocator = kind(tuner.model, tuner.peft_config["default"], "default")
        for name, parameter in tuner.model.named_parameters():
            if "lora_" in name:
                allocator.exp_avg_ipt[name] = allocator.exp_avg_unc[name] = torch.ones_like(parameter)
        left.append(sum(map(sum, allocator.mask_to_budget(tuner.model, 4 * MODULES).values())))
    assert left == [0, 4 * MODULES]


def test_the_penalty_is_pefts_and_is_not_counted_twice(base: Path) -> None:
    model = prepared(base, "adalora")
    ids = torch.arange(4, 24)[None]
    peft = model(input_ids=ids, labels=ids).loss  # PEFT adds its own where the model computes a loss
    plain = model.base_model.model(input_ids=ids, labels=ids).loss
    added = adalora.penalty(model)
    assert added is not None and added.item() == pytest.approx((peft - plain).item(), rel=1e-5)
    assert model(input_ids=ids).loss is None
    assert adalora.penalty(prepared(base, "adalora", orth_reg_weight=0.0)) is None


def test_the_penalty_reaches_the_training(base: Path, tmp_path: Path) -> None:
    """P and Q are nearer to orthogonal at the end than without it."""

    def distance(folder: Path, weight: float) -> float:
        norms: list[float] = []

        def note(model: Any, optimizer: Any, block: Any) -> dict[str, Any]:
            model.peft_config["default"].orth_reg_weight = 1.0
            norms.append(adalora.penalty(model).item())  # type: ignore[union-attr]
            return {}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adalora, "proof", note)
            cell(base, folder, "adalora", orth_reg_weight=weight)
        return norms[0]

    assert distance(tmp_path / "with", 0.5) < 0.8 * distance(tmp_path / "without", 0.0)


def test_nothing_is_trained_but_the_triplets(base: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = prepared(base, "adalora", dtype)
        trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B", "lora_E"}
        assert torch.equal(logits(model), logits(load_model(base, dtype)))  # lambda begins at 0


@pytest.mark.parametrize(
    ("budget", "changes"),
    [({"max_steps": 2}, {}), ({"max_steps": 10}, {"deltaT": 7}), ({}, {"deltaT": 100}), ({}, {"tinit": 0.65})],
)
def test_too_few_steps_are_refused_before_the_first(
    budget: dict[str, Any], changes: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"adalora: of \d+ optimizer steps.*raise training.epochs, or lower deltaT"):
        cell(base, tmp_path, "adalora", budget=budget, **changes)
    assert not (tmp_path / "weights").exists()


def test_a_few_steps_can_be_timed() -> None:
    block: Any = chosen("adalora").methods["adalora"]
    assert adalora.phases(block.brief(), 2) == (0, 0)
    assert block.brief().model_dump() == block.model_dump() | {"tinit": 0, "tfinal": 0, "deltaT": 1}
    with pytest.raises(UserError):
        adalora.phases(block, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_r": 4}, "init_r is 4, target_r is 4: there must be ranks to cut; the paper's init_r is 1.5"),
        ({"tinit": 0.5, "tfinal": 0.5}, "tinit 0.5 and tfinal 0.5 leave no step to cut ranks in"),
        ({"beta1": 1.0}, "beta1"),
    ],
)
def test_a_block_that_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen("adalora", **changes)


def broken(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    from molf.methods.allocator import Allocator

    after_step, cut = adalora.after_step, Allocator.mask_to_budget
    match how:
        case "never asked":
            monkeypatch.delattr(adalora, "after_step")
        case "asked now and then":
            monkeypatch.setattr(adalora, "after_step", lambda m, step, n: after_step(m, step, n) if step % 2 else None)
        case "one too few":
            monkeypatch.setattr(Allocator, "mask_to_budget", lambda self, model, budget: cut(self, model, budget - 1))
        case "grows back":
            monkeypatch.setattr(Allocator, "mask_using_rank_pattern", lambda *_: None)
        case "another schedule":
            monkeypatch.setattr(adalora, "after_step", lambda m, step, n: after_step(m, step, n + 1))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("never asked", "in 0 of 20 optimizer steps; without that it is LoRA of too high a rank"),
        ("asked now and then", "saw 1 optimizer steps and is told of step 3 now"),
        ("one too few", "ranks at the end sum to 55, the budget is 56"),
        ("grows back", "modules have singular values that were cut"),
        ("another schedule", "schedule is made for 20 optimizer steps, the training has 21"),
    ],
)
def test_adalora_that_did_not_adapt_fails(
    how: str, said: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, how)
    with pytest.raises(RunError, match=said):
        cell(base, tmp_path, "adalora")
    assert not (tmp_path / "weights").exists()


def test_ranks_that_end_alike_are_said(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molf.methods.allocator import Allocator

    def alike(self: Any, model: Any, budget: int) -> dict[str, list[bool]]:
        self.masks = {name: [True] * 4 + [False] * 2 for name in self.layers(model)}
        self.mask_using_rank_pattern(model, self.masks)
        return self.masks  # type: ignore[no-any-return]

    monkeypatch.setattr(Allocator, "mask_to_budget", alike)
    outcome = cell(base, tmp_path, "adalora")
    assert outcome is not None
    assert outcome.summary["warnings"] == ["every module ended with rank 4: AdaLoRA moved no rank"]


# --- EVA -------------------------------------------------------------------------------------------------------------


def inputs_of(model: Any, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """Tokens x features that enter a module, padding left out."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            eva.run(model, batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)]).double()


def test_the_start_explains_what_an_exact_decomposition_does(base: Path) -> None:
    model = prepared(base, "eva")
    plain = load_model(base, torch.float32)
    batches = sample_of(base, plain).batches(4)
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        a = layer.lora_A["default"].weight.detach()
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4)  # right singular vectors
        x = inputs_of(plain, name, batches)
        x -= x.mean(dim=0)
        values = torch.linalg.svdvals(x).square()
        exact = float(values[: len(a)].sum() / values.sum())
        assert model.start.explained[name] == pytest.approx(float((x @ a.double().T).square().sum() / x.square().sum()))
        assert exact + 1e-5 > model.start.explained[name] > 0.97 * exact
        assert model.start.explained[name] > 2 * model.start.by_chance[name]
        assert layer.scaling["default"] == pytest.approx(4 / math.sqrt(4))  # whatever its rank
    assert torch.equal(logits(model), logits(plain))


def test_padding_does_not_count(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = prepared(base, "eva")
    batches = Sample.batches

    def padded(self: Sample, count: int) -> list[dict[str, Tensor]]:
        fillers = {"labels": -100, "input_ids": 7}
        return [
            {name: torch.nn.functional.pad(x, (9, 0), value=fillers.get(name, 0)) for name, x in batch.items()}
            for batch in batches(self, count)
        ]

    monkeypatch.setattr(Sample, "batches", padded)
    other = prepared(base, "eva")
    assert one.start.tokens == other.start.tokens
    for (name, p), (same, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert name == same and p.shape == q.shape and torch.allclose(p, q, atol=1e-3), name


def test_prompts_count_unless_the_block_says_otherwise(base: Path) -> None:
    batches = sample_of(base, load_model(base, torch.float32)).batches(18)[:18]
    labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    whole = sum(int(batch["attention_mask"].sum()) for batch in batches)
    found = [prepared(base, "eva", probe_steps=18, use_label_mask=mask).start.tokens for mask in (True, False)]
    assert found == [labelled, whole] and labelled < whole


def test_the_data_decides_and_the_seed_repeats_it(base: Path) -> None:
    def state(**changes: Any) -> dict[str, Tensor]:
        torch.manual_seed(int(torch.randint(1000, ()).item()))  # what was drawn before does not matter
        return {name: p.detach() for name, p in prepared(base, "eva", **changes).named_parameters() if "lora_A" in name}

    first, again, more = state(), state(), state(probe_steps=8)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert any(first[name].shape != more[name].shape or not torch.equal(first[name], more[name]) for name in first)


def test_only_the_samples_rows_are_read_and_the_mode_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    batches = Sample.batches

    def counted(self: Sample, count: int) -> list[dict[str, Tensor]]:
        asked.append(count)
        return batches(self, count)

    monkeypatch.setattr(Sample, "batches", counted)
    modes = []
    for training in (True, False):
        model = load_model(base, torch.float32).train(training)
        model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
        adapted = eva.prepare(model, chosen("eva").methods["eva"], sample_of(base, model))  # type: ignore[arg-type]
        assert adapted.training == training
    assert asked == [4, 4] and not any(modes)


def test_without_data_ranks_are_alike(base: Path) -> None:
    model = prepared(base, "eva", uniform=True)
    assert {layer.r["default"] for layer in model.modules() if hasattr(layer, "lora_A")} == {4}


def test_its_time_is_the_cells(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = eva._begin

    def slowly(model: Any, *rest: Any) -> None:
        begin(model, *rest)
        eva.time.sleep(3)

    monkeypatch.setattr(eva, "_begin", slowly)
    outcome = cell(base, tmp_path, "eva")
    assert outcome is not None
    steps, summary = float(outcome.history["seconds"].iloc[-1]), outcome.summary
    assert adaptation(outcome)["seconds"] > 3
    assert summary["train_seconds"] == pytest.approx(steps + adaptation(outcome)["seconds"], abs=0.5)
    assert summary["tokens_per_second"] == pytest.approx(outcome.history["tokens"].sum() / steps, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"probe_steps": 1, "rho": 4.0},
            r"rows of 1 steps hold \d+ tokens, 32 are needed for r 4 x rho 4; raise probe_steps",
        ),
        (
            {"probe_steps": 1, "use_label_mask": True},
            r"\d+ labelled tokens, 16 are needed.*set use_label_mask to false",
        ),
        ({"r": 8, "rho": 3.0}, "24 directions .r 8 x rho 3. want inputs of at least 48 features, .* has 32; lower r"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(changes: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        cell(base, tmp_path, "eva", **changes)


def test_directions_that_never_settle_end_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva, "ROUNDS", 1)
    with pytest.raises(RunError, match="did not settle in 1 rounds; lower tau"):
        cell(base, tmp_path, "eva")


def test_eva_that_did_not_adapt_fails(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block: Any = chosen("eva").methods["eva"]
    with pytest.raises(RunError, match="B of 14 modules is where it began, at 0"):
        eva.proof(prepared(base, "eva"), None, block)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="no data was looked at"):
        eva.proof(prepared(base, "eva", uniform=True), None, block)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="ranks sum to 56, the budget is 70"):
        eva.proof(prepared(base, "eva"), None, block.model_copy(update={"r": 5}))  # type: ignore[arg-type]
    monkeypatch.setattr("peft.initialize_lora_eva_weights", lambda *_, **__: None)
    with pytest.raises(RunError, match="of 14 modules began at directions that explain no more"):
        cell(base, tmp_path, "eva")
