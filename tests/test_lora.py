"""LoRA's relatives: each is what its paper says, proves it, and ends as an adapter that loads to the trained model."""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from molf.checkpoint import Checkpoints
from molf.config import check_params, read_yaml
from molf.errors import Interrupted, RunError, UserError
from molf.method_blocks import LoraMethod
from molf.methods import fourbit, lora, principal
from molf.models import folder_hash, load_model, load_tokenizer, parameter_counts
from molf.paths import Cell, read_json, write_json
from molf.resume import Keeper
from molf.training import Outcome, train
from tests.conftest import ROOT, SHAPE, frame, write_base
from tests.test_resume import Stopper
from tests.trained import make, run_stage

PLAIN: dict[str, Any] = {"r": 3, "lora_alpha": 6, "use_rslora": False, "learning_rate": 5e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "classic": PLAIN,
    "rslora": {**PLAIN, "use_rslora": True},
    "dora": {**PLAIN, "use_dora": True},
    "pissa": {**PLAIN, "init_lora_weights": "pissa"},
    "loraplus": {**PLAIN, "loraplus_lr_ratio": 16.0, "learning_rate": 5e-4},
    "qlora": {**PLAIN, "base_bits": 4},
}
# bitsandbytes is installed for the acceptance runs alone.
IN_4_BITS = [
    pytest.mark.acceptance,
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None,
        reason="bitsandbytes is not installed (pip install '.[qlora]')",
    ),
]


def in_4_bits(test: Callable[..., None]) -> Callable[..., None]:
    """A test of QLoRA."""
    for mark in IN_4_BITS:
        test = mark(test)
    return test


every_variant = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=IN_4_BITS if name == "qlora" else ()) for name in VARIANTS]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose widths are whole blocks of 4-bit numbers."""
    from transformers import LlamaConfig

    return write_base(
        tmp_path_factory.mktemp("base"), LlamaConfig(**SHAPE | {"hidden_size": 64}, intermediate_size=128)
    )


def cell(
    base: Path, folder: Path, name: str, stop: int = 0, block: dict[str, Any] | None = None, **budget: Any
) -> Outcome:
    """18 rows, 10 steps; a checkpoint every third."""
    data = read_yaml(ROOT / "params.yaml")
    data["methods"]["lora"] |= VARIANTS[name] | (block or {})
    data["training"] |= {"max_length": 32, "batch_size": 4, "epochs": 2, "threads": 1} | budget
    params = check_params(data, "test")
    keeper = Keeper(Checkpoints(folder / "checkpoints", {"cell": folder.name}, keep=1), 3, None)
    folder.mkdir(exist_ok=True)
    listener, places = Stopper(stop) if stop else None, (folder / "weights", folder / "scratch")
    return train(base, frame(18), params.methods["lora"], params.training, 3, *places, listener, keeper)


def block_of(name: str, **changes: Any) -> LoraMethod:
    data = read_yaml(ROOT / "params.yaml")
    data["methods"]["lora"] |= VARIANTS[name] | changes
    block = check_params(data, "test").methods["lora"]
    assert isinstance(block, LoraMethod)
    return block


def prepared(base: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    return lora.prepare(load_model(base, dtype), block_of(name, **changes), None)


def logits(model: Any, base: Path) -> Tensor:
    tokenizer = load_tokenizer(base)
    ids = tokenizer(frame(4)["prompt"].tolist(), return_tensors="pt", padding=True)
    # In training's mode: asked otherwise, bitsandbytes packs weights anew, for bfloat16 arithmetic.
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.Dropout)
    with torch.no_grad():
        found: Tensor = model(**ids, use_cache=False).logits
    return found


def rounded(base: Path) -> Any:
    """The base model with the targets' weights through 4 bits and back, by bitsandbytes' functions alone."""
    from bitsandbytes import functional

    model: Any = load_model(base, torch.float32)
    for name in (n.removeprefix("base_model.model.") for n in lora.targets(prepared(base, "classic"))):
        weight = model.get_submodule(name).weight
        weight.data = functional.dequantize_nf4(*functional.quantize_nf4(weight.data, compress_statistics=True))
    return model


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The model and the optimizer of each training, as they are when its proof is asked for."""
    seen: list[Any] = []
    proof = lora.proof

    def noting(model: Any, optimizer: Any, block: Any) -> dict[str, Any]:
        seen.append((model, optimizer, block))
        return proof(model, optimizer, block)

    monkeypatch.setattr(lora, "proof", noting)
    return seen


