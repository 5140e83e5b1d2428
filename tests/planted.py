"""Secrets that a test puts into the environment, and the search for them in all that a run leaves. It is not a test."""

import subprocess
from pathlib import Path

import pandas as pd

# Stands in each secret, so that one search finds all; in two parts, since this file is searched as well.
MARK = "planted" + "7f3a9c"
PLANTED = {
    "AWS_ACCESS_KEY_ID": f"{MARK}-id",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/aws+key",
    "HF_TOKEN": f"hf_{MARK}",
    "MLFLOW_TRACKING_PASSWORD": f"{MARK}-mlflow",
    "DATABASE_URL": f"postgresql://molf:{MARK}-url@127.0.0.1:9/molf",
    "MOLF_SECRETS": "COLOUR",
    "COLOUR": f"{MARK}-named",
}


def leaks(folder: Path) -> list[str]:
    """Files below a folder in which a planted secret stands, and repositories in whose objects one does, sorted.

    Tables are read row by row, since their files are compressed.
    """
    found = set()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir() and path.name == ".git":
            objects = ["git", "cat-file", "--batch", "--batch-all-objects", "--buffer"]
            said = subprocess.run(objects, cwd=path, check=True, capture_output=True).stdout
            if MARK.encode() in said:
                found.add(f"{path.parent.relative_to(folder)}: git's objects")
        elif path.suffix == ".parquet":
            if MARK in pd.read_parquet(path).to_json(default_handler=str):
                found.add(name)
        elif path.is_file() and MARK.encode() in path.read_bytes():
            found.add(name)
    return sorted(found)
