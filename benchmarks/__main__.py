"""`python -m benchmarks`: measures every case side by side, prints one table, keeps all samples in a file."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measure import RESULTS, Result, Settings, Skipped


def cases() -> dict[str, Callable[[Settings], Result]]:
    """All cases by name, in the table's order."""
    from benchmarks import head, memory, optimizer, selection, steps

    return {
        "step": steps.molf_step,
        "memory": memory.molf_memory,
        "optimizer": optimizer.routed_update,
        "efficient": steps.efficient_step,
        "efficient-memory": memory.efficient_memory,
        "selected": selection.selected_step,
        "recording": steps.recording,
        "head": head.supervised_head,
    }


def run(arguments: Sequence[str]) -> None:
    """Measures what the arguments ask for and writes the samples.

    Raises:
        UserError: `--gemma` names no checkpoint.
    """
    options = _options(arguments)

    import torch

    from benchmarks import real, table
    from benchmarks.device import Device
    from molf.models import quiet
    from molf.paths import write_json

    quiet()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, chosen = Device.found(), cases()
    if options.only:
        chosen = {name: chosen[name] for name in options.only}
    # Converted on first use, which takes a while: only for a case that trains it.
    wanted = not options.quick and (not chosen.keys().isdisjoint({"head", "selected"}) or device.cuda)
    settings = Settings(
        device=device,
        threads=torch.get_num_threads(),
        rounds=options.rounds or (2 if options.quick else 10),
        quick=options.quick,
        gemma=real.find_gemma(options.gemma) if wanted or options.gemma else None,
        shared=options.shared,
    )
    facts = table.environment(settings)
    print(table.heading(facts) + "\n", flush=True)
    results: dict[str, Result] = {}
    skipped: dict[str, str] = {}
    for name, case in chosen.items():
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            results[name] = case(settings)
        except Skipped as reason:
            skipped[name] = str(reason)
        device.release()
    print(table.markdown([row for result in results.values() for row in result.rows]))
    for name, result in results.items():
        if result.notes:
            print("\n".join(["", f"{name}:", *result.notes]))
    for name, why in skipped.items():
        print(f"skipped {name}: {why}")
    file: Path = options.into / f"{options.name or table.slug(facts)}.json"
    write_json(file, table.document(facts, results, skipped))
    print(f"\nall samples: {file}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=list(cases()), help=f"of {', '.join(cases())}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that each case works, in seconds")
    parser.add_argument("--rounds", type=int, help="pairs a comparison (default 10)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch finds)")
    parser.add_argument("--name", help="of the file with the samples (default: the hardware)")
    parser.add_argument("--into", type=Path, default=RESULTS, help="its folder (default benchmarks/results)")
    parser.add_argument("--gemma", type=Path, help="folder of Gemma 3 270M (default: converted from its package)")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder with the real rows")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        given = getattr(options, name)
        if given is not None and given < 1:
            parser.error(f"--{name} is {given}; at least 1 is expected")
    return options


if __name__ == "__main__":
    from molf.errors import main

    raise SystemExit(main(lambda: run(sys.argv[1:])))
