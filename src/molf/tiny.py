"""The `tiny` base model: a small Qwen2 with a tokenizer of its own, pretrained on generated text."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from molf import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
BATCH, LENGTH = 8, 128  # sequences, and tokens of each, in one step
RATE = 1e-3


def build(
    directory: Path, *, seed: int, layers: int, width: int, heads: int, vocabulary: int, steps: int, progress: bool
) -> dict[str, Any]:
    """Trains tokenizer and model and writes both as a transformers checkpoint (safetensors, float32).

    Args:
        directory: Where to write.
        seed: Of the text, the weights and the order.
        layers: Transformer blocks.
        width: Of the residual stream; a multiple of `heads`.
        heads: Attention heads, half as many for keys and values.
        vocabulary: Tokens, special ones included.
        steps: Of `BATCH` x `LENGTH` tokens.
        progress: Whether to show a bar where a terminal is.

    Returns:
        parameters, tokens, steps, final_loss (nats a token, mean of the last tenth), seconds.
    """
    from tqdm.auto import tqdm
    from transformers import Qwen2ForCausalLM

    started = time.perf_counter()
    documents = generate.pretraining_text(seed)
    tokenizer = train_tokenizer(["".join(document) for document in documents], vocabulary)
    torch.manual_seed(seed)
    config = architecture(layers, width, heads, len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    model = Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    ids, labels = pack(tokenizer, documents)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    bar = tqdm(total=steps, desc="pretraining tiny", unit="step", disable=None if progress else True)
    while len(losses) < steps:
        for rows in torch.randperm(len(ids), generator=generator).split(BATCH):
            if len(losses) == steps:
                break
            rate = RATE * _schedule(len(losses), steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = model(input_ids=ids[rows], labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    bar.close()
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    last = losses[-max(1, steps // 10) :]
    return {
        "parameters": model.num_parameters(),
        "tokens": steps * BATCH * LENGTH,
        "steps": steps,
        "final_loss": sum(last) / len(last),
        "seconds": time.perf_counter() - started,
    }


def architecture(layers: int, width: int, heads: int, vocabulary: int) -> "Qwen2Config":
    """The model's shape, as transformers describes it; two heads share their keys and values."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def train_tokenizer(documents: list[str], vocabulary: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer with BOS, EOS and PAD, trained on the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def pack(tokenizer: "PreTrainedTokenizerBase", documents: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All documents end to end, each as BOS, context, text, EOS.

    Returns:
        Token ids and labels, (rows, LENGTH) each; the labels of contexts are -100.

    Raises:
        ValueError: The documents fill no row.
    """
    contexts, texts = (
        tokenizer(list(part), add_special_tokens=False)["input_ids"] for part in zip(*documents, strict=True)
    )
    ids: list[int] = []
    labels: list[int] = []
    for context, text in zip(contexts, texts, strict=True):
        learnt = [*text, tokenizer.eos_token_id]
        ids += [tokenizer.bos_token_id, *context, *learnt]
        labels += [-100] * (1 + len(context)) + learnt
    rows = len(ids) // LENGTH
    if not rows:
        raise ValueError(f"{len(ids)} tokens of text fill no row of {LENGTH}")
    return (
        torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH),
        torch.tensor(labels[: rows * LENGTH]).view(rows, LENGTH),
    )


def _schedule(step: int, steps: int) -> float:
    """Warm-up over a twentieth of the steps, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
