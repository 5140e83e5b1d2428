"""What a training did to its base model: how much of general text it forgot, and how its weights moved.

Intruder dimensions are those of Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence",
arXiv 2410.21228.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from molf.encoding import IGNORED, encode_prompt, left_pad
from molf.errors import RunError
from molf.modules import place
from molf.paths import read_json

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from molf.config import WeightChange
    from molf.evaluation import LanguageModel

LOGITS = 2**26  # that one forward may make, unless a single text makes more: 256 MiB in float32
BLOCK = 2**24  # numbers of a weight that are compared at once
COLUMNS = {"module": str, "layer": int, "type": str, "rows": int, "columns": int, "base_norm": float}
COLUMNS |= {"change_norm": float, "effective_rank": float, "intruders": int, "top": int}


# --- general text ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def general_nll(lm: "LanguageModel", texts: "pd.DataFrame", max_length: int) -> "pd.DataFrame":
    """Asks a model how likely it finds texts.

    Args:
        lm: The model.
        texts: text_id and text.
        max_length: Tokens, BOS included, that count of each text; of a model whose window is shorter, that many.

    Returns:
        A row per text, in their order: text_id, tokens (those that are predicted: all, but the first where the
        tokenizer has no BOS), bytes (UTF-8, of these), nll (their summed negative log-probability, nats) and cut
        (whether the text is longer than that).

    Raises:
        RunError: A loss is not finite.
    """
    import pandas as pd

    window = min(max_length, lm.places or max_length)
    encoded, sizes, cut = [], [], []
    for text in texts["text"]:
        whole = encode_prompt(lm.tokenizer, text)
        encoded.append(whole[:window])
        cut.append(len(whole) > window)
        sizes.append(_bytes(lm.tokenizer, text, encoded[-1], cut[-1]))
    nll = [0.0] * len(encoded)
    asked = sorted((i for i, ids in enumerate(encoded) if len(ids) > 1), key=lambda i: -len(encoded[i]))
    vocabulary = lm.model.config.get_text_config().vocab_size
    with tqdm(total=len(asked), desc="general text", unit="text", disable=not lm.progress, leave=False) as bar:
        while asked:
            fits = LOGITS // (len(encoded[asked[0]]) * vocabulary)
            count = max(1, min(lm.batch_size, fits))
            rows, asked = asked[:count], asked[count:]
            for i, value in zip(rows, _batch(lm, [encoded[i] for i in rows]), strict=True):
                nll[i] = value
            bar.update(len(rows))
    bad = [str(text_id) for text_id, value in zip(texts["text_id"], nll, strict=True) if not math.isfinite(value)]
    if bad:
        raise RunError(
            f"the loss on the general text {bad[0]} is not finite, of {len(bad)} in all: the model is broken"
        )
    predicted = [max(0, len(ids) - 1) for ids in encoded]
    columns = {"text_id": texts["text_id"].to_numpy(), "tokens": predicted, "bytes": sizes, "nll": nll, "cut": cut}
    return pd.DataFrame(columns)


def _batch(lm: "LanguageModel", sequences: list[list[int]]) -> list[float]:
    """Summed negative log-probability of each sequence's tokens behind its first."""
    pad = lm.tokenizer.pad_token_id
    # The last token predicts nothing that is asked for, so it need not be run.
    inputs = left_pad([ids[:-1] for ids in sequences], pad)  # type: ignore[arg-type]
    targets = torch.full_like(inputs["input_ids"], IGNORED)
    for row, ids in enumerate(sequences):
        targets[row, -(len(ids) - 1) :] = torch.tensor(ids[1:])
    on = {name: tensor.to(lm.model.device) for name, tensor in inputs.items()}
    logits = lm.model(**on, use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.to(logits.device).flatten(), ignore_index=IGNORED, reduction="none"
    )
    summed: list[float] = losses.view(targets.shape).double().sum(dim=1).tolist()
    return summed


def _bytes(tokenizer: "PreTrainedTokenizerBase", text: str, ids: list[int], cut: bool) -> int:
    """Bytes in UTF-8 of what the ids behind the first stand for."""
    if not cut and tokenizer.bos_token_id is not None:
        return len(text.encode())
    return len(str(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)).encode())


