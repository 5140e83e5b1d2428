"""A cell's training: transformers' Trainer, the head on supervised positions only, a record of each step."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pandas as pd
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from molf import collective, estimate, meter, sharding
from molf.batches import (
    Collator,
    Examples,
    SeededBatches,
    SeededOrder,
    encode_examples,
    optimizer_steps,
    total_steps,
)
from molf.config import Training
from molf.encoding import IGNORED
from molf.errors import Diverged, RunError, UserError
from molf.method_blocks import MethodBlock
from molf.methods import METHODS, optional
from molf.methods.sample import Sample, completion_loss
from molf.models import autocast, folder_bytes, load_model, load_tokenizer, parameter_counts, weight_dtype
from molf.resume import Keeper, ResumableTrainer
from molf.routing import RoutingError, RoutingRecorder


class Listener(Protocol):
    """Hears of each step while it happens; MLflow's live run is one."""

    def log(self, rows: list[dict[str, float]]) -> None: ...


@dataclass
class Outcome:
    """What a training leaves: a row a step, the routing's rows, and the summary."""

    history: pd.DataFrame
    routing: pd.DataFrame | None
    summary: dict[str, Any]


class CellTrainer(ResumableTrainer):
    """The Trainer, told what a method wants before gradients are clipped; no step is made of what is no number."""

    # The loss is divided by the step's labelled tokens, accumulation included, and not once more by the Trainer. Two
    # names: transformers 5.23 asks the second, earlier ones the first.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        method: ModuleType,
        order: SeededOrder,
        optimizer: torch.optim.Optimizer,
        training: Training,
        shared: str | None,
        **arguments: Any,
    ) -> None:
        self.shared = shared
        super().__init__(**arguments)
        self.method, self.order, self.penalty = method, order, optional(method, "penalty")
        self.batches = SeededBatches(order, self.args.train_batch_size, collective.rank(), training.processes)
        self.optimizer = optimizer  # here, as the Trainer's own argument is refused under FSDP
        self.model_accepts_loss_kwargs = True
        self.step_tokens = 0
        self.losses: list[torch.Tensor] = []  # of the step's micro-batches

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.shared == "fsdp":
            sharding.use_fsdp(self.accelerator)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not prepared by accelerate, which would share the batches out a second time.
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if self.shared is None or (inputs["labels"] != IGNORED).any():  # a row that stands for no example is no work
            self.step_tokens += int(inputs["attention_mask"].sum())
        # accelerate puts autocast around the forward itself, but not under FSDP.
        with self.accelerator.autocast() if self.shared == "fsdp" else contextlib.nullcontext():
            loss = completion_loss(model, inputs, num_items_in_batch)
        if self.penalty is not None and (penalty := self.penalty(self.model)) is not None:
            # By its share of the step's labels, so that all micro-batches of all processes together add it once; in the
            # gradient alone, so that losses of all methods compare.
            share = (inputs["labels"] != IGNORED).sum() / num_items_in_batch
            loss = loss + share * (penalty - penalty.detach())
        # The items are those of all processes, and gradients are averaged over these, not summed.
        return loss * self.accelerator.num_processes

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        if self.accelerator.sync_gradients:
            self.method.before_clip(self.model)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self.losses = [float(loss) for loss in self.losses], []
        finite = math.isfinite(sum(losses)) and math.isfinite(float(norm))
        if collective.anyone(int(not finite)):  # which all processes must say together
            loss = sum(collective.gathered(sum(losses))) / collective.world_size()
            rows = [name for names in collective.gathered(self.bad_rows(losses)) for name in names]
            raise Diverged(
                f"step {self.state.global_step + 1}: loss {loss}, gradient norm {float(norm)}; the step was not "
                f"made. Its rows: {', '.join(rows or self.step_rows())}. Look at them, or lower the learning rate"
            )
        return norm

    def step_rows(self) -> list[str]:
        """Names of the examples of the step under way, over all processes."""
        rows, accumulation = self.args.train_batch_size * self.args.world_size, self.args.gradient_accumulation_steps
        epoch, step = divmod(self.state.global_step, optimizer_steps(len(self.order), rows, accumulation))
        indices = self.order.indices(epoch)[step * rows * accumulation :][: rows * accumulation]
        return [self.train_dataset.names[index] for index in indices]  # type: ignore[union-attr]

    def bad_rows(self, losses: list[float]) -> list[str]:
        """Names of those in this process's micro-batches whose loss is no number.

        Args:
            losses: Of this process's micro-batches of the step.
        """
        rows, names = self.args.train_batch_size, self.step_rows()
        shares = (i * self.args.world_size + collective.rank() for i, x in enumerate(losses) if not math.isfinite(x))
        return [name for share in shares for name in names[share * rows : (share + 1) * rows]]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.batches.set_epoch(int(self.state.epoch or 0))  # for versions that do not reach below a wrapper


