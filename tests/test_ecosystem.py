"""Real architectures, transformers' Trainer, accumulation, checkpointing, torch.compile and PEFT, unchanged."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molf import (
    MoLFAdamW,
    MoLFConfig,
    MoLFLinear,
    apply_molf,
    merge_molf,
    molf_modules,
    molf_param_groups,
    save_peft_adapter,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ARCHITECTURES = {
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
}
KINDS = {
    "effective": MoLFConfig(r=(2, 3), lora_alpha=4, forward="effective"),
    "dense": MoLFConfig(r=(2, 3), lora_alpha=4, forward="dense"),
    "frozen": MoLFConfig(r=(2, 3), lora_alpha=4, train_base=False),
}
LAYERS, VOCABULARY = 2, 40
each_kind = pytest.mark.parametrize("kind", KINDS)


def causal_lm(architecture: str, tied: bool = True, layers: int = LAYERS) -> Any:
    """A random model of some thousand parameters."""
    config, model = (getattr(transformers, name) for name in ARCHITECTURES[architecture])
    torch.manual_seed(0)
    return model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.1,
            attn_implementation="eager",
        )
    )


def with_experts(kind: str, architecture: str = "llama", tied: bool = True) -> tuple[Any, MoLFAdamW]:
    model = apply_molf(causal_lm(architecture, tied), KINDS[kind])
    return model, optimizer_of(model)


def optimizer_of(model: nn.Module) -> MoLFAdamW:
    return MoLFAdamW(molf_param_groups(model, lr=1e-2, lora_lr=1e-2))


IDS = torch.randint(3, VOCABULARY, (8, 10), generator=torch.Generator().manual_seed(3))


def train(
    model: Any, optimizer: MoLFAdamW, steps: int, micro_batch: int = 8, clip: float = 1e9
) -> tuple[list[float], list[Tensor]]:
    """A bare loop over the same rows; returns each step's loss and winners."""
    losses, winners = [], []
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for rows in IDS.split(micro_batch):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss * len(rows) / len(IDS)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        assert optimizer.last_routing is not None
        losses.append(total)
        winners.append(optimizer.last_routing.winners)
    return losses, winners


def assert_same_weights(left: nn.Module, right: nn.Module, atol: float = 0.0) -> None:
    ours, theirs = dict(left.named_parameters()), dict(right.named_parameters())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)  # keys included


@each_kind
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_from_start_to_disk(architecture: str, tied: bool, kind: str, tmp_path: Path) -> None:
    base = causal_lm(architecture, tied).eval()
    before = base(IDS).logits
    model, optimizer = with_experts(kind, architecture, tied)
    assert torch.equal(model.eval()(IDS).logits, before)
    blocks = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    blocks += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    targets = [f"model.layers.{layer}.{block}" for layer in range(LAYERS) for block in blocks]
    assert [name for name, _ in molf_modules(model)] == targets
    assert type(model.lm_head) is nn.Linear

    losses, _ = train(model.train(), optimizer, 12, clip=1.0)
    assert losses[-1] < losses[0] - (0.1 if kind == "frozen" else 0.5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.lm_head.weight, base.lm_head.weight) == (kind == "frozen")

    logits = model.eval()(IDS).logits
    assert not torch.allclose(logits, before, atol=1e-2)
    merged = merge_molf(model)
    assert not any(isinstance(module, MoLFLinear) for module in merged.modules())
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=0, atol=2e-5)
    merged.save_pretrained(tmp_path)
    loaded, told = type(merged).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(told.values()), told
    assert torch.equal(loaded.eval()(IDS).logits, merged(IDS).logits)


@each_kind
@pytest.mark.parametrize("architecture", ["gemma3", "qwen2"])
def test_eight_micro_batches_of_one_equal_one_of_eight(architecture: str, kind: str) -> None:
    runs = {}
    for micro_batch in (1, 8):
        model, optimizer = with_experts(kind, architecture)
        runs[micro_batch] = model, *train(model, optimizer, 5, micro_batch, clip=0.5)
    assert runs[1][1] == pytest.approx(runs[8][1], abs=1e-5)
    assert all(torch.equal(one, eight) for one, eight in zip(runs[1][2], runs[8][2], strict=True))
    assert_same_weights(runs[1][0], runs[8][0], atol=1e-4)


def trainer_of(model: Any, optimizer: MoLFAdamW, folder: Path, **arguments: Any) -> Any:
    """transformers' own Trainer; the rows have from 1 to 8 labelled tokens."""
    labels = IDS.clone()
    for row in range(8):
        labels[row, : 9 - row] = -100
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, labels, strict=True)]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 5,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **arguments,
    }
    made = transformers.TrainingArguments(output_dir=str(folder), **settings)
    return transformers.Trainer(model=model, args=made, train_dataset=rows, optimizers=(optimizer, None))


def logged(trainer: Any, name: str) -> list[float]:
    return [float(row[name]) for row in trainer.state.log_history if name in row]


@each_kind
def test_the_trainer_accumulates_exactly_with_rows_of_unlike_lengths(kind: str, tmp_path: Path) -> None:
    runs = {}
    for size in (1, 8):
        model, optimizer = with_experts(kind)
        trainer = trainer_of(
            model, optimizer, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size
        )
        trainer.train()
        runs[size] = model, trainer
    for name in ("loss", "grad_norm"):
        assert len(logged(runs[1][1], name)) == 5
        assert logged(runs[1][1], name) == pytest.approx(logged(runs[8][1], name), rel=1e-4)
    assert_same_weights(runs[1][0], runs[8][0], atol=1e-4)


