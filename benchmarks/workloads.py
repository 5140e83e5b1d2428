"""The models that are trained here, and one whole training step of each method."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.device import Device
from molf import MoLFLinear, RoutingRecorder, presets
from molf.config import Training
from molf.method_blocks import FftMethod, LoraMethod, MethodBlock, MolfEfficientMethod, MolfMethod
from molf.methods import METHODS

RANK = 128
PAIR = (32, 128)
CLIP = 1.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a random model."""

    label: str
    architecture: str  # of transformers: qwen2 or llama
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "qwen2-28m": Shape("Qwen2-like", "qwen2", 8192, 512, 1408, 8, 8, 4),
    "llama-1b": Shape("Llama-like", "llama", 32768, 2048, 8192, 16, 32, 8),
    "tiny": Shape("tiny Qwen2-like", "qwen2", 256, 64, 96, 2, 2, 1),
}


def build(name: str, gemma: Path | None = None) -> nn.Module:
    """A model in float32: one of SHAPES, random and with a tied head, or `gemma3-270m` from its folder."""
    if name == "gemma3-270m":
        from molf.models import load_model

        assert gemma is not None  # callers look for it first
        return load_model(gemma, torch.float32)
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    shape = SHAPES[name]
    config = (Qwen2Config if shape.architecture == "qwen2" else LlamaConfig)(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def describe(name: str, model: nn.Module) -> str:
    """`Qwen2-like, 28 M parameters`."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    label = SHAPES[name].label if name in SHAPES else name
    return f"{label}, {millions:,.0f} M parameters" if millions >= 1 else f"{label}, {millions:.2f} M parameters"


def method_block(kind: str) -> MethodBlock:
    """The method's block: `fft`, `molf` (effective forward), `molf-dense` (the published way), `molf-e`, `lora`.

    LoRA's rank is the sum of MoLF-Efficient's, its alpha such that the scale s is of the same size.
    """
    adapter: dict[str, Any] = {"use_rslora": True, "lora_dropout": 0.0, "exclude_modules": ["lm_head"]}
    routed: dict[str, Any] = adapter | {"lora_alpha": 32.0, "top_k": 1, "score": "epd"}
    molf: dict[str, Any] = routed | {"r": [RANK], "learning_rate": 1e-5, "lora_learning_rate": 1e-5}
    molf |= {"weight_decay": 0.1, "lora_weight_decay": 0.01}
    match kind:
        case "fft":
            return FftMethod(kind="fft", learning_rate=1e-5, weight_decay=0.1)
        case "molf":
            return MolfMethod(kind="molf", forward="effective", **molf)
        case "molf-dense":
            return MolfMethod(kind="molf", forward="dense", **molf)
        case "molf-e":
            return MolfEfficientMethod(kind="molf-e", r=list(PAIR), learning_rate=1e-5, weight_decay=0.01, **routed)
        case "lora":
            return LoraMethod(
                kind="lora", r=sum(PAIR), lora_alpha=32.0, learning_rate=1e-5, weight_decay=0.01, **adapter
            )
    raise ValueError(f"{kind!r} is no method that is measured here")


def training_block(**changes: Any) -> Training:
    """The default preset's budget with `changes`."""
    return Training.model_validate(presets.differences(presets.DEFAULT)["training"] | changes)


class Trainee:
    """A model under a method of the pipeline, set up by the pipeline's own functions, and its whole training step.

    Args:
        kind: As in `method_block`.
        model: Becomes the trainee's own.
        device: Where it trains.
    """

    def __init__(self, kind: str, model: nn.Module, device: Device) -> None:
        block = method_block(kind)
        self.method = METHODS[block.kind]
        self.device = device
        self.model: Any = self.method.prepare(model.to(device.type), block, None).train()
        self.optimizer = self.method.optimizer(self.model, block, training_block())
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.recorder = RoutingRecorder() if self.method.routed(block) else None

    def step(self, ids: Tensor, lap: Callable[[str], None] = lambda phase: None, record: bool = True) -> None:
        """Forward, backward, the experts' gradients, clipping, the update, and the record of its routing.

        Args:
            ids: (sequences, length), each token but the first a target.
            lap: Called after each phase with its name.
            record: Whether the routing is recorded.
        """
        with self.device.autocast():
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        lap("forward and backward")
        self.method.before_clip(self.model)
        lap("deriving")
        nn.utils.clip_grad_norm_(self.params, CLIP)
        lap("clipping")
        self.optimizer.step()
        lap("optimizer step")
        self.optimizer.zero_grad()
        if record and self.recorder is not None:
            self.recorder.record(self.optimizer.last_routing)
        lap("zeroing and record")

    def expert_bytes(self) -> int:
        """Bytes of A, B and their two float32 moments over all layers with experts."""
        layers = [m for m in self.model.modules() if isinstance(m, MoLFLinear)]
        factors = [p for layer in layers for p in (*layer.lora_A, *layer.lora_B)]
        return sum(p.numel() * (p.element_size() + 8) for p in factors)


def batch(model: nn.Module, sequences: int, length: int, device: Device) -> Tensor:
    """Random token ids, the same each time."""
    vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (sequences, length), generator=generator).to(device.type)


def step_flops(model: nn.Module, sequences: int, length: int) -> float:
    """FLOPs of one training step of the model itself: 6 N T + 6 L w S T.

    N counts the weights of all matrix products (the linears and the head, tied or not; no embedding look-up), T the
    tokens, L the layers, w heads times head width, S the length; the causal half of the attention is not counted.
    """
    config: Any = model.config
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    products = sum(linears.values()) + head.weight.numel()  # type: ignore[union-attr, operator]
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    tokens = sequences * length
    return 6.0 * products * tokens + 6.0 * config.num_hidden_layers * width * length * tokens
