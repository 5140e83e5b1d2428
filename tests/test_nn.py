"""Layers with experts: the same function before, during and after; export to PEFT; targets named or refused."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molf import (
    MoLFAdamW,
    MoLFConfig,
    apply_molf,
    defer_lora_gradients,
    derive_lora_gradients,
    merge_molf,
    molf_modules,
    molf_param_groups,
    molf_to_peft,
    save_peft_adapter,
)
from tests.oracle import disturb


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4, bias=False)).double()


def disturbed(config: MoLFConfig) -> nn.Module:
    """With B away from its zero start."""
    net = apply_molf(model(), config)
    disturb(net, 0.1)
    return net


X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
FORWARDS = [
    MoLFConfig(r=(2, 3)),
    MoLFConfig(r=(2, 3), forward="dense"),
    MoLFConfig(r=(2, 3), train_base=False),
    MoLFConfig(r=(4,), lora_dropout=0.5),
]


@pytest.mark.parametrize("config", FORWARDS)
def test_step_0_is_the_base_model_exactly(config: MoLFConfig) -> None:
    assert torch.equal(apply_molf(model(), config).eval()(X), model()(X))


@pytest.mark.parametrize("config", FORWARDS)
def test_merging_keeps_the_function(config: MoLFConfig) -> None:
    net = disturbed(config).eval()
    before = net(X)
    merged = merge_molf(net)
    assert {type(module) for module in merged.modules()} == {nn.Sequential, nn.Linear, nn.Tanh}
    torch.testing.assert_close(merged(X), before, rtol=0, atol=1e-12)
    assert not torch.allclose(before, model()(X))


def test_auto_takes_the_effective_forward_only_where_it_is_exact() -> None:
    assert [config.effective for config in FORWARDS] == [True, False, False, False]


def test_both_forwards_give_the_same_output_and_gradients() -> None:
    effective = disturbed(MoLFConfig(r=(2, 3)))
    dense = apply_molf(model(), MoLFConfig(r=(2, 3), forward="dense"))
    dense.load_state_dict(effective.state_dict())
    for net in (effective, dense):
        net(X).square().sum().backward()
    torch.testing.assert_close(effective(X), dense(X), rtol=0, atol=1e-12)
    for (name, left), right in zip(effective.named_parameters(), dense.parameters(), strict=True):
        assert left.grad is not None, name
        torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("written", "read"), [("effective", "dense"), ("dense", "effective"), ("dense", "dense")])
def test_a_state_dict_loads_into_the_other_forward(written: Any, read: Any) -> None:
    source = disturbed(MoLFConfig(r=(2, 3), forward=written))
    target = apply_molf(model(), MoLFConfig(r=(2, 3), forward=read))
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(X), source(X), rtol=0, atol=1e-12)
    for (_, left), (_, right) in zip(molf_modules(source), molf_modules(target), strict=True):
        torch.testing.assert_close(left.base_weight(), right.base_weight(), rtol=0, atol=1e-12)
        assert bool(right.effective) == right.is_effective


def test_deferred_gradients_equal_the_hooks() -> None:
    hooked, deferred = disturbed(MoLFConfig(r=(2, 3))), disturbed(MoLFConfig(r=(2, 3)))
    deferred.load_state_dict(hooked.state_dict())
    defer_lora_gradients(deferred)
    for net in (hooked, deferred):
        for rows in X.split(1):  # accumulated over three micro-batches
            net(rows).square().sum().backward()
    assert all(module.lora_A[0].grad is None for _, module in molf_modules(deferred))
    derive_lora_gradients(deferred)
    for left, right in zip(hooked.parameters(), deferred.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None
        assert torch.equal(left.grad, right.grad)


def test_gradients_deferred_and_never_derived_are_an_error() -> None:
    net = disturbed(MoLFConfig(r=(2,)))
    defer_lora_gradients(net)
    optimizer = MoLFAdamW(molf_param_groups(net, 0.1, 0.1))
    net(X).sum().backward()
    with pytest.raises(RuntimeError, match="derive_lora_gradients"):
        optimizer.step()


def test_gradients_are_not_derived_from_ones_that_are_not_averaged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    net = disturbed(MoLFConfig(r=(2,)))
    monkeypatch.setattr("molf.nn._of_many", lambda: True)
    with pytest.raises(RuntimeError, match="defer_lora_gradients"):
        net(X).sum().backward()
    defer_lora_gradients(net)
    net(X).sum().backward()


def test_gradients_keep_their_parameters_dtype_under_autocast() -> None:
    net = disturbed(MoLFConfig(r=(2,))).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(X.float()).float().sum().backward()
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}


def test_a_layer_stays_in_its_mode() -> None:
    net = apply_molf(model().eval(), MoLFConfig(r=(2,), lora_dropout=0.5))
    assert not any(module.training for module in net.modules())
    assert not any(module.training for module in merge_molf(net).modules())


def test_scaling_is_rank_stabilised_or_plain() -> None:
    assert MoLFConfig(r=(16,), lora_alpha=8).scaling(16) == 2.0
    assert MoLFConfig(r=(16,), lora_alpha=8, use_rslora=False).scaling(16) == 0.5


def test_a_frozen_base_leaves_only_the_experts_trained() -> None:
    net = apply_molf(model(), MoLFConfig(r=(2, 3), train_base=False))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in net.named_parameters() if "lora_" in name}
    assert {group["expert"] for group in molf_param_groups(net, 0.1, 0.1)} == {"lora_r2", "lora_r3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": ()}, "r is"),
        ({"r": (0,)}, "r is"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"exclude_modules": "lm_head"}, "exclude_modules is 'lm_head'"),
        ({"forward": "sparse"}, "allowed: auto, effective, dense"),
        ({"forward": "effective", "lora_dropout": 0.1}, "needs train_base=True and lora_dropout=0"),
        ({"train_base": False}, "nothing to route"),
        ({"lora_alpha": 0}, "lora_alpha"),
    ],
)
def test_wrong_configurations_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoLFConfig(**change)


def test_targets_follow_names() -> None:
    net = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2), "lm_head": nn.Linear(2, 2)})
    names = [name for name, _ in molf_modules(apply_molf(net, MoLFConfig(r=(1,), target_modules=("q_proj",))))]
    assert names == ["q_proj"]
    merge_molf(net)
    assert [name for name, _ in molf_modules(apply_molf(net, MoLFConfig(r=(1,))))] == ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match="already"):
        apply_molf(net, MoLFConfig(r=(1,)))


def test_models_that_cannot_get_experts_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no module matches"):
        apply_molf(model(), MoLFConfig(r=(1,), target_modules=("nothing",)))

    class Conv1D(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"only nn.Linear.*1 \(Conv1D\); leave them out"):
        apply_molf(nn.Sequential(nn.Linear(2, 2), Conv1D()), MoLFConfig(r=(1,)))
    tied = nn.ModuleDict({"embed": nn.Embedding(4, 3), "out": nn.Linear(3, 4, bias=False)})
    tied["out"].weight = tied["embed"].weight  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="out: the weight is shared"):
        apply_molf(tied, MoLFConfig(r=(1,)))


class OwnForward(nn.Linear):
    """As bitsandbytes and FP8 layers are: an nn.Linear by name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Packed(Tensor):
    """As torchao's weights are: says bfloat16 and holds packed integers."""