@every_variant
def test_a_trained_cell_loads_to_the_model_that_was_trained(
    name: str, base: Path, tmp_path: Path, kept: list[Any]
) -> None:
    outcome = cell(base, tmp_path / "cell", name)
    [(model, _, _)] = kept
    loaded = logits(lora.load(base, tmp_path / "cell/weights", torch.float32), base)
    torch.testing.assert_close(loaded, logits(model, base), rtol=1e-4, atol=1e-5)
    assert (loaded - logits(load_model(base, torch.float32), base)).abs().max() > 1e-3
    found = outcome.summary["adaptation"]
    assert found["modules"] == 14 and found["rank"] == 3
    assert found["scale"] == pytest.approx(6 / math.sqrt(3) if name == "rslora" else 2)
    assert (
        set(found) - {"modules", "rank", "scale"}
        == {
            "classic": set(),
            "rslora": set(),
            "dora": {"magnitude_change"},
            "pissa": {"start_error", "residual", "seconds"},
            "loraplus": {"rate_ratio", "rate_steps"},
            "qlora": {"base_bits", "quantization_error"},
        }[name]
    )
    assert json.loads(json.dumps(found)) == found


@every_variant
def test_what_is_written_is_an_ordinary_adapter_over_the_original_base(name: str, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    cell(base, tmp_path / "cell", name)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (tmp_path / "cell/weights").iterdir()
    }
    config = json.loads((tmp_path / "cell/weights/adapter_config.json").read_text())
    assert config["r"] == (6 if name == "pissa" else 3) and config["use_dora"] == (name == "dora")
    assert config["init_lora_weights"] is True  # a start of PiSSA's would take the base apart once more
    over = load_model(base, torch.float32) if name != "qlora" else rounded(base)
    unmerged = PeftModel.from_pretrained(over, tmp_path / "cell/weights")
    merged = lora.load(base, tmp_path / "cell/weights", torch.float32)
    torch.testing.assert_close(logits(unmerged, base), logits(merged, base), rtol=1e-4, atol=1e-5)


@every_variant
def test_a_training_that_goes_on_ends_at_the_same_bits(name: str, base: Path, tmp_path: Path) -> None:
    whole = cell(base, tmp_path / "once", name, block={"lora_dropout": 0.1})
    with pytest.raises(Interrupted):
        cell(base, tmp_path / "often", name, stop=4, block={"lora_dropout": 0.1})
    resumed = cell(base, tmp_path / "often", name, block={"lora_dropout": 0.1})
    assert resumed.summary["resumed_at_steps"] and not whole.summary["resumed_at_steps"]
    assert folder_hash(tmp_path / "once/weights") == folder_hash(tmp_path / "often/weights")
    first, second = ({**run.summary["adaptation"], "seconds": 0} for run in (whole, resumed))
    assert first == second


@every_variant
def test_it_trains_in_bfloat16(name: str, base: Path, tmp_path: Path, kept: list[Any]) -> None:
    outcome = cell(base, tmp_path / "cell", name, dtype="bfloat16", epochs=4)
    losses = outcome.history["loss"]
    assert losses.tail(4).mean() < losses.head(4).mean()
    [(model, _, _)] = kept
    trained = [p for p in model.parameters() if p.requires_grad]
    rounded_too = {torch.uint8} if name == "qlora" else set()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} | rounded_too and trained
    loaded = logits(lora.load(base, tmp_path / "cell/weights", torch.bfloat16), base).float()
    torch.testing.assert_close(loaded, logits(model, base).float(), rtol=0.1, atol=0.1)