def of_general(frame: "pd.DataFrame", text: Mapping[str, Any]) -> dict[str, Any]:
    """The general loss for metrics.json.

    Args:
        frame: As `general_nll` gives it.
        text: The text's summary.json.

    Returns:
        loss (nats per predicted token), bits_per_byte, texts, tokens, cut (texts whose end does not count), hash and
        generated (of the text).

    Raises:
        RunError: Nothing was predicted.
    """
    tokens, nll, size = int(frame["tokens"].sum()), float(frame["nll"].sum()), int(frame["bytes"].sum())
    if not tokens or not size:
        raise RunError("general: no text has a token to predict; take longer texts")
    return {
        "loss": nll / tokens,
        "bits_per_byte": nll / (size * math.log(2)),
        "texts": len(frame),
        "tokens": tokens,
        "cut": int(frame["cut"].sum()),
        "hash": text["hash"],
        "generated": text["generated"],
    }


# --- weights ---------------------------------------------------------------------------------------------------------


def effective_rank(change: torch.Tensor) -> float:
    """exp of the entropy of a matrix's singular values, normalised to sum 1; 0 for a matrix of zeros.

    Roy and Vetterli 2007, "The effective rank", definition 1.
    """
    values = _eigenvalues(torch.linalg.eigvalsh(_gram(change))).sqrt()
    values = values[values > 0]
    if not len(values):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def intruders(base: torch.Tensor, tuned: torch.Tensor, top: int, threshold: float) -> int:
    """How many intruder dimensions a tuned weight has (Shuttleworth et al. 2024, algorithm 1).

    An intruder is a left singular vector of the tuned weight, among the `top` of the largest singular values, whose
    best absolute cosine with any left singular vector of the base weight is below the threshold. Vectors of singular
    values that are zero have no direction of their own and count on neither side.

    Args:
        base: (rows, columns).
        tuned: Likewise.
        top: Vectors that are looked at.
        threshold: Of the cosine.
    """
    best = (_left(tuned, top).T @ _left(base)).abs().amax(dim=1)
    return int((best < threshold).sum())


def _gram(weight: torch.Tensor) -> torch.Tensor:
    """The product of a matrix with its transpose, the smaller one, in float64."""
    weight = weight.double()
    return weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight


