"""What the sweeps chose: each method's learning rates by its score on validation rows, never on test rows."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from molf import records
from molf.config import Params, trial_config
from molf.paths import Trial

KEPT = ("score", "loss", "n", "diverged", "steps", "train_seconds", "seconds", "fingerprint")


def choose(params: Params, root: Path = Path()) -> dict[str, Any]:
    """What results/rates.json holds.

    Args:
        params: Their grid says which sweeps are read, their blocks what these must have been made with.
        root: Project folder, with sweeps/.

    Returns:
        chosen: {model: {task: {method: factor}}}: 1 where `grid.tune` is empty, None where nothing can be chosen.
        factors: `grid.tune`. sweeps: For each model, task and method what was tried and chosen (`sweep`).
    """
    grid = params.grid
    chosen: dict[str, Any] = {}
    sweeps = []
    for model, task, method in product(grid.models, grid.tasks, grid.methods):
        found = sweep(params, (model, task, method), root) if grid.tune else {"chosen": 1.0}
        chosen.setdefault(model, {}).setdefault(task, {})[method] = found["chosen"]
        sweeps += [found] if grid.tune else []
    return {"chosen": chosen, "factors": grid.tune, "sweeps": sweeps}


def sweep(params: Params, of: tuple[str, str, str], root: Path) -> dict[str, Any]:
    """One method's trials on one model and task, by rising factor, and what is chosen of them.

    Returns:
        model, task, method, kind; primary_name; trials (factor, rates, and `KEPT` of their records); chosen, or None
        and `why`; edge ("lowest", "highest" or None): whether a better rate may lie beyond the factors; tied: whether
        other factors have the chosen one's score.
    """
    model, task, method = of
    trials, lacking, name = [], [], None
    for factor in sorted(params.grid.tune):
        trial = Trial(model, task, method, factor)
        config = trial_config(params, trial)
        found = records.read(root / trial.record)
        if found is None or found["config"] != config:
            lacking.append(trial)
            continue
        name = found["primary_name"] or name
        rates = params.methods[method].at_factor(factor).learning_rates()
        trials.append({"factor": float(factor), "rates": rates, **{key: found[key] for key in KEPT}})
    winner = None if lacking else best(trials)
    why = None
    if lacking:
        names = " ".join(f"sweep@{model}-{task}-{method}-{trial.factor}" for trial in lacking)
        why = f"{len(lacking)} of {len(params.grid.tune)} trials are not there; `dvc repro {names} choose`"
    elif winner is None:
        first = trials[0]
        why = f"at every factor it diverged, at {first['factor']:g} so: {first['diverged']}; lower grid.tune's factors"
    return {
        "model": model,
        "task": task,
        "method": method,
        "kind": params.methods[method].kind,
        "primary_name": name,
        "trials": trials,
        "chosen": winner["factor"] if winner else None,
        "why": why,
        "edge": edge(trials, winner) if winner else None,
        "tied": winner is not None and sum(trial["score"] == winner["score"] for trial in trials) > 1,
    }


def best(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The trial with the highest score; of several the one of lower loss, then of the smaller factor.

    Args:
        trials: factor; diverged, or score and loss.

    Returns:
        None where all diverged.
    """
    sound = [trial for trial in trials if trial["diverged"] is None]
    return min(sound, key=lambda trial: (-trial["score"], trial["loss"], trial["factor"]), default=None)


def edge(trials: Sequence[Mapping[str, Any]], winner: Mapping[str, Any]) -> str | None:
    """At which end of the factors the best one lies; None where it lies between others."""
    factors = [trial["factor"] for trial in trials]
    if winner["factor"] == max(factors):
        return "highest"
    return "lowest" if winner["factor"] == min(factors) else None


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a sweep beside its numbers, in sentences without an end.

    Args:
        found: As `sweep` gives it.
    """
    said = []
    factors = ", ".join(f"{trial['factor']:g}" for trial in found["trials"])
    if found["edge"]:
        said.append(
            f"the best learning rate is the {found['edge']} of its sweep (factor {found['chosen']:g} of {factors}): a "
            "better one may lie beyond; widen grid.tune"
        )
    diverged = [f"{trial['factor']:g}" for trial in found["trials"] if trial["diverged"] is not None]
    if diverged:
        said.append(f"its training diverged at factor {', '.join(diverged)} of its sweep")
    return said
