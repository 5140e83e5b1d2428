"""What of a training must be kept so that it goes on as if nothing had happened, and how the Trainer gets it back."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from molf.checkpoint import Checkpoint, CheckpointError, Checkpoints, TensorFiles, part
from molf.collective import anyone, rank
from molf.errors import Interrupted

# Of `training`: what a checkpoint may differ in and still be of the same training.
NOT_OF_THE_TRAINING = ("threads", "processes", "sharding", "keep")


def identity(
    config: Mapping[str, Any], data: str, model: str, code: str, versions: Mapping[str, str | None], autocast: bool
) -> dict[str, Any]:
    """All that determines a training, as plain data.

    Args:
        config: `cell_config`'s.
        data: Hash of the prepared data.
        model: Hash of the base model.
        code: Hash of the train stage's modules.
        versions: Of the libraries.
        autocast: What `training.dtype` means here: whether the training computes in bfloat16 on float32 weights.
    """
    budget = {key: value for key, value in config["training"].items() if key not in NOT_OF_THE_TRAINING}
    inputs = {"data": data, "model": model, "code": code, "versions": dict(versions), "autocast": autocast}
    return {**config, "training": budget, **inputs}


class Stateful(Protocol):
    """Keeps something over a training that a checkpoint must hold: plain data and tensors, alike in all processes."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# --- plain data and tensors ------------------------------------------------------------------------------------------


def split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as plain JSON: its tensors go into `tensors`, each under its path; tuples and other keys than text stay.

    Raises:
        TypeError: Something is neither plain nor a tensor.
    """
    match value:
        case Tensor():
            tensors[name] = value
            return {"$tensor": name}
        case dict():
            pairs = [(key, split(item, f"{name}.{key}", tensors)) for key, item in value.items()]
            return dict(pairs) if all(isinstance(key, str) for key in value) else {"$dict": [list(p) for p in pairs]}
        case tuple() | list():
            items = [split(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{name} is a {type(value).__name__}, which no checkpoint holds")


def join(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The inverse of `split`.

    Args:
        value: What it returned, after JSON.
        tensor: Gives the tensor of a name.
    """
    match value:
        case {"$tensor": name}:
            return tensor(name)
        case {"$dict": pairs}:
            return {key: join(item, tensor) for key, item in pairs}
        case {"$tuple": items}:
            return tuple(join(item, tensor) for item in items)
        case dict():
            return {key: join(item, tensor) for key, item in value.items()}
        case list():
            return [join(item, tensor) for item in value]
    return value


