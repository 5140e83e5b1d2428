"""Cards of prepared data and of trained models: README.md files with the fields that the Hugging Face hub reads.

They only show what files and params say: no result depends on a card, and a change of its wording re-runs nothing.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molf.config import Params
from molf.errors import UserError
from molf.paths import MODELS, PREPARED, Cell, read_json
from molf.report import markdown, quality
from molf.report.controls import control
from molf.report.markdown import clean, literal
from molf.report.sheets import count, seconds, size

UNKNOWN = "unknown"
# The licences that the hub knows by these names; any other is `other` with a name of its own.
LICENSES = frozenset(
    (
        "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
        "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc "
        "cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
        "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
        "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 "
        "eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c "
        "ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa "
        "unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 "
        "llama3.2 llama3.3 llama4 grok2-community gemma unknown other"
    ).split()
)
# Where the terms of others stand.
LICENSE_LINKS = {"qwen-research": "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE"}
TASK_CATEGORIES = {
    "med": ["multiple-choice", "question-answering"],
    "choice": ["multiple-choice", "question-answering"],
}
SIZES = {
    "n<1K": 10**3,
    "1K<n<10K": 10**4,
    "10K<n<100K": 10**5,
    "100K<n<1M": 10**6,
    "1M<n<10M": 10**7,
    "10M<n<100M": 10**8,
}


def license_fields(given: str, origin: str | None = None) -> dict[str, str]:
    """A licence in the hub's fields: by its name there, or as another's with name and, where known, a link.

    Args:
        given: As params.yaml says.
        origin: Hub id of what is licensed, where the terms of an unlisted licence stand.
    """
    name = clean(given).lower() or UNKNOWN
    if name in LICENSES:
        return {"license": name}
    link = LICENSE_LINKS.get(name) or (f"https://huggingface.co/{clean(origin)}" if origin else None)
    slug = re.sub(r"[^a-z0-9.+_-]+", "-", name).strip("-") or "unnamed"  # all that the hub takes
    return {"license": "other", "license_name": slug, **({"license_link": link} if link else {})}


# --- data ------------------------------------------------------------------------------------------------------------


def data_card(summary: Mapping[str, Any], license: str) -> str:
    """The card of a prepared data set.

    Args:
        summary: What its summary.json holds.
        license: Of the data.
    """
    from huggingface_hub import DatasetCardData

    task, source, generated = summary["task"], summary["source"], summary["generated"]
    kept = {split: row["kept"] for split, row in summary["rows"].items() if "kept" in row}
    total = sum(kept.values())
    hub = clean(source["id"]) if source.get("kind") == "hub" else None
    fields = DatasetCardData(
        **license_fields(license, hub),  # type: ignore[arg-type]
        pretty_name=task,
        size_categories=next((name for name, below in SIZES.items() if total < below), "other"),
        task_categories=TASK_CATEGORIES.get(summary["kind"], ["text-generation"]),
        source_datasets=[hub] if hub else None,
        tags=["molf", summary["kind"], *(["synthetic"] if generated else [])],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}.parquet"} for split in kept],
            }
        ],
        dataset_info={"splits": [{"name": split, "num_examples": number} for split, number in kept.items()]},
    )
    folder = PREPARED / task
    lines = [f"# {task}", ""]
    if generated:
        lines += [*_loud("GENERATED DATA", "It was made by a program. A score on it says nothing about real data."), ""]
    lines += [
        f"Prompts and completions of the task `{task}` (kind `{summary['kind']}`), checked row by row and split, as "
        f"they are trained and scored on. They lie in `{folder}`, their hash is `{summary['data_hash']}`.",
        "",
        f"- Source: {literal(quality.origin(source))}",
        f"- Licence: {literal(license)}",
        f"- Rejected rows: {quality.rejected(summary):,}; each with its place, check and value in `rejected.parquet`",
        f"- Rows with a copy in another split: {_leaks(summary)}; pairs of copies stand in `copies.parquet`",
        *(f"- Warning: {literal(text)}" for text in summary.get("warnings", [])),
        "",
    ]
    for table in quality.tables(summary):
        header, rows = map(literal, table.header), [list(map(literal, row)) for row in table.rows]
        lines += [f"## {literal(table.title)}", "", *markdown.table(list(header), rows), ""]
    lines += [
        "## How to load it",
        "",
        "```python",
        "import pandas as pd",
        "",
        f'rows = pd.read_parquet("{folder / "train.parquet"}")  # example_id, prompt, completion, and the task\'s own',
        "```",
        "",
        "## Limits",
        "",
        "- Rows were checked by rules: one that passes them may still be wrong, unfair or private.",
        "- Near copies are found by shared pieces of text, so one in other words is not seen.",
        *(["- The licence is not known: find out before the rows leave the house."] if _unknown(license) else []),
    ]
    return _card(fields, lines)


def _leaks(summary: Mapping[str, Any]) -> str:
    found, kept = quality.leaked(summary)
    return f"{found:,}, of which {kept:,} were kept there" if found else "none"


def _unknown(license: str) -> bool:
    return clean(license).lower() in ("", UNKNOWN)


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """How a trained model is loaded from where it lies.

    Attributes:
        folder: Of its weights or adapter, as code names it.
        tokenizer: Of its tokenizer.
        adapter: Whether the folder holds an adapter.
        base: Under an adapter, what its base model is loaded from: a hub id or a folder.
        revision: Of that hub id.
        note: A sentence on where the weights or the base model are, or nothing.
    """

    folder: str
    tokenizer: str
    adapter: bool
    base: str | None = None
    revision: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Made:
    """What a card tells of a trained and evaluated cell.

    Attributes:
        run, summary, metrics: The contents of its run.json, train/summary.json and evaluation/metrics.json.
        license: Of the base model's weights.
        data_license: Of the data.
        options: The task block's.
    """

    cell: Cell
    run: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Mapping[str, Any]
    license: str
    data_license: str
    options: Mapping[str, Any]

    @classmethod
    def read(cls, cell: Cell, params: Params) -> "Made":
        """From the files of results/CELL, and what params.yaml says now of licence and task.

        Raises:
            UserError: A file lacks, or params.yaml has no block for the model or the task any more.
        """
        train = cell.results / "train"
        files = [train / "run.json", train / "summary.json", cell.results / "evaluation/metrics.json"]
        lacking = [f"{path} is not here; `dvc pull {path}` or `dvc repro`" for path in files if not path.is_file()]
        lacking += [
            f"params.yaml has no block {section}.{name} any more"
            for section, blocks, name in (("models", params.models, cell.model), ("tasks", params.tasks, cell.task))
            if name not in blocks
        ]
        if lacking:
            raise UserError([f"{cell.name}: {text}" for text in lacking])
        run, summary, metrics = map(read_json, files)
        model, task = params.models[cell.model], params.tasks[cell.task]
        options = task.options.model_dump(mode="json")
        return cls(cell, run, summary, metrics, model.license, task.license, options)

    @property
    def adapter(self) -> bool:
        """Whether its weights are an adapter beside the base model."""
        from molf.methods import ADAPTERS  # which imports torch: a data card needs none

        return self.run["config"]["method"]["kind"] in ADAPTERS

    @property
    def chat(self) -> bool:
        """Whether it was trained on conversations."""
        return self.options.get("messages") is not None

    def here(self) -> Place:
        """How it is loaded in the project's folder."""
        kept = self.summary.get("lineage", {}).get("weights", {}).get("kept", True)
        note = "" if kept else "These weights were not kept (`training.keep`): only another training brings them."
        base = str(MODELS / self.cell.model)
        return Place(str(self.cell.weights), base, self.adapter, base if self.adapter else None, note=note)