class AfterStep(TrainerCallback):
    """Calls a method's `after_step`."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.call(model, state.global_step + 1, state.max_steps)


class Bar(ProgressCallback):
    """The Trainer's progress bar with the loss beside it."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class Recorder(TrainerCallback):
    """Keeps a row a step and every step's routing; its clock stands still while a checkpoint is written."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, routing: RoutingRecorder | None, listener: Listener | None
    ) -> None:
        self.optimizer, self.routing, self.listener = optimizer, routing, listener
        self.trainer: CellTrainer | None = None
        self.rows: list[dict[str, float]] = []
        self.started = self.last = 0.0
        self.before = 0.0  # seconds of training before this process
        self.meter = meter.here()
        self.peak = 0
        self.rate = 0.0

    @property
    def seconds(self) -> float:
        """Of training so far, in all processes that one after the other did it; what a kill lost is not in it."""
        return time.perf_counter() - self.started + self.before

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rows": self.rows, "seconds": self.seconds, "peak": self.peak, "meter": self.meter.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint; the listener hears what it may have missed."""
        self.rows, self.before, self.peak = state["rows"], state["seconds"], state["peak"]
        self.meter.load_state_dict(state["meter"])
        if self.listener is not None:
            self.listener.log(self.rows)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = self.last = time.perf_counter()
        self.meter.start()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.perf_counter()
        self.started, self.last = self.started + now - self.last, now
        self.meter.start()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.rate = float(self.optimizer.param_groups[0]["lr"])

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.routing is not None:
            self.routing.record(self.optimizer.last_routing)  # type: ignore[attr-defined]

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs or self.trainer is None:
            return
        now = time.perf_counter()
        self.meter.look()
        self.peak = max(self.peak, collective.anyone(peak_memory()))
        tokens, self.trainer.step_tokens = collective.total(self.trainer.step_tokens), 0
        row = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "learning_rate": self.rate,
            "grad_norm": float(logs["grad_norm"]),
            "tokens": tokens,
            "tokens_per_second": tokens / max(now - self.last, 1e-9),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak,
        }
        self.last = now
        self.rows.append(row)
        if self.listener is not None:
            self.listener.log([row])


