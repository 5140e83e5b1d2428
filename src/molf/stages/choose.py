"""`python -m molf.stages.choose`: takes each method's learning rates by what its sweep scored on validation rows."""

from molf.config import load_params
from molf.errors import main
from molf.paths import RATES, write_json
from molf.tuning import choose, remarks


def run() -> None:
    result = choose(load_params())
    write_json(RATES, result)
    if not result["sweeps"]:
        print("learning rates: as they stand in the methods' blocks (grid.tune is empty)")
    for of in result["sweeps"]:
        scores = ", ".join(
            f"{trial['factor']:g} {'diverged' if trial['score'] is None else format(trial['score'], '.3f')}"
            for trial in of["trials"]
        )
        what = f"factor {of['chosen']:g} of its learning rates" if of["chosen"] is not None else f"NOTHING: {of['why']}"
        print(f"{of['model']}/{of['task']}/{of['method']}: {what} ({scores})")
        for text in remarks(of):
            print(f"  WARNING: {text}")


if __name__ == "__main__":
    raise SystemExit(main(run))