def test_the_trainer_clips_derived_gradients_as_autograds(tmp_path: Path) -> None:
    """Autograd gives the experts' gradients under the dense forward, a hook under the effective one."""
    runs = {}
    for kind in ("effective", "dense"):
        model, optimizer = with_experts(kind)
        trainer = trainer_of(model, optimizer, tmp_path, gradient_accumulation_steps=1)
        trainer.train()
        runs[kind] = model, trainer
        assert max(logged(trainer, "grad_norm")) > 0.5  # so that clipping did something
        assert any(module.lora_B[0].abs().max() > 0 for _, module in molf_modules(model))
    assert logged(runs["effective"][1], "grad_norm") == pytest.approx(logged(runs["dense"][1], "grad_norm"), rel=1e-4)
    assert_same_weights(merge_molf(runs["effective"][0]), merge_molf(runs["dense"][0]), atol=1e-4)


@each_kind
def test_the_trainers_own_checkpoints_resume_exactly(kind: str, tmp_path: Path) -> None:
    whole, optimizer = with_experts(kind)
    trainer_of(whole, optimizer, tmp_path / "whole", lr_scheduler_type="linear").train()
    first, optimizer = with_experts(kind)
    settings = {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 3}
    trainer_of(first, optimizer, tmp_path / "cut", **settings).train()
    shutil.rmtree(tmp_path / "cut/checkpoint-5")
    resumed, optimizer = with_experts(kind)
    trainer = trainer_of(resumed, optimizer, tmp_path / "cut", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-3"))
    assert_same_weights(resumed, whole)


def test_the_trainer_may_build_the_optimizer_itself(tmp_path: Path) -> None:
    model, optimizer = with_experts("effective")
    trainer_of(model, optimizer, tmp_path).train()
    other, _ = with_experts("effective")
    given = trainer_of(other, optimizer, tmp_path)
    groups = molf_param_groups(other, lr=1e-2, lora_lr=1e-2)
    trainer = transformers.Trainer(
        model=other,
        args=given.args,
        train_dataset=given.train_dataset,
        optimizer_cls_and_kwargs=(MoLFAdamW, {"params": groups}),
    )
    trainer.train()
    assert_same_weights(other, model)


@each_kind
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["gemma3", "qwen3"])
def test_gradient_checkpointing_changes_nothing(architecture: str, reentrant: bool, kind: str) -> None:
    plain, optimizer = with_experts(kind, architecture)
    losses, _ = train(plain.train(), optimizer, 4)
    model, optimizer = with_experts(kind, architecture)
    with warnings.catch_warnings():  # a deprecated name from transformers 5.23 on, the only one before
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    assert train(model.train(), optimizer, 4)[0] == losses
    assert len(calls) == 8, "each layer runs once more in the backward"
    assert_same_weights(model, plain)


@pytest.mark.parametrize("kind", ["effective", "dense"])  # a frozen base runs the dense forward
@pytest.mark.parametrize(
    ("order", "backend"),
    [
        ("apply, compile", "aot_eager"),
        ("compile, run, apply", "eager"),
        pytest.param("apply, compile", "inductor", marks=pytest.mark.acceptance),  # minutes on a busy machine
    ],
)
def test_a_compiled_model_trains_like_an_eager_one(order: str, backend: str, kind: str) -> None:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch's inductor needs a C++ compiler on a CPU")
    eager = apply_molf(causal_lm("llama", layers=1), KINDS[kind])
    losses, _ = train(eager, optimizer_of(eager), 6)
    torch._dynamo.reset()
    model = causal_lm("llama", layers=1)
    if order == "apply, compile":
        compiled: Any = torch.compile(apply_molf(model, KINDS[kind]), backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
        compiled(input_ids=IDS, labels=IDS, use_cache=False)
        compiled = apply_molf(compiled, KINDS[kind])
    optimizer = optimizer_of(compiled)
    again, _ = train(compiled, optimizer, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        rest, _ = train(compiled, optimizer, 4)
    assert [*again, *rest] == pytest.approx(losses, abs=1e-4)
    assert optimizer.last_routing is not None
    assert optimizer.last_routing.modules == tuple(name for name, _ in molf_modules(eager))
    logits = compiled(input_ids=IDS, use_cache=False).logits
    merged = merge_molf(compiled)
    assert molf_modules(merged) == []
    torch.testing.assert_close(merged(input_ids=IDS, use_cache=False).logits, logits, rtol=0, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("ranks", [(2, 5), (3, 3)], ids=str)
@pytest.mark.parametrize("architecture", ["gemma3", "qwen3"])
def test_plain_peft_loads_the_adapter(architecture: str, ranks: tuple[int, ...], tmp_path: Path) -> None:
    base = causal_lm(architecture)
    base.save_pretrained(tmp_path / "base")
    model = apply_molf(copy.deepcopy(base), MoLFConfig(r=ranks, lora_alpha=7, train_base=False))
    train(model, optimizer_of(model), 5)
    logits = model.eval()(IDS).logits
    save_peft_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    assert not torch.allclose(fresh(IDS).logits, logits, atol=1e-2)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits, logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(IDS).logits, logits, rtol=0, atol=2e-5)


def test_an_adapter_of_a_compiled_model_has_the_models_names(tmp_path: Path) -> None:
    base = causal_lm("llama")
    compiled: Any = torch.compile(copy.deepcopy(base), backend="eager")
    apply_molf(compiled, KINDS["frozen"])
    train(compiled, optimizer_of(compiled), 3)
    save_peft_adapter(compiled, tmp_path, "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, compiled.eval()(IDS).logits, rtol=0, atol=2e-5)


def test_gpt2_is_refused_with_what_to_do() -> None:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"c_attn \(Conv1D\).*exclude_modules, or take a model made of nn.Linear"):
        apply_molf(transformers.GPT2LMHeadModel(config), MoLFConfig(r=(2,)))
