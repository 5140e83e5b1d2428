"""`dvc repro --single-item` of many stages, with dvc.lock written once: `python -m pipelines.restore STAGE ...`.

DVC itself writes all of dvc.lock anew after each stage, whose seconds grow with the grid: for all cells with its square
(docs/scale.md). This works in the current folder, as DVC does.
"""

import argparse
from collections.abc import Sequence


def restore(names: Sequence[str], allow_missing: bool = False) -> int:
    """Brings stages up to date, from the run cache where that has them, one after another.

    Args:
        names: The stages, each after what it needs.
        allow_missing: A stage whose outputs alone lack counts as up to date.

    Returns:
        How many were not up to date.
    """
    from dvc.repo import Repo

    done = []
    with Repo() as repo, repo.scm_context, repo.lock:
        stages = {stage.addressing: stage for stage in repo.index.stages}
        try:
            for name in names:
                if stages[name].reproduce(allow_missing=allow_missing):
                    done.append(stages[name])
        finally:
            if done:
                done[0].dvcfile.dump_stages(done, update_pipeline=False)
    return len(done)


def main() -> None:
    """Restores the stages named on the command line and says how many."""
    parser = argparse.ArgumentParser(description="Bring many stages up to date from the run cache.")
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--allow-missing", action="store_true")
    options = parser.parse_args()
    from dvc.exceptions import DvcException

    try:
        count = restore(options.stages, options.allow_missing)
    except DvcException as error:
        raise SystemExit(f"failed: {error}") from None
    print(f"{count} of {len(options.stages)} stages restored")


if __name__ == "__main__":
    main()