@every_variant
def test_the_first_loss_is_the_base_models(name: str, base: Path, tmp_path: Path) -> None:
    """Every adapter begins without effect, PiSSA's as well: what it takes from the weight it gives back."""
    original = rounded(base) if name == "qlora" else load_model(base, torch.float32)
    torch.testing.assert_close(logits(prepared(base, name), base), logits(original, base), rtol=1e-4, atol=1e-5)


# --- PiSSA -----------------------------------------------------------------------------------------------------------


def test_pissa_begins_where_pefts_own_does(base: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear", exclude_modules=["lm_head"], init_lora_weights="pissa"
    )
    theirs: Any = get_peft_model(load_model(base, torch.float32), config)
    ours = prepared(base, "pissa")
    for name, layer in lora.targets(ours).items():
        (a, b), (other_a, other_b) = principal.factors(layer), principal.factors(theirs.get_submodule(name))
        torch.testing.assert_close(b @ a, other_b @ other_a, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # the singular values are shared out evenly
        torch.testing.assert_close(a.norm(dim=1), other_a.norm(dim=1), rtol=1e-4, atol=1e-6)
        weights = (module.get_submodule(name).get_base_layer().weight for module in (ours, theirs))
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-6)


def test_no_factors_of_its_rank_leave_less_than_pissas(base: Path) -> None:
    """Against the singular values in float64 (Eckart and Young), and against its residual's own."""
    model = prepared(base, "pissa")
    original: Any = load_model(base, torch.float32)
    for name, layer in lora.targets(model).items():
        weight = original.get_submodule(name.removeprefix("base_model.model.")).weight
        values = torch.linalg.svdvals(weight.detach().double())
        left = layer.get_base_layer().weight.detach().double()
        assert float(left.norm()) == pytest.approx(float(values[3:].norm()), rel=1e-5)
        assert float(torch.linalg.matrix_norm(left, 2)) == pytest.approx(float(values[3]), rel=1e-5)
    assert model.pissa["start_error"] < 1e-6 and model.pissa["residual"] == pytest.approx(1, abs=1e-5)


def test_a_wrong_decomposition_is_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.linalg.svd

    def smallest_first(*given: Any, **named: Any) -> Any:
        u, values, vt = honest(*given, **named)
        return u.flip(1), values.flip(0), vt.flip(0)

    monkeypatch.setattr(torch.linalg, "svd", smallest_first)
    with pytest.raises(RunError, match=r"PiSSA: base_model.model.model.layers.0.self_attn.q_proj begins .* failed"):
        prepared(base, "pissa")


def test_more_singular_values_than_there_are_is_a_message(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"method lora does not fit this model: PiSSA takes 70 singular values \(r\), but"
    ):
        cell(base, tmp_path / "cell", "pissa", block={"r": 70})


def test_a_start_noted_elsewhere_counts_and_the_weights_follow(base: Path) -> None:
    """A checkpoint of hardware whose decomposition chose other vectors."""
    model = prepared(base, "pissa")
    original: Any = load_model(base, torch.float32)
    layers = lora.targets(model)
    start = principal.Start(layers)
    state = {name: {own: value.clone() for own, value in held.items()} for name, held in start.state_dict().items()}
    first = next(iter(layers))
    state[first]["start_A"] = state[first]["start_A"] + 0.01 * torch.randn_like(state[first]["start_A"])
    start.load_state_dict(state)
    for name, layer in layers.items():
        whole = original.get_submodule(name.removeprefix("base_model.model.")).weight
        torch.testing.assert_close(layer.get_base_layer().weight + principal.change(layer), whole, rtol=1e-4, atol=1e-6)
    assert torch.equal(layers[first].start_A, state[first]["start_A"])


# --- LoRA+ -----------------------------------------------------------------------------------------------------------