def random_state() -> dict[str, Tensor]:
    """The state of all random generators that a training draws from, as tensors."""
    name, keys, *rest = np.random.get_state()
    text = json.dumps({"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]})
    state = {"host": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Restores what `random_state` returned; without a CUDA device its part is left out."""
    host = json.loads(state["host"].numpy().tobytes())
    version, keys, gauss = host["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = host["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def optimizer_tensor(optimizer: Any, files: TensorFiles, name: str) -> Tensor:
    """A tensor of an optimizer's state, `optimizer.state.INDEX.KEY`, where and cut as its parameter is.

    What has another shape than the parameter (a step count) is whole, on the host.

    Raises:
        CheckpointError: The checkpoint lacks rows of it, or it cannot be cut as the parameter is here.
    """
    index = int(name.split(".")[2])
    parameter = [p for group in optimizer.param_groups for p in group["params"]][index]
    shape, dtype = files.kind(name)
    if name.endswith("_scale") and hasattr(parameter, "placements"):
        raise CheckpointError(
            "this checkpoint holds 8-bit moments, whose blocks cannot be cut by rows: set training.sharding to ddp, "
            "or training.processes to 1, to go on from it"
        )
    if tuple(parameter.shape) != shape:
        return files.read(name)
    tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    files.fill({name: part(tensor)})
    return tensor


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that a training moves, by name; all else is the base model's."""
    return {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}


# --- when and how ----------------------------------------------------------------------------------------------------


class Complete(Exception):
    """A resumed training has no step left to do."""


class Wish:
    """Turns the first SIGINT or SIGTERM within its `with` block into a wish to stop; a second one ends the process.

    Outside the main thread, where no signal arrives, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.made = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Wish":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        for other in self.SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if rank() == 0:  # not by print, which may be what was interrupted
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C once more ends at once\n")


class Keeper(TrainerCallback):
    """Writes a training's checkpoints when they are due, and gives the last one back.

    Args:
        checkpoints: Where they are.
        steps: Optimizer steps between two; None: no such limit.
        minutes: Minutes between two; None: no such limit.
        hardware: Fingerprint of what this process trains on.
    """

    def __init__(
        self, checkpoints: Checkpoints, steps: int | None, minutes: float | None, hardware: str = "unknown"
    ) -> None:
        self.checkpoints, self.steps, self.minutes = checkpoints, steps, minutes
        self.hardware = [hardware]  # on which the training ran, one after the other
        self.wish = Wish()
        self.resumed_at: list[int] = []
        self.stopped = False
        self.seconds = 0.0  # spent on writing in this process
        self._parts: dict[str, Stateful] = {}
        self._found: Checkpoint | None = None
        self._files: TensorFiles | None = None
        self._written: Path | None = None
        self._due = 0.0
        self._trainer: Any = None

    def train(self, trainer: "ResumableTrainer", parts: Mapping[str, Stateful]) -> None:
        """`trainer.train()`, from the last checkpoint on where there is one.

        Args:
            trainer: Not trained yet.
            parts: What else a checkpoint must hold.

        Raises:
            Interrupted: After a wish to stop; says how to go on.
        """
        self._trainer, self._parts = trainer, dict(parts)
        trainer.keeper = self
        trainer.add_callback(self)
        with self.wish, contextlib.suppress(Complete):
            trainer.train(resume_from_checkpoint=self._find())
        if self.stopped:
            raise Interrupted(self._how_to_go_on())

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Says how to go on when an interrupt comes after the last step, while the results are made and written.

        Raises:
            Interrupted: In place of a bare `KeyboardInterrupt` once the training has begun.
        """
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt:
            if self._trainer is None:
                raise
            raise Interrupted(self._how_to_go_on()) from None

    def _find(self) -> str | None:
        """The folder that `Trainer.train` resumes from, or None."""
        self._found = self.checkpoints.latest()
        if self._found is None:
            return None
        self._files, self._written = self._found.tensors(), self._found.path
        self.resumed_at = [*self._found.state["resumed_at"], self._found.step]
        self.hardware = list(dict.fromkeys([*self._found.state["hardware"], *self.hardware]))
        if rank() == 0:
            print(f"resumed after step {self._found.step} from {self._found.path}", file=sys.stderr)
        return str(self._found.path)

    # The Trainer's events

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._wait()
        if state.global_step >= state.max_steps:
            raise Complete

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        due = bool(self.steps) and state.global_step % int(self.steps or 1) == 0
        due |= self.minutes is not None and time.monotonic() >= self._due
        wish = anyone(2 if self.wish.made else int(due and not last))
        if wish:
            control.should_save = True
        if wish == 2:
            control.should_training_stop = self.stopped = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.stopped and anyone(int(self.wish.made)):  # in the moment after the last step
            self.stopped = True
            self.save()

    # The Trainer's hooks

    def save(self) -> None:
        """Writes a checkpoint; where the disk is full it warns, and training goes on."""
        began, trainer = time.monotonic(), self._trainer
        tensors: dict[str, Tensor] = trained(trainer.model)
        state = {
            "optimizer": split(trainer.optimizer.state_dict(), "optimizer", tensors),
            "scheduler": split(trainer.lr_scheduler.state_dict(), "scheduler", tensors),
            "parts": {name: split(p.state_dict(), f"parts.{name}", tensors) for name, p in self._parts.items()},
            "resumed_at": self.resumed_at,
            "hardware": self.hardware,
        }
        step = trainer.state.global_step
        try:
            self._written = self.checkpoints.save(
                step,
                {name: part(tensor) for name, tensor in tensors.items()},
                random_state(),
                state,
                {TRAINER_STATE_NAME: dataclasses.asdict(trainer.state)},
            )
        except OSError as error:
            stays = f"the last good one is {self._written}" if self._written else "there is none yet"
            if rank() == 0:
                print(
                    f"warning: no checkpoint of step {step} could be written ({error}); training goes on, {stays}",
                    file=sys.stderr,
                )
        self._wait()
        self.seconds += time.monotonic() - began

    def restore_model(self, model: nn.Module) -> None:
        """Fills the trained parameters."""
        self._opened().fill({name: part(tensor) for name, tensor in trained(model).items()})

    def restore_optimizer(self) -> None:
        """Restores optimizer, schedule, order and all else but the random state."""
        assert self._found is not None
        files, state, trainer = self._opened(), self._found.state, self._trainer
        optimizer = trainer.optimizer
        optimizer.load_state_dict(join(state["optimizer"], lambda name: optimizer_tensor(optimizer, files, name)))
        trainer.lr_scheduler.load_state_dict(join(state["scheduler"], files.read))
        for name, value in self._parts.items():
            value.load_state_dict(join(state["parts"][name], files.read))

    def restore_random(self) -> None:
        """Restores the random state, for a process that has one in the checkpoint."""
        if own := self._opened().own():
            restore_random_state(own)
        self._files = None

    def _how_to_go_on(self) -> str:
        state = self._trainer.state
        begin = f"from {self._written}" if self._written else "from the start, since there is no checkpoint"
        return f"after step {state.global_step} of {state.max_steps}; `dvc repro` or `molf run` goes on {begin}"

    def _opened(self) -> TensorFiles:
        assert self._files is not None, "_find() comes first"
        return self._files

    def _wait(self) -> None:
        self._due = time.monotonic() + 60 * (self.minutes or 0)


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints are its keeper's: none of its own, pickled files are written or read."""

    keeper: Keeper | None = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.keeper is not None
        self.keeper.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self.keeper is not None
        self.keeper.restore_model(self.model if model is None else model)  # type: ignore[arg-type]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.keeper is not None:
            self.keeper.restore_optimizer()

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: no method trains in float16."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.keeper is not None:
            self.keeper.restore_random()
