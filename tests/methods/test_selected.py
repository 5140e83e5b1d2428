"""Layers chosen by a gradient probe: the probe against plain autograd, the choice, and what a training shows of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from molf.batches import Collator, SeededBatches, SeededOrder, encode_examples
from molf.config import check_params, read_yaml
from molf.errors import RunError, UserError
from molf.methods import METHODS, lora, selected
from molf.methods.sample import Sample, completion_loss
from molf.methods.selected import best, of_layers, shared_out
from molf.models import folder_hash, load_model, load_tokenizer
from molf.training import Outcome, train
from tests.cells import ADAPTIVE
from tests.conftest import ROOT, SHAPE, frame, write_base

LAYERS = 6
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
PER_LAYER = len(PROJECTIONS)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of six layers."""
    from transformers import LlamaConfig

    shape = SHAPE | {"num_hidden_layers": LAYERS}
    return write_base(tmp_path_factory.mktemp("deep"), LlamaConfig(intermediate_size=48, **shape))


def block(**changes: Any) -> Any:
    data = read_yaml(ROOT / "params.yaml")
    data["methods"]["selected"] = ADAPTIVE["selected"] | {"lora_alpha": 11, "learning_rate": 1e-3} | changes
    return check_params(data, "test").methods["selected"]


def sample(base: Path, model: nn.Module, rows: int = 4) -> Sample:
    tokenizer = load_tokenizer(base)
    examples = encode_examples(tokenizer, frame(), 64)
    batches = SeededBatches(SeededOrder(len(examples), 3), rows)
    return Sample(batches, examples.rows, Collator(tokenizer.pad_token_id), model, accumulation=1)


