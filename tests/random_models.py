"""Random models of several architectures, a tokenizer and rows of every kind to ask them."""

from typing import Any

import pandas as pd
import torch

from molf import generate, tiny
from molf.blocks import ChoiceOptions, CompletionOptions, MedOptions, NoOptions, SqlOptions
from molf.tasks import TASKS
from tests.tasks.helpers import with_ids

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.3,  # so that a random model prefers something
}
WINDOW = 8  # of Gemma's local layers: tokens, fewer than the prompts have


def plain_rows(kind: str, count: int) -> pd.DataFrame:
    """Prepared rows of a kind, with prompts of very unlike length."""
    options: Any
    if kind in ("sql", "med", "fact"):
        raw = pd.DataFrame(generate.rows(kind, {"test": count}, 3)["test"])
        options = {"sql": SqlOptions(must_run=True), "med": MedOptions(first_option=1), "fact": NoOptions()}[kind]
    elif kind == "choice":
        raw = pd.DataFrame(
            {
                "question": ["Which? " * (1 + 7 * (i % 4)) + str(i) for i in range(count)],
                "options": [["red", "blue", "green", "white", "black"][: 2 + i % 4] for i in range(count)],
                "answer": ["A"] * count,
            }
        )
        options = ChoiceOptions(question="question", options="options", answer="answer", answer_is="letter")
    else:
        lengths = [1 + 11 * (i % 6) for i in range(count)]
        raw = pd.DataFrame({"q": [f"{i} birds " * n for i, n in enumerate(lengths)], "a": ["some"] * count})
        options = CompletionOptions(prompt="q", completion="a")
    task = TASKS[kind]
    return with_ids(task.to_examples(task.normalise(raw, options), options))


def own_tokenizer(letters: int = 1) -> Any:
    """A tokenizer of the rows' language.

    Args:
        letters: How often it read " A" to " E"; often enough, and each becomes one token, else two with the same first.
    """
    texts = [text for kind in ("sql", "med", "fact", "choice") for text in plain_rows(kind, 30)["prompt"]]
    return tiny.train_tokenizer([*texts, " A B C D E" * letters], 380)


def network(name: str, tokenizer: Any) -> Any:
    """A random model."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, Lfm2Config, LlamaConfig, Qwen2Config

    shape = SHAPE | {"vocab_size": len(tokenizer)}
    configs = {
        "llama": lambda: LlamaConfig(**shape),
        "qwen2": lambda: Qwen2Config(**shape),
        "gemma3": lambda: Gemma3TextConfig(
            **shape,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        ),
        # Not all of its layers are attention: a convolution keeps states of its own.
        "lfm2": lambda: Lfm2Config(**shape, layer_types=["conv", "full_attention"]),
        "bfloat16": lambda: LlamaConfig(**shape),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[name](), dtype=torch.float32)
    return model.to(torch.bfloat16) if name == "bfloat16" else model
