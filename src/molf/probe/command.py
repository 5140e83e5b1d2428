"""`molf probe` at the terminal."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from molf import probe
from molf.config import load_params
from molf.errors import UserError


def forecasts(options: argparse.Namespace) -> str:
    """Probes the pairs of model and task that are asked for, printing each at once; returns what is said last."""
    for name, least in (("batches", 4), ("steps", 0), ("every", 1)):
        if (given := getattr(options, name)) < least:
            raise UserError(f"--{name} {given}: at least {least}")
    from molf import models

    models.quiet()  # before anything imports the libraries that it quiets
    from tqdm import tqdm

    from molf.probe import page

    params = load_params()
    pairs = probe.chosen(params, options.model, options.task)

    def watch(items: Sequence[Any], words: str) -> Iterable[Any]:
        return tqdm(items, desc=words, disable=None, leave=False)

    found = []
    for model, task in pairs:
        found.append(probe.probe(params, model, task, options.batches, options.steps, options.every, watch))
        if not options.json:
            print("\n".join([*page.lines(found[-1]), ""]), flush=True)
    if options.json:
        return json.dumps(found, indent=2)
    return (
        f"{probe.FOLDER} holds all numbers and a heat map each; what they mean: docs/probe.md\n"
        "next: make run, then molf probe --check"
    )


def check(folders: Sequence[Path], as_json: bool) -> str:
    """How many of the forecasts hit, as text or as JSON."""
    from molf.probe import hits

    judged = hits.find(folders)
    return json.dumps({"forecasts": judged, **hits.tally(judged)}, indent=2) if as_json else hits.table(judged)