def test_lora_plus_steps_are_adamws_with_two_rates(base: Path, tmp_path: Path, kept: list[Any]) -> None:
    cell(base, tmp_path / "cell", "loraplus")
    [(model, optimizer, _)] = kept
    rates = {
        ("lora_B" in name): group["initial_lr"]
        for group in optimizer.param_groups
        for name, p in model.named_parameters()
        if any(p is own for own in group["params"])
    }
    assert rates == {False: 5e-4, True: pytest.approx(8e-3)}
    assert type(optimizer) is torch.optim.AdamW
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}


# --- QLoRA -----------------------------------------------------------------------------------------------------------


@in_4_bits
def test_a_base_of_4_bits_takes_an_eighth_and_counts_as_what_it_holds(base: Path) -> None:
    model, plain = prepared(base, "qlora"), prepared(base, "classic")
    assert parameter_counts(model) == parameter_counts(plain)
    for name, layer in lora.targets(model).items():
        weight, whole = layer.base_layer.weight, plain.get_submodule(name).base_layer.weight
        assert 8 * weight.numel() * weight.element_size() == whole.numel() * whole.element_size()
        assert not weight.requires_grad and fourbit.dequantized(layer.base_layer).shape == whole.shape
    assert 0.05 < model.quantization_error < 0.15


@in_4_bits
def test_a_base_that_is_not_in_4_bits_is_named(base: Path, tmp_path: Path, kept: list[Any]) -> None:
    cell(base, tmp_path / "cell", "qlora")
    [(model, optimizer, block)] = kept
    layer = lora.targets(model)["base_model.model.model.layers.0.mlp.up_proj"]
    layer.base_layer = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    with pytest.raises(RunError, match=r"1 of 14 modules have a base that is not in 4 bits \(.*layers.0.mlp.up_proj\)"):
        lora.proof(model, optimizer, block)


@in_4_bits
def test_a_base_that_4_bits_do_not_fit_is_refused(tied_base: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="base_bits: 4 takes 64 inputs at a time, and base_model.* has 32"):
        prepared(tied_base, "qlora")
    honest = fourbit.dequantized
    monkeypatch.setattr(fourbit, "dequantized", lambda linear: 0.6 * honest(linear))
    with pytest.raises(
        RunError, match="QLoRA: 4 bits lost 4[0-9] % of base_model.model.model.layers.0.self_attn.q_proj"
    ):
        prepared(base, "qlora")


