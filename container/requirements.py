"""Prints what the project needs, without the project: python requirements.py EXTRA ... > requirements.txt"""

import sys
import tomllib
from pathlib import Path


def main(extras: list[str]) -> None:
    """The build's requirements, the library's and those of the extras, one a line, from pyproject.toml beside this."""
    folder = next(f for f in Path(__file__).resolve().parents if (f / "pyproject.toml").exists())
    read = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    project = read["project"]
    lines = read["build-system"]["requires"] + project["dependencies"]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
