"""EPD's first choices: which expert wins where in a routed method's first optimizer steps, on a model of their own."""

from pathlib import Path
from typing import Any

import torch

from molf.batches import Collator, Examples, SeededBatches, SeededOrder, total_steps
from molf.config import Training
from molf.encoding import IGNORED
from molf.method_blocks import MethodBlock
from molf.methods import METHODS
from molf.methods.sample import Sample, completion_loss
from molf.models import load_model, to_device, weight_dtype
from molf.routing import RoutingRecorder
from molf.training import warmup_steps


def first_choices(
    base: Path, block: MethodBlock, training: Training, examples: Examples, pad_id: int, seed: int, steps: int
) -> dict[str, Any]:
    """Runs a method's own first steps, warm-up included, and says who won.

    The rates of a warm-up are small, so the model hardly moves; the first step of one has rate 0, where every score is
    0, and does not count.

    Args:
        base: Folder of the base model.
        block: Of a method that routes.
        training: The cell's budget.
        examples: Of the task.
        pad_id: Of the tokenizer.
        seed: Of experts and order.
        steps: That count.

    Returns:
        `RoutingRecorder.summary`: experts, steps, share (by expert), share_by_module, one_sided.

    Raises:
        ValueError: The method does not fit the model.
    """
    from transformers import get_scheduler, set_seed

    method = METHODS[block.kind]
    set_seed(seed)
    model = load_model(base, weight_dtype(training.dtype))
    rows, micro_batches = training.micro_batches()
    batches = SeededBatches(SeededOrder(len(examples), seed), rows)
    accumulation, whole = micro_batches * training.processes, total_steps(training, len(examples))
    sample = Sample(batches, examples.rows, Collator(pad_id), model, accumulation, whole)
    model = method.prepare(model, block, sample)
    to_device(model, training.threads)
    optimizer = method.optimizer(model, block, training)
    name = training.schedule if training.schedule != "constant" else "constant_with_warmup"
    scheduler = get_scheduler(name, optimizer, warmup_steps(training, len(examples)), whole)
    wanted = min(steps + (training.warmup > 0), whole)
    waiting = sample.batches(wanted * accumulation)
    halved = model.device.type == "cuda" and training.dtype == "auto"
    recorder = RoutingRecorder()
    for step in range(wanted):
        chosen = waiting[step * accumulation : (step + 1) * accumulation]
        items = sum(int((batch["labels"] != IGNORED).sum()) for batch in chosen)
        for batch in chosen:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=halved):
                loss = completion_loss(model, batch, items)
            loss.backward()  # type: ignore[no-untyped-call]
        method.before_clip(model)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], training.max_grad_norm)
        optimizer.step()
        recorder.record(optimizer.last_routing)
        scheduler.step()
        optimizer.zero_grad()
    return recorder.summary()
