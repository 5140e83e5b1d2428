"""Time of an evaluation against the plain loop: `python -m benchmarks.evaluation`.

Every task's own scorer asks two models, which share their weights: ours, and one that takes an example at a time, calls
transformers' `generate` and runs a forward for each completion that is scored. Both must give the same predictions.
Timed is what the model takes, in CPU time, without a scorer's own work such as running queries. The floor counts what
no evaluation can do without: each distinct token in its context once through the linear layers, and the head where a
prediction is asked for, at the rate of one large product of matrices.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks import table
from benchmarks.device import Device
from benchmarks.measure import RESULTS, Result, Row, Settings, side_by_side
from molf import generate, presets
from molf.blocks import ChoiceOptions, CompletionOptions, GeneratedSource, MedOptions, NoOptions, SqlOptions
from molf.config import Evaluation, Params
from molf.encoding import Messages, encode_completion, encode_prompt
from molf.errors import UserError
from molf.evaluation import Answer, LanguageModel, Question
from molf.tasks import TASKS

BUILT_IN = ("sql", "med", "fact")  # the tasks of the CPU default
FASTER = 4.0  # times, at least, for each of these
# CPU time: with one thread what a clock on the wall shows where nothing else runs.
CLOCK = time.process_time
CLOSE = 1e-4  # log-probabilities that differ by less are the same
# Task kind: the generator's kind, and the task's options.
KINDS: dict[str, tuple[str, Any]] = {
    "sql": ("sql", SqlOptions(must_run=True)),
    "med": ("med", MedOptions(first_option=1)),
    "fact": ("fact", NoOptions()),
    "completion": ("sql", CompletionOptions(prompt="{sql_context}\n{sql_prompt}\nSQL:", completion="sql")),
    "choice": (
        "med",
        ChoiceOptions(question="question", options=["opa", "opb", "opc", "opd"], answer="cop", answer_is="index1"),
    ),
}


@dataclass
class Asked:
    """What a model was run on.

    Attributes:
        tokens: In all forwards, padding included.
        forwards: Calls of the model.
    """

    tokens: int = 0
    forwards: int = 0


class Clocked:
    """A model that adds up the CPU time of its answers."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.seconds = lm, 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = CLOCK()
            answer = getattr(self.lm, name)(*arguments)
            self.seconds += CLOCK() - started
            return answer

        return call


@dataclass
class PlainLoop:
    """One example at a time, a forward for each completion, and `generate`.

    Attributes:
        run: Every token sequence that was needed, the last token of each as far as it predicts something.
        predicting: Every context whose next token was asked for.
    """

    model: Any
    tokenizer: Any
    run: set[tuple[int, ...]] = field(default_factory=set)
    predicting: set[tuple[int, ...]] = field(default_factory=set)

    def answer(self, questions: Iterable[Question]) -> list[Answer]:
        return [
            Answer(
                [self._logprobs(prompt, completion) for completion in completions],
                self._text(prompt, longest) if longest else "",
            )
            for prompt, completions, longest in questions
        ]

    def choose(self, prompts: Iterable[str], choices: Sequence[str], longest: int) -> tuple[np.ndarray, list[str]]:
        answers = self.answer((prompt, choices, longest) for prompt in prompts)
        last = [[logprobs[-1] for logprobs in answer.logprobs] for answer in answers]
        return np.array(last), [answer.text for answer in answers]

    def generate(self, prompts: Iterable[str], longest: int) -> list[str]:
        return [self._text(prompt, longest) for prompt in prompts]

    def chat(self, conversations: Iterable[Messages], longest: int) -> list[str]:
        raise NotImplementedError("no generated rows are conversations")

    @torch.inference_mode()
    def _logprobs(self, prompt: str, completion: str) -> np.ndarray:
        before, after = encode_prompt(self.tokenizer, prompt), encode_completion(self.tokenizer, completion)
        self._note(before, after, len(after))
        ids = torch.tensor([before + after], device=self.model.device)
        logits = self.model(ids, logits_to_keep=len(after) + 1, use_cache=False).logits[0, :-1]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        return logprobs.gather(1, ids[0, len(before) :, None])[:, 0].double().cpu().numpy()

    def _text(self, prompt: str, longest: int) -> str:
        ids = encode_prompt(self.tokenizer, prompt)
        [said] = batched([ids], self.model, self.tokenizer, longest)
        self._note(ids, said, min(len(said) + 1, longest))
        return str(self.tokenizer.decode(said, skip_special_tokens=True))

    def _note(self, before: list[int], after: list[int], predicted: int) -> None:
        contexts = [(*before, *after[:count]) for count in range(predicted)]
        self.predicting.update(contexts)
        self.run.add(contexts[-1])


