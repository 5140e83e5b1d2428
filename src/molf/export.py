"""A trained model as a folder that transformers or PEFT loads anywhere: weights, tokenizer, card, nothing pickled."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf import cards, memory, models
from molf.config import Params
from molf.errors import RunError, UserError
from molf.lineage import describe_model
from molf.paths import BASE_METHOD, MODELS, OUTPUTS, Cell, file_hash, read_json, write_json, write_text
from molf.report.markdown import literal

if TYPE_CHECKING:
    import torch

MANIFEST = "molf_export.json"  # what an export wrote, so that the next may replace it
ADAPTER = "adapter_config.json"
# Of a cell's weights; nothing else there is the model.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", ADAPTER)
# What else a loader would read of a folder, or run.
LOADED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".jinja", ".model"}
ASKED = "Question: which of these numbers is the largest, 3, 17 or 5? Answer:"
# How far the logits of what was written may lie from the cell's own, relative to the largest: merging an adapter
# rounds each weight once more, which shows in bfloat16's 8 bits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}


def export(cell: Cell, directory: Path, params: Params, merge: bool, force: bool) -> list[str]:
    """Writes a cell's model into a folder, as `write` does, from the files of this project.

    Args:
        cell: A trained and evaluated cell.
        directory: New, empty, or of an earlier export.
        params: Name the licence and the task's options for the card.
        merge, force: As in `write`.

    Returns:
        What was done, in lines.

    Raises:
        UserError, RunError: As `write` does.
    """
    if cell.method == BASE_METHOD:
        raise UserError(f"{cell.name} was not trained: {MODELS / cell.model} is that model, as it came")
    return write(cards.Made.read(cell, params), directory, merge, force)


def write(
    made: cards.Made,
    directory: Path,
    merge: bool,
    force: bool,
    root: Path = Path(),
    beside: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes a trained model into a folder, and loads it back from there.

    Nothing appears in `directory` before it was written whole and its logits were held against the cell's own model.

    Args:
        made: A trained and evaluated cell.
        directory: New, empty, or of an earlier export.
        merge: Whether an adapter is merged into its base model, so that the folder holds all weights.
        force: Whether an earlier export's files in `directory` are replaced; others stay.
        root: The folder that holds the cell's weights and its base model, laid out as a project.
        beside: Texts that are written too, by file name.

    Returns:
        What was done, in lines.

    Raises:
        UserError: The cell has no weights here, or `directory` holds what no export wrote.
        RunError: Weights or base model are not those that the lineage names, or what was written is another model.
    """
    from molf.methods import METHODS

    cell = made.cell
    if made.adapter and not merge and made.run["config"]["method"].get("base_bits") is not None:
        raise UserError(
            f"{cell.name}: its adapter was trained over weights rounded to 4 bits, and PEFT alone would put it on the "
            "unrounded ones; export it with --merge"
        )
    weights = _checked_weights(made, root)
    base = _checked_base(made, root)
    directory = directory.resolve()
    written = _written(directory, force)
    adapter = made.adapter and not merge
    dtype = made.run["config"]["training"]["dtype"]
    place = _place(made, base, adapter)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with memory.explained_by(
            lambda: "the model alone does not fit this machine's memory; export it on a larger one"
        ):
            own = METHODS[made.run["config"]["method"]["kind"]].load(base, weights, models.weight_dtype(dtype))
            if made.adapter and merge:
                own.save_pretrained(temporary)
            else:
                _copy(weights, temporary)
            if adapter:
                _name_base(temporary / ADAPTER, place)
            _save_tokenizer(made, base, temporary)
            ids = _encoded(temporary, base)
            expected = _logits(own, ids)
            del own
            difference = _compare(expected, _logits(_load(temporary, base, adapter, dtype), ids), dtype)
        write_text(temporary / "README.md", cards.model_card(made, place))
        for name, text in (beside or {}).items():
            write_text(temporary / name, text)
        _write_manifest(made, temporary, merge)
        size = models.folder_bytes(temporary)
        _keep(directory, temporary, written)
        _swap(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    what = "adapter" if adapter else "whole model, its adapter merged" if made.adapter else "whole model"
    lines = [
        f"{cell.name} -> {directory}: {what}, tokenizer and card, {size / 1e6:,.1f} MB, safetensors only",
        f"  loaded back with {'PEFT' if adapter else 'transformers'} alone: logits differ by at most {difference:.2g} "
        "from those of the cell's own model",
    ]
    if adapter and place.revision:
        lines.append(f"  its base model: {place.base} at {place.revision}, on the hub")
    elif adapter:
        lines += [
            f"  its base model is not on the hub: {describe_model(made.run['model'])}, here {base}",
            f"  elsewhere: write its place into {ADAPTER}, base_model_name_or_path; or export with --merge",
        ]
    return lines


# --- what goes in ----------------------------------------------------------------------------------------------------


def _checked_weights(made: cards.Made, root: Path) -> Path:
    """The folder of the cell's weights, which are those that its training noted."""
    cell = made.cell
    noted = made.summary.get("lineage", {}).get("weights", {}).get("hash")
    if noted is None:
        raise UserError(
            f"{cell.name}: its training noted no hash of its weights (an earlier molf made it), so that they cannot be "
            "told from others; `dvc repro` makes it anew"
        )
    if not (root / cell.weights).is_dir():
        raise UserError(f"{cell.name}: {cell.weights} is not here; `dvc pull {cell.weights}`")
    weights = models.find_weights(root / cell.weights)
    found = models.folder_hash(weights)
    if found != noted:
        raise RunError(
            f"{cell.name}: the weights in {weights} have hash {found}, its training wrote {noted}; "
            f"`dvc checkout {cell.weights}` brings those back"
        )
    return weights


def _checked_base(made: cards.Made, root: Path) -> Path:
    """The folder of the base model, which is the one that was trained; its tokenizer belongs to the cell."""
    base = root / MODELS / made.cell.model
    if not base.is_dir():
        raise UserError(f"{made.cell.name}: its base model {base} is not here; `dvc pull {base}`")
    found, noted = models.folder_hash(base), made.run["model"]["hash"]
    if found != noted:
        raise RunError(f"{made.cell.name}: {base} has hash {found}, it was trained from {noted}; `dvc checkout {base}`")
    return base.resolve()


def _place(made: cards.Made, base: Path, adapter: bool) -> cards.Place:
    """How the written folder is loaded; an adapter's base by its hub id, or else by where it lies here."""
    model = made.run["model"]
    if not adapter:
        return cards.Place(".", ".", False)
    if model["kind"] == "hub":
        return cards.Place(".", ".", True, model["id"], model["revision"])
    note = (
        f"The base model is not on the hub: {literal(describe_model(model))}, hash `{model['hash']}`. Where this was "
        f"written it lies in {literal(base)}; elsewhere, give its place there."
    )
    return cards.Place(".", ".", True, str(base), note=note)


def _copy(weights: Path, directory: Path) -> None:
    for pattern in WEIGHTS:
        for path in weights.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def _name_base(path: Path, place: cards.Place) -> None:
    write_json(path, {**read_json(path), "base_model_name_or_path": place.base, "revision": place.revision})


def _save_tokenizer(made: cards.Made, base: Path, directory: Path) -> None:
    tokenizer = models.load_tokenizer(base)
    if made.chat:
        from molf.encoding import with_chat_template

        tokenizer = with_chat_template(tokenizer)
    tokenizer.save_pretrained(directory)


# --- loading back ----------------------------------------------------------------------------------------------------


def _encoded(directory: Path, base: Path) -> "torch.Tensor":
    """Token ids of a text, for which the written tokenizer and the base's must agree: (1, tokens)."""
    import torch

    from molf.encoding import encode_prompt

    written, own = (encode_prompt(models.load_tokenizer(folder), ASKED) for folder in (directory, base))
    if written != own:
        raise RunError("the tokenizer that was written encodes otherwise than the base model's; nothing was exported")
    return torch.tensor([own])


def _load(directory: Path, base: Path, adapter: bool, dtype: str) -> Any:
    """The written model as anyone loads it, but for the adapter's base, which is here."""
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=models.weight_dtype(dtype), local_files_only=True)

    if not adapter:
        return load(directory)
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), directory)