def packed(weight: Any) -> nn.Linear:
    linear = nn.Linear(3, 3)
    linear.weight = weight
    return linear


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (OwnForward(3, 3), "OwnForward, weight Parameter of torch.float32"),
        (packed(nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)), "of torch.uint8"),
        (packed(nn.Parameter(torch.zeros(3, 3, dtype=torch.float8_e4m3fn), requires_grad=False)), "float8"),
        (packed(nn.Parameter(torch.zeros(3, 3, dtype=torch.bfloat16).as_subclass(Packed))), "Packed of torch.bfloat16"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "ParametrizedLinear"),
    ],
    ids=["own forward", "uint8", "fp8", "tensor subclass", "weight norm"],
)
def test_a_linear_that_is_no_plain_one_is_refused_and_left_alone(linear: nn.Linear, message: str) -> None:
    net = nn.ModuleDict({"plain": nn.Linear(3, 3), "other": linear})
    with pytest.raises(ValueError, match=f"other .*{message}.*load the model without quantization"):
        apply_molf(net, MoLFConfig(r=(1,)))
    assert net["other"] is linear and type(net["plain"]) is nn.Linear
    apply_molf(net, MoLFConfig(r=(1,), exclude_modules=("other",)))
    assert [name for name, _ in molf_modules(net)] == ["plain"]


