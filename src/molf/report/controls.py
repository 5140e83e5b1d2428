"""What methods are in a comparison: controls and ablations of MoLF, which are not MoLF, and LoRA's relatives."""

from collections.abc import Mapping
from typing import Any

# What decides who wins, by a block's `winners`.
WORDS = {
    "shuffled": "each step's winners dealt out to the modules at random",
    "random": "winners drawn at random",
    "full": "the full weight always wins",
    "lora": "a LoRA expert always wins",
    "alternate": "the experts win in turn",
}
SCORES = {"pfn": "the score is the preconditioned Frobenius norm"}
SCOPES = {"layer": "one score over all modules of a layer", "model": "one score over all modules of the model"}


def control(block: Mapping[str, Any]) -> dict[str, str] | None:
    """What makes a method's block a control or an ablation of MoLF; None for every other block.

    A control takes the choice from the scores; so do as many winners as experts, for then nothing is chosen. An
    ablation leaves it to them and takes them otherwise.

    Args:
        block: Of params.yaml, as plain data; an earlier molf's lacks what is new.

    Returns:
        `kind`: control or ablation; `words`: what is other than in MoLF.
    """
    if block["kind"] not in ("molf", "molf-e"):
        return None
    if words := WORDS.get(block.get("winners", "scores")):
        return {"kind": "control", "words": words}
    if block["top_k"] == len(block["r"]) + (block["kind"] == "molf"):
        return {"kind": "control", "words": "all experts win in every step"}
    otherwise = (SCORES.get(block["score"]), SCOPES.get(block.get("score_per", "module")))
    words = ", ".join(filter(None, otherwise))
    return {"kind": "ablation", "words": words} if words else None


def kind_of(block: Mapping[str, Any]) -> str:
    """A method's kind in a comparison: LoRA's relatives that are more than a rank and a scale are kinds of their own.

    So MoLF is held against plain LoRA, as its paper has it, and not against all of them at once.

    Args:
        block: As `control`'s.
    """
    of = {
        "dora": block.get("use_dora", False),
        "pissa": block.get("init_lora_weights") == "pissa",
        "qlora": block.get("base_bits") is not None,
        "loraplus": block.get("loraplus_lr_ratio", 1) != 1,
    }
    return "-".join(name for name, holds in of.items() if holds) or str(block["kind"])


def is_control(method: Mapping[str, Any]) -> bool:
    """Whether a method of comparison.json is a control of MoLF, which nobody would use."""
    return bool(method.get("control")) and method["control"]["kind"] == "control"


def named(method: Mapping[str, Any]) -> str:
    """A method's name, with what it is where it is no method of its own: "molf-random (control)".

    Args:
        method: As in comparison.json.
    """
    found = method.get("control")
    return f"{method['method']} ({found['kind']})" if found else str(method["method"])


def said(group: Mapping[str, Any]) -> list[str]:
    """A sentence for each control and ablation of a group of comparison.json."""
    return [
        f"{m['method']} is {'a control' if is_control(m) else 'an ablation'} of MoLF, not MoLF: {m['control']['words']}"
        for m in group["methods"]
        if m.get("control")
    ]