def batched(prompts: list[list[int]], model: Any, tokenizer: Any, longest: int) -> list[list[int]]:
    """What transformers' `generate` says greedily after prompts in one batch, without EOS and padding."""
    from transformers import GenerationConfig

    from molf.encoding import left_pad

    inputs = {name: tensor.to(model.device) for name, tensor in left_pad(prompts, tokenizer.pad_token_id).items()}
    config = GenerationConfig(
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
    )
    said = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in said]


def rows_of(kind: str, params: Params, share: float) -> pd.DataFrame:
    """Prepared test rows of a kind, generated as the preset `tiny` has them, or a share of them."""
    source, options = KINDS[kind]
    block = params.tasks[source].source
    assert isinstance(block, GeneratedSource)
    counts = {str(split): count for split, count in block.rows.items()}
    split = "test" if "test" in counts else "train"
    raw = pd.DataFrame(generate.rows(source, counts, seed=0)[split]).head(max(1, round(share * counts[split])))
    task = TASKS[kind]
    examples = task.to_examples(task.normalise(raw, options), options)
    return examples.assign(example_id=[f"{split}-{row}" for row in range(len(examples))])


def compared(kind: str, ours: LanguageModel, rows: pd.DataFrame, evaluation: Evaluation, settings: Settings) -> Result:
    """Both ways of asking in turn, and the floor.

    Raises:
        RuntimeError: They predict something else.
    """
    plain = PlainLoop(ours.model, ours.tokenizer)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    predictions: dict[str, pd.DataFrame] = {}

    def ask(name: str, lm: Any) -> None:
        clocked = Clocked(lm)
        predictions[name] = TASKS[kind].predict(clocked, rows, evaluation)  # type: ignore[arg-type]
        seconds[name].append(clocked.seconds)

    sides = {"ours": lambda: ask("ours", ours), "plain": lambda: ask("plain", plain)}
    runs = {name: counted(ours.model, call) for name, call in sides.items()}  # which warms up as well
    same(kind, *predictions.values())
    needed = floor(ours.model, plain)
    for samples in seconds.values():
        samples.clear()
    side_by_side(sides, settings.device, settings.rounds, warmup=0)
    rate = product_rate(settings.device)
    least = needed["flops"] / rate
    took = float(np.median(seconds["ours"]))
    # As a ratio of the plain loop's time to ours, so that more is better.
    limit = FASTER if kind in BUILT_IN and not settings.quick else None
    row = Row(f"{kind}: {len(rows)} examples", "ours", "s", seconds["plain"], seconds["ours"], limit, at_least=True)
    note = (
        f"{kind}: {needed['tokens']:,} distinct tokens ({needed['predictions']:,} predict), {runs['ours'].tokens:,} "
        f"run in {runs['ours'].forwards:,} forwards, plainly {runs['plain'].tokens:,} in {runs['plain'].forwards:,}; "
        f"floor {least:.3f} s at {rate / 1e9:.0f} GFLOP/s, ours {took / least:.1f} times that"
    )
    data = {
        "floor": {**needed, "flops_per_second": rate, "seconds": least},
        **{name: {"tokens": run.tokens, "forwards": run.forwards} for name, run in runs.items()},
    }
    return Result([row], [note], data)


def counted(model: Any, call: Callable[[], object]) -> Asked:
    """What a call runs a model on."""
    asked = Asked()

    def note(_: Any, arguments: Any, named: dict[str, Any]) -> None:
        asked.tokens += (named["input_ids"] if "input_ids" in named else arguments[0]).numel()
        asked.forwards += 1

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return asked


def same(kind: str, ours: pd.DataFrame, plain: pd.DataFrame) -> None:
    """Checks that two tables of predictions say the same, log-probabilities up to `CLOSE`.

    Raises:
        RuntimeError: They do not; with the first column in which they differ.
    """
    for name in ours.columns.tolist():
        left, right = ours[name].tolist(), plain[name].tolist()
        if "logprob" in name:
            pairs = zip(map(np.ravel, left), map(np.ravel, right), strict=True)
            equal = all(np.allclose(a, b, rtol=0, atol=CLOSE, equal_nan=True) for a, b in pairs)
        else:
            equal = all(a == b or pd.isna(a) and pd.isna(b) for a, b in zip(left, right, strict=True))
        if not equal:
            raise RuntimeError(f"{kind}: the plain loop predicts another {name}")