def prepared(base: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = load_model(base, dtype)
    return selected.prepare(model, block(**changes), sample(base, model))


def cell(base: Path, folder: Path, method: Any, seed: int = 3) -> Outcome:
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= {"max_length": 32, "batch_size": 4, "epochs": 2, "threads": 1}
    training = check_params(data, "test").training
    return train(base, frame(), method, training, seed, folder / "weights", folder / "scratch")


# --- the probe -------------------------------------------------------------------------------------------------------


def test_importance_is_the_mean_square_of_plain_gradients(deep: Path) -> None:
    model = load_model(deep, torch.float32)
    names = list(selected.targets(model, ["lm_head"]))
    assert len(names) == LAYERS * PER_LAYER
    batches = sample(deep, model).batches(3)
    found = selected.importance(model, names, batches)
    weights: Any = [model.get_submodule(name).weight for name in names]
    expected = torch.zeros(len(names), dtype=torch.float64)
    for batch in batches:
        gradients = torch.autograd.grad(completion_loss(model, batch), weights)
        expected += torch.stack([gradient.double().square().mean() for gradient in gradients]) / 3
    torch.testing.assert_close(torch.tensor(list(found.values()), dtype=torch.float64), expected, rtol=1e-4, atol=0)
    assert list(found) == names and min(found.values()) > 0


def test_the_probe_leaves_the_model_as_it_was_and_holds_one_gradient_at_a_time(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(deep, torch.float32)
    names = list(selected.targets(model, ["lm_head"]))
    model.model.norm.weight.requires_grad_(False)
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state, alive = torch.get_rng_state(), []
    norm = torch.linalg.vector_norm

    def counting(*arguments: Any, **options: Any) -> torch.Tensor:
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return norm(*arguments, **options)

    monkeypatch.setattr(torch.linalg, "vector_norm", counting)
    selected.importance(model, names, sample(deep, model).batches(2))
    assert alive == [1] * (2 * len(names))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.lm_head.weight.grad is kept
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["lm_head.weight"]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_probe_that_meets_no_number_stops_the_run(deep: Path) -> None:
    model = load_model(deep, torch.float32)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"selected: the probe's gradient of model\.layers\.\d.* is not finite"):
        selected.prepare(model, block(), sample(deep, model))


def test_the_probe_looks_at_the_first_steps_of_training(deep: Path) -> None:
    """Whose examples follow the seed's order, so that another seed may choose other layers."""
    model = load_model(deep, torch.float32)
    seen = sample(deep, model).batches(2)
    order = SeededOrder(24, 3).indices(0)
    rows = encode_examples(load_tokenizer(deep), frame(), 64).rows
    collate = Collator(load_tokenizer(deep).pad_token_id)
    for i, batch in enumerate(seen):
        expected = collate([rows[number] for number in order[4 * i : 4 * i + 4]])
        assert all(torch.equal(batch[name], value) for name, value in expected.items())


# --- the choice ------------------------------------------------------------------------------------------------------


def test_the_best_layers_are_kept() -> None:
    assert best({0: 1.0, 1: 5.0, 2: 3.0, 3: 4.0}, 0.5) == [1, 3]
    assert best({0: 1.0, 1: 5.0, 2: 3.0}, 0.5) == [1, 2]  # rounded up
    assert best({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, 0.5) == [0, 1]
    assert best({0: 1.0, 1: 2.0}, 0.01) == [1]
    assert best({layer: 0.0 for layer in range(10)}, 0.3) == [0, 1, 2]  # 0.3 * 10 is 3.0000000000000004 in no layer


def test_a_layers_importance_is_the_mean_over_its_weights() -> None:
    importance = {"m.layers.0.a": 4.0, "m.layers.0.b": 1.0, "m.layers.11.a": 7.0}
    assert of_layers(importance, {"m.layers.0.a": 10, "m.layers.0.b": 30, "m.layers.11.a": 5}) == {0: 1.75, 11: 7.0}


def test_ranks_follow_the_weights_within_the_budget() -> None:
    equal = dict.fromkeys("abcd", 10)
    most = dict.fromkeys("abcd", 100)
    assert shared_out(dict.fromkeys("abcd", 3.0), equal, most, 400) == dict.fromkeys("abcd", 10)
    assert shared_out(dict(zip("abcd", (4.0, 3.0, 2.0, 1.0), strict=True)), equal, most, 1000) == {
        **{"a": 40, "b": 30},
        **{"c": 20, "d": 10},
    }
    # Nothing but the smallest rank for what has no importance, nor more than a matrix can have.
    assert shared_out({"a": 1.0, "b": 0.0}, {"a": 1, "b": 1}, {"a": 8, "b": 8}, 7) == {"a": 6, "b": 1}
    assert shared_out({"a": 1.0, "b": 0.0}, {"a": 1, "b": 1}, {"a": 4, "b": 8}, 9) == {"a": 4, "b": 5}
    assert shared_out({"a": 0.0, "b": 0.0}, {"a": 2, "b": 2}, {"a": 9, "b": 9}, 12) == {"a": 3, "b": 3}


@pytest.mark.parametrize("seed", range(8))
def test_no_budget_is_overspent_or_left_to_lie(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    names = [f"m{i}" for i in range(20)]
    weights = {name: float(10 ** (4 * torch.rand((), generator=draw) - 8)) for name in names}
    costs = {name: int(torch.randint(50, 500, (), generator=draw)) for name in names}
    most = dict.fromkeys(names, 64)
    budget = 8 * sum(costs.values())
    ranks = shared_out(weights, costs, most, budget)
    left = budget - sum(costs[name] * rank for name, rank in ranks.items())
    assert 0 <= left < min(costs[name] for name in names if ranks[name] < 64)
    assert all(1 <= rank <= 64 for rank in ranks.values())
    ordered = [ranks[name] for name in sorted(names, key=lambda name: weights[name])]
    assert all(after >= before - 1 for before, after in zip(ordered, ordered[1:], strict=False))


def test_too_small_a_budget_says_what_to_raise(deep: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method selected does not fit .* the budget has .*; raise r or budget, or"):
        cell(deep, tmp_path, block(r=1, budget=0.1))


def test_a_model_without_targets_is_refused(deep: Path) -> None:
    with pytest.raises(ValueError, match="no linear layer is left"):
        selected.targets(load_model(deep, torch.float32), [f"{letter}_proj" for letter in PROJECTIONS])


# --- the adapters ----------------------------------------------------------------------------------------------------


def uniform_parameters(r: int) -> int:
    """By hand: of LoRA of rank r on all of a layer's seven matrices."""
    width, inner = SHAPE["hidden_size"], 48
    return r * LAYERS * (4 * (width + width) + 3 * (width + inner))


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_the_adapters_have_the_parameters_of_uniform_lora(deep: Path, budget: float) -> None:
    model = prepared(deep, budget=budget)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    allowed = budget * uniform_parameters(4)
    assert allowed - (32 + 48) < trained <= allowed
    assert len(selected.selection(model).layers) == LAYERS // 2
    assert {name.split(".lora_")[0].split(".")[4] for name, p in model.named_parameters() if p.requires_grad} == {
        str(layer) for layer in selected.selection(model).layers
    }


def test_more_important_modules_have_higher_ranks(deep: Path) -> None:
    model = load_model(deep, torch.float32)
    names = list(selected.targets(model, ["lm_head"]))
    found = selected.importance(model, names, sample(deep, model).batches(2))
    equal, steep = prepared(deep, exponent=0.0), prepared(deep, exponent=1.0)
    ranks = selected.selection(equal).ranks
    assert max(ranks.values()) - min(ranks.values()) <= 1 and selected.selection(steep).ranks.keys() == ranks.keys()
    ordered = sorted(ranks, key=lambda name: found[name])
    assert selected.selection(steep).ranks[ordered[-1]] > 2 * selected.selection(steep).ranks[ordered[0]]


def test_all_layers_at_one_rank_are_lora_to_the_bit(deep: Path, tmp_path: Path) -> None:
    """The choice that chooses nothing: the same modules, the same start, the same steps."""
    chosen = cell(deep, tmp_path / "selected", block(share=1.0, exponent=0.0))
    data = read_yaml(ROOT / "params.yaml")
    data["methods"]["lora"]["r"] = 4
    plain = cell(deep, tmp_path / "lora", check_params(data, "test").methods["lora"])
    assert chosen.history["loss"].tolist() == plain.history["loss"].tolist()
    weights = [lora.load(deep, tmp_path / name / "weights", torch.float32) for name in ("selected", "lora")]
    pairs = zip(weights[0].state_dict().values(), weights[1].state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_without_a_sample_the_layers_are_spread_from_the_lowest_on(deep: Path) -> None:
    model = selected.prepare(load_model(deep, torch.float32), block(), None)
    chosen = selected.selection(model)
    assert chosen.layers == [0, 2, 4] and not chosen.importance
    assert max(chosen.ranks.values()) - min(chosen.ranks.values()) <= 1
    with torch.device("meta"):  # as an estimate asks
        from transformers import AutoConfig, AutoModelForCausalLM

        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(deep))
        assert selected.selection(selected.prepare(empty, block(), None)).ranks == chosen.ranks


def test_the_backward_ends_at_the_lowest_layer_with_an_adapter(deep: Path) -> None:
    model = load_model(deep, torch.float32)
    batch = sample(deep, model).batches(1)[0]
    names = selected.targets(model, ["lm_head"])
    upper = {name: float(".layers.3." in name or ".layers.5." in name) for name in names}
    adapted: Any = selected.adapt(model, block(share=0.3), upper)
    assert selected.selection(adapted).layers == [3, 5]
    went: list[int] = []
    graph: list[bool] = []
    for number, layer in enumerate(adapted.base_model.model.model.layers):
        layer.register_full_backward_hook(lambda *_, number=number: went.append(number))
        layer.register_forward_hook(
            lambda _, __, out: graph.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
    completion_loss(adapted, batch).backward()  # type: ignore[no-untyped-call]
    assert graph == [False] * 3 + [True] * 3
    assert sorted(went) == [3, 4, 5]


def test_a_bfloat16_model_is_probed_and_adapted_in_bfloat16(deep: Path) -> None:
    model = prepared(deep, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    full, half = prepared(deep), selected.selection(model)
    assert half.importance == pytest.approx(selected.selection(full).importance, rel=0.1)


# --- a training ------------------------------------------------------------------------------------------------------


def test_a_training_tells_what_was_chosen(deep: Path, tmp_path: Path) -> None:
    outcome = cell(deep, tmp_path, block())
    told = outcome.summary["adaptation"]
    assert told["layers"] == best({int(k): v for k, v in told["importance"].items()}, 0.5)
    assert len(told["layers"]) == 3 and told["lowest_layer"] == told["layers"][0]
    assert set(told["importance"]) == {str(layer) for layer in range(LAYERS)}
    assert len(told["ranks"]) == 3 * PER_LAYER and min(told["ranks"].values()) >= 1
    assert told["parameters"] == outcome.summary["trained_parameters"] <= told["budget"]
    assert told["budget"] == uniform_parameters(4) and told["ranks_at_start"] == 4
    assert 0 < told["seconds"] < 60
    # The same seed chooses and trains the same.
    again = cell(deep, tmp_path / "again", block())
    assert again.summary["adaptation"]["importance"] == told["importance"]
    assert folder_hash(tmp_path / "again/weights") == folder_hash(tmp_path / "weights")


def test_what_was_not_done_is_no_proof(deep: Path) -> None:
    method, chosen = METHODS["selected"], block()
    model = prepared(deep)
    with pytest.raises(RunError, match="selected: 21 of 21 adapters were never trained"):
        method.proof(model, None, chosen)
    pairs = dict(selected._adapted(model))
    with torch.no_grad():
        for module in pairs.values():
            module.lora_B["default"].weight.fill_(1.0)
    assert method.proof(model, None, chosen)["layers"] == selected.selection(model).layers
    [name, *_] = pairs
    selected.selection(model).ranks[name] += 1
    with pytest.raises(RunError, match=f"selected: {name} should have other adapters"):
        method.proof(model, None, chosen)


def test_shards_are_refused(tmp_path: Path) -> None:
    data = read_yaml(ROOT / "params.yaml")
    data["methods"]["selected"] = block().model_dump(mode="json")
    data["grid"]["methods"] = ["selected"]
    data["training"] |= {"processes": 2, "sharding": "fsdp"}
    with pytest.raises(
        UserError, match=r"methods\.selected: 2 processes cannot train .* under fsdp: .*sharding to ddp"
    ):
        check_params(data, "test")
    data["training"]["sharding"] = "ddp"
    check_params(data, "test")
