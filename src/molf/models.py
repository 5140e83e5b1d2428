"""Model folders: how they are checked, loaded, hashed and described."""

import errno
import hashlib
import json
import logging as std_logging
import os
import re
import sys
import warnings
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.errors import UserError, first_line
from molf.paths import file_hash, keep_private, read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INFO = "molf_model.json"
ORIGIN = ("name", "kind", "generated", "id", "revision", "package", "sha256")  # of what INFO holds
# Stands in a cell's weights folder when `training.keep` does not let the weights stay.
ELSEWHERE = "not_kept.json"
# Of errors when memory runs out: torch's host allocator, the system, CUDA's libraries.
NO_MEMORY = re.compile(r"(can't|cannot) allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE)


def check_folder(directory: Path, key: str) -> None:
    """Checks that a folder is a causal language model that can be trained here.

    Raises:
        UserError: Everything that lacks: config.json, safetensors weights, a tokenizer, its EOS token.
    """
    problems = []
    if not (directory / "config.json").is_file():
        problems.append(f"{key}: {directory} has no config.json; a transformers checkpoint is expected")
    if not any(directory.glob("*.safetensors")):
        other = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f" ({', '.join(other)} is pickled and never loaded; convert it)" if other else ""
        problems.append(f"{key}: {directory} has no *.safetensors weights{hint}")
    # Without these transformers makes up an empty tokenizer.
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        problems.append(f"{key}: {directory} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    if problems:
        raise UserError(problems)
    try:
        tokenizer = load_tokenizer(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: no tokenizer loads from {directory}: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key}: the tokenizer has no end-of-sequence token (eos_token), so no answer could ever end")
    known = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    vocabulary = known.get("vocab_size") or known.get("text_config", {}).get("vocab_size")
    if vocabulary is not None and tokenizer.eos_token_id >= vocabulary:
        raise UserError(
            f"{key}: the tokenizer's end-of-sequence token {tokenizer.eos_token} has number {tokenizer.eos_token_id}, "
            f"the model knows 0 to {vocabulary - 1}; is the tokenizer another model's?"
        )


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder, with a padding token (EOS where it has none of its own)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(directory: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """The causal language model of a folder, its weights in `dtype` whatever the checkpoint's.

    Raises:
        UserError: The folder does not load as a causal language model, or its weights are not all of that model's: what
            lacks would be filled with random numbers.

    Want of memory is left as it is (`ran_out`): it says nothing about the folder.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if ran_out(error):
            raise
        raise UserError(f"{directory} does not load as a causal language model: {first_line(error)}") from None
    model, info = loaded
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise UserError(
            f"{directory}: {len(lacking)} weights that config.json asks for are not in its safetensors files or have "
            f"another shape: {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}"
        )
    return model


def ran_out(error: BaseException) -> bool:
    """Whether an error of a library says that memory ran out, on the host or on a GPU."""
    import torch

    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or NO_MEMORY.search(str(error)) is not None


def folder_hash(directory: Path) -> str:
    """sha256 over names and bytes of all files below a folder, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(directory)).encode() + b"\0")
        digest.update(file_hash(path).encode())
    return digest.hexdigest()[:16]


def describe(directory: Path) -> dict[str, Any]:
    """Name, origin and hash of a base model, as kept in every `run.json`."""
    info = read_json(directory / INFO)
    return {key: info[key] for key in ORIGIN if key in info} | {"hash": folder_hash(directory)}


def quiet() -> None:
    """Offline and without telemetry, and the libraries' own chatter off: what a stage prints is ours."""
    keep_private()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        from tqdm import tqdm

        # TQDM_DISABLE would come too late: torch has imported tqdm by now.
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]
    # Deprecations inside transformers, PEFT and accelerate are theirs to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
    # torchao and bitsandbytes warn at every import of their users of extensions that the CPU does not need.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        std_logging.getLogger(name).setLevel(std_logging.ERROR)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def weight_dtype(dtype: str) -> "torch.dtype":
    """The dtype of all weights that `training.dtype` means, alike for every method."""
    import torch

    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def autocast(dtype: str) -> bool:
    """Whether a training of that `training.dtype` computes in bfloat16 here, its weights in float32."""
    import torch

    return dtype == "auto" and torch.cuda.is_available()


def parameter_counts(model: "torch.nn.Module") -> tuple[int, int]:
    """(trained parameters, all parameters); tied weights count once, those of 4 bits as the numbers that they hold."""
    parameters: list[Any] = list(model.parameters())
    held = (p.quant_state.shape.numel() if getattr(p, "quant_state", None) else p.numel() for p in parameters)
    return sum(p.numel() for p in parameters if p.requires_grad), sum(held)


def folder_bytes(directory: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def find_weights(directory: Path) -> Path:
    """The folder where a cell's weights lie: its own, or another if they are not kept.

    Raises:
        UserError: They were not kept and are gone, or are of another training; with the command that makes them anew.
    """
    note = directory / ELSEWHERE
    if not note.is_file():
        return directory
    kept = read_json(note)
    path = Path(kept["path"])
    if not path.is_dir() or folder_hash(path) != kept["hash"]:
        *cell, seed = directory.parts[-4:]
        stage = f"train@{'-'.join([*cell, seed.removeprefix('seed-')])}"
        raise UserError(
            f"{directory}: these weights were not kept (training.keep); "
            f"train the cell again with `dvc repro -f -s {stage}`, or set training.keep to all"
        )
    return path


def to_device(model: "PreTrainedModel", threads: int | None) -> None:
    """Puts a model on the GPU where there is one, and sets the CPU threads."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.nn.Module.to(model, "cuda")
