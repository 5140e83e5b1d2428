"""`molf`: the pipeline's command line, what can be typed. What it does is in `commands`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from molf import commands
from molf.config import NewTokens
from molf.errors import main


def entry() -> None:
    """The console script."""
    raise SystemExit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
        Exit code: 0, 1 after a failed run, 2 after bad input.
    """
    parser = argparse.ArgumentParser(
        prog="molf", description="Fine-tune with FFT, LoRA and MoLF, and see which to use on your data."
    )
    parsers = parser.add_subparsers(dest="command", required=True)
    parsers.add_parser(
        "run",
        help="bring everything up to date (dvc repro) and print the comparison",
        epilog="next: open reports/report.html; `molf show` prints the comparison again, `molf lineage CELL` follows a "
        "score back to its source, `molf predict CELL FILE` asks a trained model",
    )
    parsers.add_parser("check", help="look for mistakes in params.yaml")
    look = parsers.add_parser("inspect", help="look at a data file: its task, what is wrong, the block to paste")
    look.add_argument("file", help="JSONL, JSON, CSV, TSV or Parquet, also .gz or .zst; a path, a URL or a folder")
    look.add_argument(
        "--split-of", action="append", default=[], metavar="SPLIT=FILE", help="the file of validation or test"
    )
    look.add_argument("--kind", choices=list(NewTokens.model_fields), help="the task's kind, if the guess is wrong")
    look.add_argument("--model", help="whose tokens are counted (default: the grid's first)")
    look.add_argument("--rows", type=int, default=3, metavar="N", help="first rows to print (default 3)")
    look.add_argument("--first", type=int, metavar="N", help="look at the first N rows of each file only")
    look.add_argument("--yaml", action="store_true", help="print the block alone")
    estimate = parsers.add_parser("estimate", help="say what memory, disk and time the grid needs")
    estimate.add_argument("--probe", type=int, default=2, metavar="N", help="optimizer steps to time (default 2)")
    estimate.add_argument("--no-probe", action="store_true", help="memory and disk only, in seconds")
    estimate.add_argument("--json", action="store_true", help="all numbers, in bytes and seconds")
    probe = parsers.add_parser("probe", help="look at the gradients, and forecast which method wins and which rank")
    probe.add_argument("--model", help="one model of the grid (default: all)")
    probe.add_argument("--task", help="one task of the grid (default: all)")
    probe.add_argument("--batches", type=int, default=32, metavar="N", help="batches to look at (default 32)")
    probe.add_argument("--steps", type=int, default=4, metavar="N", help="first steps to route; 0: none (default 4)")
    probe.add_argument("--every", type=int, default=1, metavar="N", help="each N-th layer only: less time and memory")
    probe.add_argument("--json", action="store_true", help="all numbers")
    probe.add_argument(
        "--check", nargs="*", type=Path, metavar="FOLDER", help="how often forecasts hit (default: all comparisons)"
    )
    parsers.add_parser("show", help="print the last comparison")
    compare = parsers.add_parser("compare", help="fail if a score fell since a git revision: a gate for CI")
    compare.add_argument("--against", metavar="REVISION", help="such as main, HEAD~1, a tag")
    compare.add_argument("--json", action="store_true", help="all numbers, and which examples were lost and won")
    preset = parsers.add_parser("preset", help="apply a preset to params.yaml and show what changes")
    preset.add_argument("name", nargs="?", help="without it, the presets are listed")
    preset.add_argument("--dry-run", action="store_true", help="only show what would change")
    parsers.add_parser("pin", help="pin hub revisions and URLs in sources.lock")
    lineage = parsers.add_parser("lineage", help="follow a cell's score back to its source, and check every hash")
    lineage.add_argument(
        "cell", help="as the report shows it: MODEL/TASK/METHOD/seed-S; METHOD base: the model as it came"
    )
    lineage.add_argument("--json", action="store_true", help="all links as JSON")
    export = parsers.add_parser("export", help="write a cell's model into a folder that transformers or PEFT loads")
    export.add_argument("cell", help="as the report shows it: MODEL/TASK/METHOD/seed-S")
    export.add_argument("directory", type=Path, help="new or empty")
    export.add_argument("--merge", action="store_true", help="write the whole model instead of an adapter")
    export.add_argument("--force", action="store_true", help="replace what an earlier export wrote there")
    predict = parsers.add_parser("predict", help="answer a file of prompts with a cell's model")
    predict.add_argument(
        "cell", help="as the report shows it: MODEL/TASK/METHOD/seed-S; METHOD base: the model as it came"
    )
    predict.add_argument(
        "file",
        help="rows with the task's columns, or a column prompt: JSONL, JSON, CSV, TSV, Parquet, also .gz or .zst; "
        "or .txt with a prompt a line; - reads such lines from a pipe",
    )
    predict.add_argument("--with", dest="other", metavar="CELL", help="another cell of that kind of task, beside it")
    predict.add_argument(
        "--out", type=Path, metavar="FILE", help=".jsonl, .csv or .tsv (default: JSON lines, or text on a terminal)"
    )
    predict.add_argument("--rows", type=int, metavar="N", help="the first N rows only")
    predict.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: as in evaluation)")
    promote = parsers.add_parser("promote", help="make each task's best model that passes the gate its champion")
    promote.add_argument("--task", help="one task of the grid (default: all)")
    promote.add_argument("--dry-run", action="store_true", help="only say what would happen")
    champion = parsers.add_parser("champion", help="say which model is a task's champion, or write it into a folder")
    champion.add_argument("--task", required=True)
    champion.add_argument("--previous", action="store_true", help="the one before it")
    champion.add_argument("--out", type=Path, metavar="FOLDER", help="new or empty: where to write it")
    champion.add_argument("--force", action="store_true", help="replace what an earlier export wrote there")
    parsers.add_parser("track", help="add every run that MLflow lacks, from the files of results/")
    ui = parsers.add_parser("ui", help="open MLflow's page")
    ui.add_argument("--port", type=int, default=5000)
    join = parsers.add_parser("join", help="train cells together with another host, where they are run")
    join.add_argument("meet", metavar="ADDRESS:PORT", help="what MOLF_MEET says there")
    join.add_argument(
        "--minutes",
        type=float,
        default=60,
        metavar="N",
        help="that this waits for a cell (default 60)",
    )
    publish = parsers.add_parser("publish", help="copy the last comparison and its params into a folder to commit")
    publish.add_argument("directory", type=Path)
    data = parsers.add_parser("data", help="look at versions of the data sets").add_subparsers(
        dest="action", required=True
    )
    diff = data.add_parser("diff", help="show which rows and reasons of rejection changed since a git revision")
    diff.add_argument("revision", help="such as HEAD~1, a branch, a tag")
    diff.add_argument("task", nargs="?", help="one task of params.yaml (default: all)")
    diff.add_argument("--to", metavar="REVISION", help="compare with this one instead of the working tree")
    diff.add_argument("--key", metavar="COLUMN", help="tells rows apart (default: a column that is an id, if any)")
    diff.add_argument("--json", action="store_true", help="all numbers, and whole example rows")
    options = parser.parse_args(arguments)
    match options.command:
        case "run":
            return main(commands.repro)
        case "check":
            return main(commands.check)
        case "inspect":
            return main(lambda: commands.inspect_file(options))
        case "estimate":
            return main(lambda: commands.estimate_grid(None if options.no_probe else options.probe, options.json))
        case "probe":
            return main(lambda: commands.probe_grid(options))
        case "show":
            return main(commands.show)
        case "compare":
            return main(lambda: commands.compare_with(options.against, options.json))
        case "preset":
            return main(lambda: commands.apply_preset(options.name, options.dry_run))
        case "pin":
            return main(commands.pin)
        case "lineage":
            return main(lambda: commands.show_lineage(options.cell, options.json))
        case "export":
            return main(lambda: commands.export_cell(options.cell, options.directory, options.merge, options.force))
        case "predict":
            return main(lambda: commands.predict_file(options))
        case "promote":
            return main(lambda: commands.promote_models(options.task, options.dry_run))
        case "champion":
            return main(lambda: commands.show_champion(options.task, options.previous, options.out, options.force))
        case "track":
            return main(commands.track)
        case "ui":
            return main(lambda: commands.open_ui(options.port))
        case "join":
            return main(lambda: commands.join_head(options.meet, options.minutes))
        case "data":
            return main(
                lambda: commands.diff_data(options.revision, options.to, options.task, options.key, options.json)
            )
        case _:
            return main(lambda: commands.publish_results(options.directory))


if __name__ == "__main__":
    entry()
