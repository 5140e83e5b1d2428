"""A small tree of results with known numbers, as the stages would have left it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from molf import tuning
from molf.config import Params, cell_config, check_params, fingerprint, trial_config, untrained_fingerprint
from molf.paths import RATES, Cell, Trial, file_hash, write_json, write_parquet

EXAMPLES = 40
STEPS = 12
MODULES = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
EXPERTS = {"molf": ["full", "lora_r8"], "molf-e": ["lora_r4", "lora_r8"]}
# Right answers of 40 on sql, by method; fact's three components are shifted from these.
RIGHT = {"base": 4, "fft": 30, "lora": 20, "molf": 32, "molf-e": 22}
# Scores of a sweep's trials by rising factor: one best between others, one at the end, a tie, one that diverges.
SWEPT = {"fft": (0.5, 0.7, 0.6), "lora": (0.4, 0.5, 0.6), "molf": (0.6, 0.8, 0.8), "molf-e": (0.5, 0.6, None)}
HOSTILE = "<script>alert(1)</script>"
TEXTS = 12  # general texts; a method's place in the grid is how many nats each of them got worse by


def raw_params(tasks: tuple[str, ...] = ("sql", "fact"), seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A params.yaml of one tiny model, the four methods and the given tasks and seeds."""
    rates = {"learning_rate": 1e-3, "weight_decay": 0.0}
    lora = {"lora_alpha": 16, "use_rslora": True, "lora_dropout": 0.0, "exclude_modules": ["lm_head"]}
    routed = {**lora, "top_k": 1, "score": "epd", **rates}
    return {
        "grid": {
            "models": ["tiny"],
            "tasks": list(tasks),
            "methods": ["fft", "lora", "molf", "molf-e"],
            "seeds": list(seeds),
            "tune": [],
        },
        "models": {
            "tiny": {
                "kind": "tiny",
                "path": "x.py",
                "seed": 0,
                "layers": 3,
                "width": 64,
                "heads": 2,
                "vocabulary": 300,
                "steps": 1,
            }
        },
        "tasks": {
            task: {
                "kind": task,
                "source": {"kind": "generated", "path": "x.py", "seed": 0, "rows": {"train": 9}},
                "limits": {"train": None, "validation": None, "test": None},
                "license": "cc-by-4.0",
                "split": {"validation": 0.1, "test": 0.1, "seed": 0, "group": None},
                "duplicates": {"similarity": 0.85, "across": "drop"},
                "max_rejected": 0.01,
                "options": {"sql": {"must_run": True}, "med": {"first_option": 1}}.get(task, {}),
                "training": {},
            }
            for task in tasks
        },
        "methods": {
            "fft": {"kind": "fft", **rates},
            "lora": {"kind": "lora", "r": 8, **lora, **rates},
            "molf": {
                "kind": "molf",
                "r": [8],
                "forward": "auto",
                **routed,
                "lora_learning_rate": 1e-3,
                "lora_weight_decay": 0.0,
            },
            "molf-e": {"kind": "molf-e", "r": [4, 8], **routed},
        },
        "training": {
            "max_length": 64,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "epochs": 1,
            "max_steps": None,
            "schedule": "cosine",
            "warmup": 0.1,
            "max_grad_norm": 1.0,
            "dtype": "float32",
            "moments": "float32",
            "threads": 1,
            "processes": 1,
            "sharding": "auto",
            "keep": "none",
        },
        "general": {"kind": "none", "path": "sources.lock"},
        "checkpoint": {"minutes": None, "steps": None, "keep": 1},
        "evaluation": {
            "batch_size": 8,
            "max_new_tokens": dict.fromkeys(("sql", "med", "fact", "completion", "choice"), 8),
            "weights": {"top": 10, "threshold": 0.5},
        },
        "compare": {"margin": 0.05, "confidence": 0.95, "bootstrap": 500, "seed": 0},
        "tracking": {"experiment": "molf"},
    }


def describe_data(task: str) -> dict[str, Any]:
    """What run.json says of a task's data: three rows were rejected, two have copies in another split."""
    first = {"file": 0, "source_row": 7, "value": "w" * 30}
    return {
        "hash": f"hash-of-{task}",
        "task": task,
        "kind": task,
        "generated": True,
        "license": "cc-by-4.0",
        "source": {
            "kind": "generated",
            "generated": True,
            "name": task,
            "files": {"train": [{"from": "the built-in generator", "rows": 60, "bytes": None, "sha256": None}]},
            "seed": 3,
        },
        "rows": {
            "train": {"raw": 60, "rejected": 3, "duplicates": 4, "near_duplicates": 1, "kept": 48},
            "validation": {"raw": 0, "rejected": 0, "duplicates": 0, "near_duplicates": 0, "kept": 5},
            "test": {"raw": 0, "rejected": 0, "duplicates": 0, "near_duplicates": 0, "kept": EXAMPLES},
        },
        "reasons": [{"split": "train", "column": "question", "check": "is not empty", "rows": 3, "first": first}],
        "noticed": [],
        "leaks": [{"split": "train", "of_split": "test", "exact": 1, "near": 1, "dropped": 0}],
        "answers": {"test": {"most_common": "A", "share": 0.55, "distinct": 4}},
        "lengths": {"test": {"prompt": {"median": 50, "p95": 80, "longest": 1234}}},
        "warnings": ["test: 55% of the answers are 'A'"],
    }


