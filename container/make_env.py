"""Writes .env with random secrets for each name of .env.example; an .env that is there stays: `make secrets`."""

import os
import secrets
import sys
from pathlib import Path


def main(folder: Path) -> int:
    """Returns the exit code; the file is its owner's alone from the start."""
    path = folder / ".env"
    names = [
        line.partition("=")[0]
        for line in (folder / ".env.example").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        print(
            f"error: {path} is there and stays: databases on their volumes keep the passwords they were made with; "
            "to begin anew, `docker compose down --volumes`, remove it and try again",
            file=sys.stderr,
        )
        return 2
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("".join(f"{name}={secrets.token_hex(24)}\n" for name in names))
    print(f"{path}: {len(names)} random secrets, readable by you alone")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1]))