def _eigenvalues(values: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of a Gram matrix; those that are rounding errors of the largest become 0."""
    floor = len(values) * torch.finfo(values.dtype).eps * values.amax()
    return torch.where(values > floor, values, 0)


def _left(weight: torch.Tensor, top: int | None = None) -> torch.Tensor:
    """Left singular vectors of the `top` largest singular values that are not 0, the largest first: (rows, found).

    From the smaller Gram matrix in float64: several times faster than a singular value decomposition, and what
    squaring costs in accuracy lies below float32's.
    """
    values, vectors = torch.linalg.eigh(_gram(weight))
    values, vectors = _eigenvalues(values).flip(0)[:top], vectors.flip(1)[:, :top]
    vectors = vectors[:, values > 0]
    if weight.shape[0] <= weight.shape[1]:
        return vectors
    left = weight.double() @ vectors
    return left / left.norm(dim=0)


class Stored:
    """The tensors of a model folder's safetensors files, read one by one.

    Args:
        folder: Of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def get(self, like: torch.Tensor, name: str) -> torch.Tensor | None:
        """A tensor, on the device and rounded to the dtype of the parameter that was made from it.

        Args:
            like: The parameter.
            name: Of it in the model; the file may have one with more before it, as that of a model for images too has.

        Returns:
            float32; None where the files have no such tensor of that shape.
        """
        from safetensors import safe_open

        if name not in self.files:
            longer = [known for known in self.files if known.endswith(f".{name}")]
            if len(longer) != 1:
                return None
            name = longer[0]
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor.to(like.device, like.dtype).float() if tensor.shape == like.shape else None


@torch.no_grad()
def moves(
    model: "PreTrainedModel", base: Stored, block: "WeightChange", progress: bool = False
) -> tuple["pd.DataFrame", dict[str, Any]] | None:
    """How far a trained model's weights are from its base's.

    The table holds the weights of all linear layers but the head, which are what LoRA and the mixtures may change; all
    other parameters are one number, since most methods leave them alone.

    Args:
        model: Trained, adapters merged.
        base: The base's tensors.
        block: What counts as an intruder dimension.
        progress: Whether to show a bar.

    Returns:
        The table: module, layer, type, rows, columns, base_norm and change_norm (Frobenius), effective_rank (of the
        change), intruders, top (vectors that were looked at). And for metrics.json: relative_change (norm of all
        changes in the table over that of all base weights there), elsewhere (likewise of all other parameters),
        effective_rank (mean), intruders and looked_at (sums), top, threshold, not_found (parameters that the base's
        files have under another name or shape). None where that is so of all linear layers.
    """
    import pandas as pd

    head = model.get_output_embeddings()
    linears = {
        f"{name}.weight": name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    rows: list[dict[str, Any]] = []
    not_found, others = 0, [0.0, 0.0]
    for name, tuned in tqdm(
        list(model.named_parameters()), desc="weights", unit="weight", disable=not progress, leave=False
    ):
        before = base.get(tuned, name)
        if before is None:
            not_found += 1
        elif name in linears:
            rows.append(_move(linears[name], before, tuned.float(), block))
        else:
            for part, old in zip(tuned.flatten().split(BLOCK), before.flatten().split(BLOCK), strict=True):
                others[0] += float((part.float() - old).double().square().sum())
                others[1] += float(old.double().square().sum())
    if not rows:
        return None
    table = pd.DataFrame(rows).astype({name: kind for name, kind in COLUMNS.items() if kind is not str})
    moved, whole = (math.sqrt(table[name].pow(2).sum()) for name in ("change_norm", "base_norm"))
    return table[list(COLUMNS)], {
        "relative_change": moved / whole if whole else 0.0,
        "elsewhere": math.sqrt(others[0] / others[1]) if others[1] else 0.0,
        "effective_rank": float(table["effective_rank"].mean()),
        "intruders": int(table["intruders"].sum()),
        "looked_at": int(table["top"].sum()),
        "top": block.top,
        "threshold": block.threshold,
        "not_found": not_found,
    }


def _move(module: str, before: torch.Tensor, after: torch.Tensor, block: "WeightChange") -> dict[str, Any]:
    """One row of the table."""
    change = after - before
    norm = float(change.double().norm())
    kind, layer = place(module)
    top = min(block.top, *before.shape)
    return {
        "module": module,
        "layer": layer,
        "type": kind,
        "rows": before.shape[0],
        "columns": before.shape[1],
        "base_norm": float(before.double().norm()),
        "change_norm": norm,
        "effective_rank": effective_rank(change) if norm else 0.0,
        "intruders": intruders(before, after, top, block.threshold) if norm else 0,
        "top": top,
    }


# --- both ------------------------------------------------------------------------------------------------------------


def measure(
    lm: "LanguageModel", general: Path, base: Path | None, block: "WeightChange | None"
) -> tuple[dict[str, "pd.DataFrame"], dict[str, Any]]:
    """All that is asked for of a model.

    Args:
        lm: The model.
        general: Folder of the general text; of kind none, nothing is asked.
        base: Folder of the base model that it was trained from; None: it was not trained.
        block: What counts as an intruder dimension; None: the weights are not looked at.

    Returns:
        The tables by name, `general` and `weights`, as far as they are asked for; and under the same names what
        metrics.json holds of each, or None.
    """
    import pandas as pd

    tables: dict[str, pd.DataFrame] = {}
    told: dict[str, Any] = {"general": None, "weights": None}
    text = read_json(general / "summary.json")
    if text["kind"] != "none":
        tables["general"] = general_nll(lm, pd.read_parquet(general / "text.parquet"), text["max_length"])
        told["general"] = of_general(tables["general"], text)
    if base is not None and block is not None:
        found = moves(lm.model, Stored(base), block, lm.progress)
        if found is not None:
            tables["weights"], told["weights"] = found
    return tables, told