def train(
    base: Path,
    examples_frame: pd.DataFrame,
    block: MethodBlock,
    training: Training,
    seed: int,
    weights: Path,
    scratch: Path,
    listener: Listener | None = None,
    keeper: Keeper | None = None,
) -> Outcome:
    """Trains one cell and writes its weights.

    Args:
        base: Folder of the base model.
        examples_frame: Rows as `encode_examples` takes them.
        block: The method's block of params.yaml.
        training: The budget, the task's overrides included.
        seed: Of the adapters' start, dropout and the order of examples.
        weights: Folder for weights or adapter; must not exist.
        scratch: Folder for the Trainer's own files.
        listener: Hears each step's row.
        keeper: Of checkpoints, from the last of which the training goes on; None: none is written.

    Returns:
        History, routing record (None where nothing is routed) and summary.

    Raises:
        UserError: No example fits in `max_length`.
        Diverged: The loss or the gradients are not finite.
        RunError: The method did not do what it claims.
        Interrupted: After SIGINT or SIGTERM in its steps, with a checkpoint.
    """
    if training.processes != collective.world_size():
        raise RuntimeError(f"training.processes is {training.processes}; {collective.world_size()} are here")
    if training.threads:
        torch.set_num_threads(training.threads)
    cuda = torch.cuda.is_available()
    method = METHODS[block.kind]
    tokenizer = load_tokenizer(base)
    examples = encode_examples(tokenizer, examples_frame, training.max_length)
    set_seed(seed)
    model = load_model(base, weight_dtype(training.dtype))
    rows, micro_batches = training.micro_batches()
    order, collator = SeededOrder(len(examples), seed), Collator(tokenizer.pad_token_id)
    accumulation = micro_batches * training.processes
    steps = total_steps(training, len(examples))
    sample = Sample(SeededBatches(order, rows), examples.rows, collator, model, accumulation, steps)
    reset_peak_memory()  # what a method looks at before the first step needs its memory too
    try:
        model = method.prepare(model, block, sample)
        optimizer = method.optimizer(model, block, training)
    except ValueError as error:
        raise UserError(f"method {block.kind} does not fit this model: {error}") from None
    trained, total = parameter_counts(model)
    routing = RoutingRecorder() if method.routed(block) else None
    recorder = Recorder(optimizer, routing, listener)
    shared = sharding.choose(base, block, training, estimate.Shape(rows, *examples.longest()))
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=micro_batches,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        lr_scheduler_type=training.schedule if training.schedule != "constant" else "constant_with_warmup",
        warmup_steps=warmup_steps(training, len(examples)),
        max_grad_norm=training.max_grad_norm,
        bf16=autocast(training.dtype),
        use_cpu=not cuda,
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty() or collective.rank() > 0,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        average_tokens_across_devices=True,
        ddp_backend=("nccl" if cuda else "gloo") if shared else None,
        # Every trained parameter but the derived ones gets a gradient in each backward; buffers are constant.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        # Shards' gradients are reduced after each micro-batch: whole ones, kept until the last, would need the memory.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": shared == "fsdp"}},
    )
    # One device a cell: with more the Trainer would wrap the model in DataParallel and multiply the batch by them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    sharding.require_same(model.parameters(), "weights at the start")
    trainer = CellTrainer(
        method,
        order,
        optimizer,
        training,
        shared,
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=collator,
        callbacks=[recorder, *([AfterStep(after_step)] if (after_step := optional(method, "after_step")) else [])],
    )
    if collective.rank() > 0:
        torch.manual_seed(seed + 1_000_003 * collective.rank())  # else all would drop out the same positions
    # The Trainer's own callbacks print a dict a step; the bar shows the loss instead.
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar)
    recorder.trainer = trainer
    stateful, proof = optional(method, "stateful"), optional(method, "proof")
    own = {f"method.{name}": part for name, part in stateful(model).items()} if stateful else {}
    try:
        if keeper is None:
            trainer.train()
        else:
            keeper.train(trainer, {"recorder": recorder} | ({"routing": routing} if routing else {}) | own)
        seconds = recorder.seconds
        recorder.meter.stop()
        record = pd.DataFrame(routing.columns()) if routing is not None else None
        routed = routing.summary() if routing is not None else None
    except RoutingError as error:
        raise RunError(f"routing: {error}") from None
    peaks = collective.gathered(peak_memory())
    history = pd.DataFrame(recorder.rows)
    if not (len(history) and (history["learning_rate"] > 0).any()):
        raise RunError(
            f"{len(history)} optimizer steps, none with a learning rate above 0: nothing was trained; "
            "give the task more rows, raise training.epochs, or set training.warmup to 0"
        )
    if routing is not None:
        sharding.require_same([routing.winners()], "winners")
    if shared == "ddp":
        sharding.require_same(model.parameters(), "weights at the end")
    adaptation = proof(model, optimizer, block) if proof else None
    said = (adaptation or {}).pop("warnings", [])
    # A method that looks at data before the first step pays for that as for its steps.
    looked = (adaptation or {}).get("seconds", 0.0)
    whole = sharding.whole_model(model, method, block, base, training) if shared == "fsdp" else model
    if collective.rank() == 0:
        try:
            method.save(whole, weights, base)
        except SafetensorError as error:  # a full disk among others
            raise RunError(f"the weights could not be written: {error}") from None
        tokenizer.save_pretrained(weights)
    collective.barrier()
    summary = {
        "method_kind": block.kind,
        "steps": int(history["step"].iloc[-1]),
        "final_loss": float(history["loss"].tail(max(1, len(history) // 10)).mean()),
        "train_seconds": seconds + looked,
        "tokens_per_second": float(history["tokens"].sum() / seconds),
        **recorder.meter.totals().summary(),
        "peak_memory_bytes": max(recorder.peak, *peaks),
        "peak_memory_bytes_of_all": sum(peaks),
        "processes": training.processes,
        "hosts": collective.hosts(),
        "sharding": shared,
        "trained_parameters": trained,
        "total_parameters": total,
        "weights_bytes": folder_bytes(weights),
        "examples": len(examples),
        "dropped_too_long": examples.dropped_too_long,
        "order_hash": order.digest(math.ceil(trainer.state.epoch or 0)),
        "resumed_at_steps": keeper.resumed_at if keeper else [],
        "routing": routed,
        "adaptation": adaptation,
        "warnings": [*said, *_warnings(routed, examples, len(keeper.hardware) if keeper else 1)],
    }
    return Outcome(history, record, summary)


def warmup_steps(training: Training, examples: int) -> int:
    """Optimizer steps of the warm-up: the share `training.warmup` of all, rounded up."""
    return math.ceil(training.warmup * total_steps(training, examples))


def reset_peak_memory() -> None:
    """Makes `peak_memory` count from here, where the system can (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # then the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak bytes: of the GPU's allocations where there is one, else of this process's resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _warnings(routing: dict[str, Any] | None, examples: Examples, machines: int) -> list[str]:
    warnings = list(examples.warnings)
    if routing is not None and routing["one_sided"]:
        winner = max(routing["share"], key=routing["share"].get)
        warnings.append(f"one-sided routing: {winner} won every module in every step, so nothing was mixed")
    if examples.dropped_too_long:
        warnings.append(f"{examples.dropped_too_long} examples were longer than training.max_length and left out")
    if machines > 1:
        warnings.append(
            f"time and memory are of {machines} machines, or numbers of processes, threads or micro-batches, one after "
            "the other: they compare with no other cell's"
        )
    return warnings
