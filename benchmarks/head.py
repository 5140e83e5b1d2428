"""Training tokens a second with the head on the supervised positions only, beside the head on every position."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import real
from benchmarks.measure import Result, Row, Settings, Skipped, side_by_side
from molf.batches import Collator, encode_examples
from molf.encoding import IGNORED
from molf.methods.sample import completion_loss

# Examples in a batch, and how many times as many tokens a second must go through.
TASKS: dict[str, tuple[int, float | None]] = {"fact": (32, 1.5), "med": (8, None)}


def supervised_head(settings: Settings) -> Result:
    """Forward and backward of full fine-tuning on Gemma 3 270M, one real batch of each task."""
    if settings.gemma is None:
        raise Skipped("Gemma 3 270M is not here: `make gemma` installs it, or --gemma names its folder")
    from molf.models import load_model, load_tokenizer

    frames = {task: real.rows(task, settings.shared) for task in TASKS}
    tokenizer, device = load_tokenizer(settings.gemma), settings.device
    model: Any = torch.nn.Module.to(load_model(settings.gemma, torch.float32), device.type).train()
    result = Result()
    for task, (size, limit) in TASKS.items():
        size = 2 if settings.quick else size
        examples = encode_examples(tokenizer, frames[task], max_length=64)
        inputs = Collator(tokenizer.pad_token_id)(examples.rows[:size])
        inputs = {name: tensor.to(device.type) for name, tensor in inputs.items()}

        def step(loss: Any, inputs: dict[str, Tensor] = inputs) -> Tensor:
            with device.autocast():
                value: Tensor = loss(model, inputs)
            value.backward()
            model.zero_grad()
            return value.detach()

        sides = {"supervised": lambda s=step: s(completion_loss), "every": lambda s=step: s(every_position_loss)}
        # That both are the same loss is what makes the comparison one.
        torch.testing.assert_close(sides["supervised"](), sides["every"](), rtol=1e-2 if device.cuda else 1e-4, atol=0)
        seconds = side_by_side(sides, device, settings.rounds, warmup=1)
        tokens = int(inputs["attention_mask"].sum())
        speeds = {name: [tokens / value for value in values] for name, values in seconds.items()}
        labelled = int((inputs["labels"] != IGNORED).sum())
        what = f"{task} training, head on {labelled} supervised of {tokens} tokens"
        against = f"head on every position (Gemma 3 270M, batch of {size})"
        result.rows.append(Row(what, against, "tokens/s", speeds["supervised"], speeds["every"], limit, at_least=True))
    return result


def every_position_loss(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The same loss from logits of all positions."""
    fields = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**fields, use_cache=False).logits[:, :-1]
    targets = inputs["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED)