def write_tree(root: Path, raw: dict[str, Any]) -> Params:
    """Writes params.yaml and every cell of its grid, the untrained model's included; returns the params."""
    params = check_params(raw, "params.yaml")
    (root / "params.yaml").write_text(json.dumps(raw))
    for trial in params.trials():
        scores = SWEPT[trial.method]
        write_trial(root, params, trial, scores[min(sorted(params.grid.tune).index(trial.factor), len(scores) - 1)])
    if params.grid.tune:
        write_json(root / RATES, tuning.choose(params, root))
    for cell in params.cells():
        write_cell(root, params, cell)
    for task in params.grid.tasks:
        write_evaluation(root, Cell("tiny", task, "base", 0), task, untrained_fingerprint("hash-of-tiny"), params)
    return params


def write_trial(root: Path, params: Params, trial: Trial, score: float | None, loss: float = 1.0) -> None:
    """A sweep's training as its stage leaves it; without a score it diverged."""
    record = {
        "trial": vars(trial),
        "config": trial_config(params, trial),
        "primary_name": None if score is None else "execution_accuracy",
        "score": score,
        "loss": None if score is None else loss,
        "diverged": "step 3: loss nan" if score is None else None,
        **{"n": 60, "steps": 8, "train_seconds": 1.0, "seconds": 1.0, "fingerprint": "0" * 16},
    }
    write_json(root / trial.record, record)


def write_cell(root: Path, params: Params, cell: Cell) -> None:
    """Writes a trained and evaluated cell; sizes and times depend on the method's place in the grid."""
    train, place = root / cell.results / "train", params.grid.methods.index(cell.method)
    rng = np.random.default_rng(place)
    steps = np.arange(1, STEPS + 1)
    frame = pd.DataFrame(
        {
            "step": steps,
            "loss": 3 * np.exp(-steps / (4 + place)) + rng.uniform(0, 0.2, STEPS),
            "learning_rate": np.linspace(1e-3, 1e-4, STEPS),
            "grad_norm": rng.uniform(0.5, 1.5, STEPS),
            "tokens": 100,
            "tokens_per_second": 900.0 + 100 * place,
            "seconds": steps * (0.5 + 0.1 * place),
            "peak_memory_bytes": (4 - place) * 10**8,
        }
    )
    write_parquet(train / "history.parquet", frame)
    routing = None
    if cell.method in EXPERTS:
        experts = EXPERTS[cell.method]
        rows = [
            (step, module, expert, 1.0, ((step + layer) % 4 != 0) == (expert == experts[0]), step > 1)
            for step in range(1, STEPS + 1)
            for layer, module in enumerate(MODULES)
            for expert in experts
        ]
        record = pd.DataFrame(rows, columns=["step", "module", "expert", "score", "won", "counted"])
        write_parquet(train / "routing.parquet", record)
        share = record[record["counted"]].groupby("expert")["won"].mean().to_dict()
        routing = {"experts": experts, "share": share, "share_by_module": {}, "one_sided": False}
    config = cell_config(params, cell, root)
    key = fingerprint(config, cell.name)
    summary = {
        "cell": cell.name,
        "fingerprint": key,
        "method_kind": params.methods[cell.method].kind,
        "steps": STEPS,
        "final_loss": float(frame["loss"].iloc[-1]),
        "train_seconds": float(frame["seconds"].iloc[-1]),
        "tokens_per_second": 900.0 + 100 * place,
        "peak_memory_bytes": (4 - place) * 10**8,
        "trained_parameters": 10**6 * (4 - place),
        "total_parameters": 4 * 10**6,
        "weights_bytes": 10**7,
        "energy_joules": 100.0 * (4 - place),
        "energy_source": "CPU packages (RAPL)",
        "other_load": 0.1,
        "contended": False,
        "examples": 48,
        "dropped_too_long": 0,
        "routing": routing,
        "warnings": [],
        "lineage": {"weights": {"path": str(cell.weights), "hash": f"weights-of-{cell.method}", "kept": True}},
    }
    write_json(train / "summary.json", summary)
    run = {
        "cell": {"model": cell.model, "task": cell.task, "method": cell.method, "seed": cell.seed},
        "fingerprint": key,
        "config": config,
        "data": describe_data(cell.task),
        "model": {"hash": "hash-of-tiny", "name": "tiny", "kind": "tiny", "generated": True},
        "code": "c" * 16,
        "git_commit": "0" * 40,
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "hardware": {"name": "a machine", "threads": 1, "fingerprint": "cpu"},
        "started": "2026-01-02T03:04:05+00:00",
        "generated_data": True,
    }
    write_json(train / "run.json", run)
    write_evaluation(root, cell, cell.task, key, params)