def test_torchaos_quantized_linear_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Linear(32, 32))
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig(version=2))
    assert net[0].weight.dtype == torch.float32  # which it is not
    with pytest.raises(ValueError, match="load the model without quantization"):
        apply_molf(net, MoLFConfig(r=(1,)))


def test_a_head_of_any_name_is_no_target_unless_asked_for() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.embed_out = nn.Linear(3, 3), nn.Linear(3, 5)

        def get_output_embeddings(self) -> nn.Module:
            return self.embed_out

    assert [name for name, _ in molf_modules(apply_molf(WithHead(), MoLFConfig(r=(1,))))] == ["body"]
    asked = apply_molf(WithHead(), MoLFConfig(r=(1,), target_modules=("embed_out",)))
    assert [name for name, _ in molf_modules(asked)] == ["embed_out"]


def test_a_frozen_model_gets_a_trained_base() -> None:
    net = apply_molf(model().requires_grad_(False), MoLFConfig(r=(2,)))
    net(X).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_copy_trains_like_the_original_and_apart_from_it() -> None:
    net = disturbed(MoLFConfig(r=(2, 3)))
    other = copy.deepcopy(net)
    for left, right in zip(net.parameters(), other.parameters(), strict=True):
        assert left is not right and torch.equal(left, right)
    other(X).square().sum().backward()
    assert all(p.grad is None for p in net.parameters())
    net(X).square().sum().backward()
    for left, right in zip(net.parameters(), other.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None and torch.equal(left.grad, right.grad)


def causal_lm() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def test_the_peft_adapter_is_the_trained_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = causal_lm()
    base.save_pretrained(tmp_path / "base")
    net = apply_molf(copy.deepcopy(base), MoLFConfig(r=(2, 5), lora_alpha=7, train_base=False))
    optimizer = MoLFAdamW(molf_param_groups(net, 1e-2, 1e-2))
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(3))
    for _ in range(5):
        optimizer.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    logits = net.eval()(ids).logits
    save_peft_adapter(net, tmp_path / "adapter", str(tmp_path / "base"))
    loaded = peft.PeftModel.from_pretrained(base.eval(), tmp_path / "adapter")
    assert loaded.peft_config["default"].r == 7
    torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merge_molf(net)(ids).logits, logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(causal_lm()(ids).logits, logits, atol=1e-3)


def test_a_trained_base_is_no_adapter() -> None:
    with pytest.raises(ValueError, match="merge_molf"):
        molf_to_peft(disturbed(MoLFConfig(r=(2,))), "base")


def test_importing_molf_pulls_in_torch_and_nothing_of_the_pipeline() -> None:
    code = (
        "import sys, molf; "
        "print([m for m in ('transformers','peft','datasets','mlflow','dvc','prefect','pandera','pandas','pydantic') "
        "if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "[]"


def test_weights_and_hooks_survive_a_move_between_dtypes() -> None:
    net = disturbed(MoLFConfig(r=(2,))).float()
    net(X.float()).square().sum().backward()
    grads: list[Tensor | None] = [p.grad for _, module in molf_modules(net) for p in module.lora_A]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)
