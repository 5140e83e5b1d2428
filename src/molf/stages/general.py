"""`python -m molf.stages.general`: brings held-out text into data/general, on which forgetting is measured."""

from molf.config import load_params
from molf.errors import main
from molf.paths import GENERAL


def run() -> None:
    params = load_params()

    from molf.general import collect

    summary = collect(params.general, GENERAL)
    if summary["kind"] == "none":
        print("general text: none, so what a training forgets is not measured (general in params.yaml)")
        return
    what = "generated texts" if summary["generated"] else f"texts from {params.general.path}"
    left_out = ", ".join(f"{count:,} rows fail `{why}`" for why, count in summary["left_out"].items())
    print(
        f"general text: {summary['texts']:,} {what}, {summary['characters']:,} characters"
        + (f" (left out: {left_out})" if left_out else "")
    )


if __name__ == "__main__":
    raise SystemExit(main(run))
