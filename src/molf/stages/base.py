"""`python -m molf.stages.base MODEL`: brings a base model into models/MODEL."""

import sys

from molf.base import build
from molf.config import load_params
from molf.errors import main
from molf.models import folder_bytes, quiet
from molf.paths import MODELS


def run() -> None:
    name = sys.argv[1]
    quiet()
    info = build(name, load_params().models[name], MODELS / name)
    print(f"base model {name}: {folder_bytes(MODELS / name) / 1e6:.0f} MB in {MODELS / name}")
    for key in ("parameters", "final_loss", "seconds"):
        if key in info:
            print(f"  {key}: {info[key]:,.3f}" if isinstance(info[key], float) else f"  {key}: {info[key]:,}")


if __name__ == "__main__":
    raise SystemExit(main(run))