def floor(model: Any, plain: PlainLoop) -> dict[str, int]:
    """Distinct tokens that have to be run, predictions that have to be made, and the operations of both."""
    tokens = len({sequence[:end] for sequence in plain.run for end in range(1, len(sequence) + 1)})
    head = model.get_output_embeddings()
    layers = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    flops = 2 * (layers * tokens + head.weight.numel() * len(plain.predicting))
    return {"tokens": tokens, "predictions": len(plain.predicting), "flops": flops}


def product_rate(device: Device) -> float:
    """Operations a second in the product of two float32 matrices of 1,024 x 1,024; the best of ten."""
    a, b = (torch.randn(1024, 1024, device=device.type) for _ in range(2))
    return 2 * 1024**3 / min(side_by_side({"product": lambda: a @ b}, device, rounds=10, clock=CLOCK)["product"])


def endings(ours: LanguageModel, queries: list[str], others: list[str], longest: int, settings: Settings) -> Result:
    """Our greedy decoding against transformers' `generate` over the same batch, without and with a row that runs on.

    Every query that `tiny` writes has one word; with that as the end each row ends, but for one that is no query: of
    the other prompts the one with the longest text.
    """
    tokenizer = copy.deepcopy(ours.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(encode_completion(tokenizer, " FROM")[-1])
    lm = LanguageModel(ours.model, tokenizer, len(queries) + 1)
    runaway = max(others, key=dict(zip(others, map(len, lm.generate(others, longest)), strict=True)).__getitem__)
    result = Result()
    for what, asked in (("all short", queries), ("and one that runs on", [*queries, runaway])):
        encoded = [encode_prompt(tokenizer, prompt) for prompt in asked]
        said: dict[str, list[str]] = {}

        def own(asked: list[str] = asked, said: dict[str, list[str]] = said) -> None:
            said["own"] = lm.generate(asked, longest)

        def theirs(encoded: list[list[int]] = encoded, said: dict[str, list[str]] = said) -> None:
            rows = batched(encoded, ours.model, tokenizer, longest)
            said["theirs"] = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]

        took = side_by_side({"ours": own, "theirs": theirs}, settings.device, settings.rounds, warmup=1, clock=CLOCK)
        if said["own"] != said["theirs"]:
            raise RuntimeError("transformers' generate says something else")
        what = f"generate, {len(queries)} queries {what}"
        result.rows.append(Row(what, "ours", "s", took["theirs"], took["ours"]))
        lengths = sorted(len(tokenizer.encode(text, add_special_tokens=False)) for text in said["own"])
        result.notes.append(f"{what}: {lengths[0]} to {lengths[-2]} tokens, the longest {lengths[-1]}")
    return result


def run(arguments: Sequence[str]) -> None:
    """Measures every kind of task, prints the table and writes the samples.

    Raises:
        UserError: There is no model.
    """
    options = _options(arguments)

    from molf import models
    from molf.config import check_params
    from molf.paths import write_json

    models.quiet()
    if not (options.model / "config.json").is_file():
        raise UserError(
            f"--model: there is no checkpoint in {options.model}; `dvc repro base@tiny` makes tiny's, or name a folder"
        )
    params = check_params(presets.differences("tiny"), "the preset tiny")
    torch.set_num_threads(options.threads)
    settings = Settings(Device("cpu"), options.threads, options.rounds, options.share < 1, None, Path())
    facts = table.environment(settings)
    print(table.heading(facts) + "\n", flush=True)
    model, tokenizer = models.load_model(options.model, torch.float32), models.load_tokenizer(options.model)
    ours = LanguageModel(model, tokenizer, params.evaluation.batch_size)
    rows = {kind: rows_of(kind, params, options.share) for kind in KINDS}
    results: dict[str, Result] = {}
    for kind in KINDS:
        print(f"measuring {kind} ...", file=sys.stderr, flush=True)
        results[kind] = compared(kind, ours, rows[kind], params.evaluation, settings)
    queries = rows["sql"]["prompt"].tolist()[: params.evaluation.batch_size - 1]
    longest = params.evaluation.max_new_tokens.sql
    results["endings"] = endings(ours, queries, rows["fact"]["prompt"].tolist()[:64], longest, settings)
    print(table.markdown([row for result in results.values() for row in result.rows]))
    print("\n".join(["", *(note for result in results.values() for note in result.notes)]))
    path: Path = options.into / f"evaluation-{options.name or table.slug(facts)}.json"
    write_json(path, table.document(facts, results, {}))
    print(f"\nall samples: {path}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/tiny"), help="checkpoint (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each task (default: %(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of the generated rows (default: all)")
    parser.add_argument("--name", help="of the file (default: the hardware)")
    parser.add_argument("--into", type=Path, default=RESULTS, help="its folder (default benchmarks/results)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from molf.errors import main

    raise SystemExit(main(lambda: run(sys.argv[1:])))