@in_4_bits
def test_it_is_swept_and_compared_with_methods_that_need_no_such_library(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = read_yaml(ROOT / "params.yaml")["methods"]["lora"]
    root = make(tmp_path / "project", base, blocks={n: plain | VARIANTS[n] for n in ("classic", "qlora")})
    [group] = read_json(root / "reports/comparison.json")["groups"]
    assert [(m["method"], m["kind"]) for m in group["methods"]] == [("classic", "lora"), ("qlora", "qlora")]

    data = read_json(root / "params.yaml")
    data["grid"]["tune"] = [0.5, 2]
    write_json(root / "params.yaml", data)
    monkeypatch.chdir(root)
    run_stage("sweep", "tiny", "fact", "qlora", "2")
    trial = read_json(Path("sweeps/tiny/fact/qlora/factor-2/trial.json"))
    run = read_json(Cell("tiny", "fact", "qlora", 0).results / "train/run.json")
    assert trial["versions"] == run["versions"] and "bitsandbytes" in run["versions"]


@in_4_bits
def test_their_library_says_nothing_when_peft_imports_it() -> None:
    script = "from molf import models; models.quiet(); import peft, sys; assert 'bitsandbytes' in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_4_bits_without_their_library_are_a_message(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="base_bits: 4 needs bitsandbytes, which is not installed: pip install"):
        prepared(base, "classic", base_bits=4)


def test_a_base_of_4_bits_is_refused_where_it_cannot_be() -> None:
    for change in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(UserError, match="methods.lora: base_bits: 4 rounds the weight that"):
            block_of("classic", base_bits=4, **change)
    assert block_of("classic", base_bits=4).unfit() == {"fsdp": "a weight of 4 bits cannot be cut by rows"}


# --- broken on purpose -----------------------------------------------------------------------------------------------


def scaled(model: Any) -> None:
    next(iter(lora.targets(model).values())).scaling["default"] = 2.5


def unmoved(model: Any) -> None:
    layer = next(iter(lora.targets(model).values()))
    principal.factors(layer)[1].requires_grad_(False)


def still(model: Any) -> None:
    next(iter(lora.targets(model).values())).lora_magnitude_vector["default"].weight.requires_grad_(False)


def off(model: Any) -> None:
    next(iter(lora.targets(model).values())).start_magnitude.mul_(1.01)


def without(model: Any) -> None:
    next(iter(lora.targets(model).values())).lora_magnitude_vector.pop("default")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("rslora", scaled, r"LoRA: 1 of 14 modules have another scale than 3.4641 \(base_model.model.model.layers.0"),
        (
            "classic",
            unmoved,
            r"LoRA: 1 of 14 modules did not move: .* \(base_model.model.model.layers.0.self_attn.q_proj\)",
        ),
        ("pissa", unmoved, r"LoRA: 1 of 14 modules did not move"),
        ("dora", still, r"LoRA: 1 of 14 modules have a magnitude that the optimizer does not train"),
        ("dora", off, r"LoRA: 1 of 14 modules began with another magnitude than the norms"),
        ("dora", unmoved, r"LoRA: 1 of 14 modules did not move"),
    ],
)
def test_a_relative_that_did_not_do_what_it_claims_fails(
    name: str, damage: Callable[[Any], None], said: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = lora.prepare

    def damaged(*given: Any) -> Any:
        model = prepare(*given)
        damage(model)
        return model

    monkeypatch.setattr(lora, "prepare", damaged)
    with pytest.raises(RunError, match=said):
        cell(base, tmp_path / "cell", name)
    assert not (tmp_path / "cell/weights").exists()


def test_a_magnitude_that_stood_still_is_named(base: Path, tmp_path: Path, kept: list[Any]) -> None:
    cell(base, tmp_path / "cell", "dora")
    [(model, optimizer, block)] = kept
    layer = lora.targets(model)["base_model.model.model.layers.1.mlp.up_proj"]
    lora.magnitude(layer).data.copy_(layer.start_magnitude)
    with pytest.raises(
        RunError, match=r"1 of 14 modules have a magnitude that did not move \(.*layers.1.mlp.up_proj\)"
    ):
        lora.proof(model, optimizer, block)
    without(model)
    with pytest.raises(RunError, match="1 of 14 modules have no magnitude of DoRA's"):
        lora.proof(model, optimizer, block)


@pytest.mark.parametrize("step", [2, 10])
def test_a_ratio_that_was_lost_for_one_step_fails(
    step: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, made = lora.Rates.__call__, []

    def disturbed(self: Any, optimizer: Any, *given: Any) -> None:
        made.append(1)
        if len(made) == step:
            optimizer.param_groups[-1]["lr"] *= 0.5
        call(self, optimizer, *given)

    monkeypatch.setattr(lora.Rates, "__call__", disturbed)
    with pytest.raises(RunError, match=r"LoRA\+: over 9 steps B's rate was 8 to 16 times A's, not 16"):
        cell(base, tmp_path / "cell", "loraplus")


def test_dora_and_pissa_at_once_are_refused() -> None:
    with pytest.raises(UserError, match=r"methods.lora: use_dora: true takes its magnitudes from the base weight"):
        block_of("dora", init_lora_weights="pissa")


def test_a_block_of_an_earlier_molf_is_plain_lora() -> None:
    block = read_yaml(ROOT / "params.yaml")["methods"]["lora"]
    found = LoraMethod.model_validate(block)
    assert (found.use_dora, found.init_lora_weights, found.loraplus_lr_ratio) == (False, "default", 1.0)