def write_evaluation(root: Path, cell: Cell, kind: str, train_fingerprint: str, params: Params) -> None:
    """Writes predictions: `RIGHT[method]` right answers, one fewer for each further seed, the last example left out.

    The paper's own score (sql's `exact_match`, fact's `efficacy_first_token`) has two right answers fewer, over all.
    """
    right = RIGHT[cell.method] - cell.seed
    hits = np.array([1.0] * right + [0.0] * (EXAMPLES - right))
    fewer = np.array([1.0] * (right - 2) + [0.0] * (EXAMPLES - right + 2))
    components = {
        "sql": ["execution_accuracy"],
        "med": ["accuracy"],
        "fact": ["efficacy", "paraphrase", "neighborhood"],
    }[kind]
    gold = [f"answer {i}" for i in range(EXAMPLES)]
    predictions = pd.DataFrame(
        {
            "example_id": [f"e{i}" for i in range(EXAMPLES)],
            "prediction": [text if hit else f"{HOSTILE} {text}" for text, hit in zip(gold, hits, strict=True)],
            "prompt": [f"question {i}: {HOSTILE} & how?" for i in range(EXAMPLES)],
            "gold": gold,
            **{name: np.roll(hits, i) for i, name in enumerate(components)},
        }
    )
    predictions.loc[EXAMPLES - 1, components] = np.nan
    others = {"sql": ("exact_match", "valid_sql"), "med": (), "fact": ("efficacy_first_token", "accuracy")}[kind]
    predictions = predictions.assign(**dict.fromkeys(others, fewer))
    means = predictions[components].mean()
    primary = float(len(means) / (1 / means).sum())
    folder = root / cell.results / "evaluation"
    write_parquet(folder / "predictions.parquet", predictions)
    metrics = {
        "cell": {"model": cell.model, "task": cell.task, "method": cell.method, "seed": cell.seed},
        "fingerprint": fingerprint("evaluation", train_fingerprint, cell.name),
        "train_fingerprint": train_fingerprint,
        "data_hash": f"hash-of-{cell.task}",
        "task_kind": kind,
        "evaluation": params.evaluation.model_dump(mode="json"),
        "code": "e" * 16,
        "primary": primary,
        "primary_name": {"sql": "execution_accuracy", "med": "accuracy", "fact": "score"}[kind],
        "n": EXAMPLES - 1,
        "left_out": {"gold does not run": 1} if kind == "sql" else {},
        "metrics": {
            **{name: float(predictions[name].mean()) for name in (*components, *others)},
            **({"errors": {"syntax": 1 + cell.seed, "no_such_column": 2}} if kind == "sql" else {}),
        },
        "seconds": 1.0,
        "general": write_general(folder, params, cell),
        "weights": None if cell.method == "base" else write_weights(folder, params, cell),
        "lineage": {
            "predictions": {"path": "predictions.parquet", "sha256": file_hash(folder / "predictions.parquet")},
            "weights": {"hash": f"weights-of-{cell.method}"},
        },
    }
    write_json(folder / "metrics.json", metrics)


def write_general(folder: Path, params: Params, cell: Cell) -> dict[str, Any]:
    """Writes the loss on general texts, which grows with the method's place in the grid; returns its summary."""
    place = 0 if cell.method == "base" else 1 + params.grid.methods.index(cell.method)
    texts = np.arange(TEXTS)
    frame = pd.DataFrame(
        {
            "text_id": [f"t{i}" for i in texts],
            "tokens": 20 + texts,
            "bytes": 80 + 4 * texts,
            "nll": 2.0 * (20 + texts) + place * (1 + 0.1 * np.cos(texts + cell.seed)),
        }
    )
    write_parquet(folder / "general.parquet", frame)
    loss = float(frame["nll"].sum() / frame["tokens"].sum())
    return {
        "loss": loss,
        "bits_per_byte": float(frame["nll"].sum() / frame["bytes"].sum() / np.log(2)),
        "texts": TEXTS,
        "tokens": int(frame["tokens"].sum()),
        "hash": "hash-of-general",
    }


def write_weights(folder: Path, params: Params, cell: Cell) -> dict[str, Any]:
    """Writes how each matrix has changed, more so by layer and by the method's place; returns its summary."""
    place = 1 + params.grid.methods.index(cell.method)
    rows = [
        {
            "module": module,
            "layer": int(module.split(".")[2]),
            "type": module.split(".", 3)[3],
            "rows": 64,
            "columns": 64,
            "base_norm": 10.0,
            "change_norm": 0.1 * place * (1 + int(module.split(".")[2])),
            "effective_rank": 4.0 * place,
            "intruders": place - 1,
            "top": 10,
        }
        for module in MODULES
    ]
    frame = pd.DataFrame(rows)
    write_parquet(folder / "weights.parquet", frame)
    return {
        "relative_change": float(np.sqrt((frame["change_norm"] ** 2).sum() / (frame["base_norm"] ** 2).sum())),
        "effective_rank": float(frame["effective_rank"].mean()),
        "intruders": int(frame["intruders"].sum()),
        "looked_at": int(frame["top"].sum()),
        "top": 10,
        "threshold": 0.6,
    }