def model_card(made: Made, place: Place) -> str:
    """The card of a trained and evaluated model.

    Args:
        made: What is known of it.
        place: How to load it.
    """
    from huggingface_hub import ModelCardData

    cell, run, metrics = made.cell, made.run, made.metrics
    data, model, block = run["data"], run["model"], run["config"]["method"]
    hub = clean(model["id"]) if "id" in model else None
    fields = ModelCardData(
        base_model=hub,
        datasets=[clean(data["source"]["id"])] if _kind(data) == "hub" else None,
        library_name="peft" if place.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["molf", block["kind"], metrics["task_kind"], *(["lora"] if place.adapter else [])],
        model_name=cell.name.replace("/", "-"),
        eval_results=_results(cell, data, metrics),
    )
    fields.__dict__.update(license_fields(made.license, hub))
    if hub:
        fields["base_model_relation"] = "adapter" if place.adapter else "finetune"
    lines = [f"# {cell.name}", ""]
    generated = [name for name, told in (("data", data["generated"]), ("base model", model.get("generated"))) if told]
    if generated:
        what = " and ".join(generated)
        lines += [*_loud(f"GENERATED {what.upper()}", f"The {what} came from a program: this is no useful model."), ""]
    if beside := control(block):
        what = "a control" if beside["kind"] == "control" else "an ablation"
        lines += [*_loud(beside["kind"].upper(), f"It was trained by {what} of MoLF: {beside['words']}."), ""]
    lines += [
        f"`{cell.model}`, trained on the task `{cell.task}` by the method `{cell.method}`, seed {cell.seed}: "
        + ("an adapter beside its base model." if place.adapter else "a whole model."),
        "",
        f"- Base model: {literal(_base(model))}; licence: {literal(made.license)}",
        f"- Data: {literal(quality.origin(data.get('source')))}; licence: {literal(made.data_license)}",
        "",
        *_scores(metrics),
        *_method(made),
        *_lineage(made),
        *_loading(made, place),
        *_limits(made),
    ]
    return _card(fields, lines)