def _logits(model: Any, ids: "torch.Tensor") -> "torch.Tensor":
    """Logits of every position: (tokens, vocabulary), float32."""
    import torch

    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits[0].float()


def _compare(expected: "torch.Tensor", found: "torch.Tensor", dtype: str) -> float:
    """The largest difference of two models' logits."""
    difference = float((expected - found).abs().max())
    allowed = TOLERANCE["bfloat16" if dtype == "bfloat16" else "float32"] * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:  # a NaN is refused too
        raise RunError(
            f"loaded back, the logits differ by {difference:.3g} from the cell's own model (allowed: {allowed:.3g}); "
            "nothing was exported"
        )
    return difference


# --- the folder ------------------------------------------------------------------------------------------------------


def _written(directory: Path, force: bool) -> set[str]:
    """What an earlier export wrote into a folder, its manifest included: names that may be replaced.

    Raises:
        UserError: The folder is not empty and may not be replaced.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; an export is a folder")
    if Path.cwd().is_relative_to(directory):
        raise UserError(f"{directory} holds the folder that this runs in; take another")
    of_stage = [folder for folder in OUTPUTS if directory.is_relative_to(folder.resolve())]
    if of_stage:
        raise UserError(f"{directory} lies in {of_stage[0]}, which the pipeline's stages empty; take another")
    if not directory.exists() or not any(directory.iterdir()):
        return set()
    manifest = directory / MANIFEST
    if not force:
        hint = "--force replaces what the earlier export wrote there" if manifest.is_file() else "take a new one"
        raise UserError(f"{directory} is not empty; {hint}")
    if not manifest.is_file():
        return set()
    try:
        written: dict[str, str] = read_json(manifest)["files"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{manifest} is not what an export writes; take a new folder") from None
    edited = [
        name
        for name, digest in written.items()
        if (directory / name).is_file() and file_hash(directory / name) != digest
    ]
    if edited:
        raise UserError(
            f"{directory}: {', '.join(edited)} changed since the export wrote it; move it away, or take a new folder"
        )
    return {*written, MANIFEST}


def _keep(directory: Path, temporary: Path, written: set[str]) -> None:
    """Puts beside the export what else its folder holds: links to the same files, which cost no space."""

    def own(folder: str, names: list[str]) -> list[str]:
        at = Path(folder).relative_to(directory)
        return [name for name in names if str(at / name) in written]

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copy2(source, target)

    taken = [path.name for path in temporary.iterdir() if path.name not in written and _there(directory / path.name)]
    if taken:
        raise UserError(f"{directory}: {', '.join(sorted(taken))} was not written by an export, which would replace it")
    if directory.exists():
        loaded = [path.name for path in directory.iterdir() if path.name not in written and _is_loaded(path)]
        if loaded:
            raise UserError(f"{directory}: {', '.join(sorted(loaded))} would be loaded with the export; move it away")
        shutil.copytree(directory, temporary, symlinks=True, ignore=own, copy_function=link, dirs_exist_ok=True)


def _is_loaded(path: Path) -> bool:
    return path.suffix in LOADED or any(path.match(pattern) for pattern in WEIGHTS)


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _write_manifest(made: cards.Made, temporary: Path, merge: bool) -> None:
    manifest = {
        "cell": made.cell.name,
        "fingerprint": made.run["fingerprint"],
        "weights": made.summary["lineage"]["weights"]["hash"],
        "merged": made.adapter and merge,
        "files": {path.name: file_hash(path) for path in sorted(temporary.iterdir())},
    }
    write_json(temporary / MANIFEST, manifest)


def _swap(temporary: Path, directory: Path) -> None:
    """Puts the finished folder in its place; what was there goes only then."""
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    replaced = directory.exists()
    if replaced:
        os.rename(directory, old)
    try:
        os.rename(temporary, directory)
    except OSError:
        if replaced:
            os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