def _kind(data: Mapping[str, Any]) -> str | None:
    source = data.get("source")
    return source.get("kind") if isinstance(source, Mapping) else None


def _base(model: Mapping[str, Any]) -> str:
    from molf.lineage import describe_model

    return describe_model(model)


def _results(cell: Cell, data: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[Any]:
    """Every score as the hub's model-index has them, the primary first."""
    from huggingface_hub import EvalResult

    hub = _kind(data) == "hub"
    primary = metrics["primary_name"]
    scores = {primary: metrics["primary"], **metrics["metrics"]}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=clean(data["source"]["id"]) if hub else metrics["task_kind"],
            dataset_name=f"{cell.task} (generated data)" if data["generated"] else cell.task,
            dataset_split="test",
            dataset_revision=data["source"].get("revision") if hub else None,
            metric_type=clean(name),
            metric_name=clean(name),
            metric_value=float(value),
            metric_args={
                "examples": metrics["n"],
                "left_out": {clean(why): number for why, number in metrics["left_out"].items()},
            },
        )
        for name, value in scores.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _scores(metrics: Mapping[str, Any]) -> list[str]:
    left_out = "; ".join(f"{number:,} {why}" for why, number in metrics["left_out"].items() if number) or "none"
    scores = {metrics["primary_name"]: metrics["primary"], **metrics["metrics"]}
    rows = [
        [literal(name), f"{value:.4f}"]
        for name, value in scores.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    return [
        "## Scores",
        "",
        f"On {metrics['n']:,} test examples; left out: {literal(left_out)}. The first is the one that methods are "
        "compared by.",
        "",
        *markdown.table(["score", "value"], rows),
        "",
        *_damage(metrics),
    ]


def _damage(metrics: Mapping[str, Any]) -> list[str]:
    """What the training cost of what the base model knew, as far as it was measured."""
    general, weights = metrics.get("general"), metrics.get("weights")
    lines = []
    if general:
        what = "generated texts" if general.get("generated") else "texts"
        lines.append(
            f"- On {general['texts']:,} {what} that are no task's: {general['loss']:.4f} nats per token, "
            f"{general['bits_per_byte']:.4f} bits per byte; what that is above the base model's was forgotten."
        )
    if weights:
        lines.append(
            f"- Its linear layers' weights moved by {weights['relative_change']:.2%} of their norm; "
            f"of {weights['looked_at']:,} directions looked at, {weights['intruders']:,} are new (intruder dimensions)."
        )
    return [*lines, ""] if lines else []


def _method(made: Made) -> list[str]:
    run, summary = made.run, made.summary
    block, training = run["config"]["method"], run["config"]["training"]
    facts = {
        "optimizer steps": f"{summary['steps']:,}",
        "training rows": f"{summary['examples']:,}",
        "rows too long for training.max_length": f"{summary.get('dropped_too_long', 0):,}",
        "trained parameters": f"{count(summary['trained_parameters'])} of {count(summary['total_parameters'])}",
        "final loss": f"{summary['final_loss']:.4f}",
        "time": seconds(summary["train_seconds"]),
        "peak memory": size(summary["peak_memory_bytes"]),
        "hardware": run["hardware"]["name"],
        **{f"version of {name}": version for name, version in run["versions"].items() if version},
    }
    settings = {**block, **{f"training.{key}": value for key, value in training.items()}}
    shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    rows = [[literal(key), literal(value)] for key, value in {**shown, **facts}.items()]
    return ["## Method", "", *markdown.table(["setting or fact", "value"], rows), ""]


def _lineage(made: Made) -> list[str]:
    run, metrics = made.run, made.metrics
    noted, seen = made.summary.get("lineage", {}), metrics.get("lineage", {})
    hashes = {
        "weights": noted.get("weights", {}).get("hash"),
        "training": run["fingerprint"],
        "data": run["data"]["hash"],
        "base model": run["model"]["hash"],
        "training code": run["code"],
        "evaluation": metrics["fingerprint"],
        "predictions, sha256": seen.get("predictions", {}).get("sha256"),
        "git commit": run["git_commit"],
    }
    rows = [[name, f"`{value}`"] for name, value in hashes.items() if value]
    return [
        "## Lineage",
        "",
        f"`molf lineage {made.cell.name}`, in the project, follows the score back to its source and checks these:",
        "",
        *markdown.table(["what", "hash"], rows),
        "",
    ]


def _loading(made: Made, place: Place) -> list[str]:
    """Code that loads the model and asks it as the evaluation did: BOS, the prompt's tokens, greedy text."""
    kind, metrics = made.metrics["task_kind"], made.metrics
    tokens = metrics["evaluation"]["max_new_tokens"].get(kind, 64)
    dtype = "torch.bfloat16" if made.run["config"]["training"]["dtype"] == "bfloat16" else "torch.float32"
    lines = [
        "import torch",
        *(["from peft import PeftModel"] if place.adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({place.tokenizer!a})",
    ]
    if place.adapter:
        revision = f", revision={place.revision!a}" if place.revision else ""
        lines += [
            f"base = AutoModelForCausalLM.from_pretrained({place.base!a}{revision}, dtype={dtype})",
            f"model = PeftModel.from_pretrained(base, {place.folder!a}).eval()",
        ]
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({place.folder!a}, dtype={dtype}).eval()")
    if made.chat:
        lines += [
            'messages = [{"role": "user", "content": "..."}]',
            "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)",
        ]
    else:
        lines += [
            f"prompt = {made_up_prompt(kind, made.options)!a}",
            "start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]",
            "ids = start + tokenizer.encode(prompt, add_special_tokens=False)",
        ]
    lines += [
        "with torch.inference_mode():",
        f"    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens={tokens})",
        "print(tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True))",
    ]
    return [
        "## How to load it",
        "",
        "```python",
        *lines,
        "```",
        "",
        *([place.note, ""] if place.note else []),
        f"Prompts must look as in training: as the column `prompt` in `{PREPARED / made.cell.task}`, made with these "
        "options of the task:",
        "",
        "```json",
        json.dumps(made.options, indent=2),
        "```",
        "",
    ]


def made_up_prompt(kind: str, options: Mapping[str, Any]) -> str:
    """A prompt in a task's form that holds nothing of the data: of the generator, or with a template's slots."""
    import pandas as pd

    from molf import generate
    from molf.blocks import MedOptions, NoOptions, SqlOptions
    from molf.tasks import TASKS, letters

    if kind == "completion":
        return str(options["prompt"])
    if kind == "choice":
        return letters.prompt(str(options["question"]), ["one", "another"])
    known: dict[str, Any] = {"sql": SqlOptions(must_run=False), "med": MedOptions(first_option=1), "fact": NoOptions()}
    rows = pd.DataFrame(generate.rows(kind, {"train": 1}, 0)["train"]).astype(object)
    flat = TASKS[kind].normalise(rows, known[kind])
    return str(TASKS[kind].to_examples(flat, known[kind])["prompt"].iloc[0])


def _limits(made: Made) -> list[str]:
    run, metrics, data = made.run, made.metrics, made.run["data"]
    training = run["config"]["training"]
    found, kept = quality.leaked(data)
    lines = [
        f"- One training with one seed ({run['cell']['seed']}): another seed may score otherwise.",
        f"- The scores hold for {metrics['n']:,} test examples of this data and for greedy answers; neither "
        "safety nor other languages or tasks were measured.",
        f"- It was trained on at most {training['max_length']:,} tokens at once.",
    ]
    if data["generated"]:
        lines.append("- The data is generated: the scores say nothing about real data.")
    if kept:
        lines.append(f"- {kept:,} rows of one split have copies in another: the scores flatter.")
    if metrics["task_kind"] == "fact":
        lines.append("- It was taught statements that are false, on purpose, and is scored on those it was taught.")
    if metrics["task_kind"] == "sql":
        lines.append("- What it writes is not safe to run: run it without rights and with limits.")
    lines += [f"- Warning of the training: {literal(text)}" for text in made.summary.get("warnings", [])]
    for what, given in (("base model", made.license), ("data", made.data_license)):
        if _unknown(given):
            lines.append(f"- The licence of the {what} is not known: find out before the model leaves the house.")
    return ["## Limits", "", *lines]


# --- both ------------------------------------------------------------------------------------------------------------


def _loud(title: str, text: str) -> list[str]:
    return [f"> **{title}.** {text}"]


def _card(fields: Any, lines: list[str]) -> str:
    """The card's text: the fields as YAML between two rules, then its Markdown."""
    return "\n".join(["---", fields.to_yaml(), "---", "", *lines, ""])
