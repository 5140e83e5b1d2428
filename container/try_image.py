"""Executes the Dockerfile's instructions without a container engine, in a clean root that debootstrap makes.

    python container/try_image.py [--device cuda] [--keep FOLDER] [--share PATH ...] [--arg NAME=VALUE ...]

Needs root, Debian's debootstrap and its packages. It stands in for a build where there is no engine, and is no part of
the tests: FROM's Python is Debian's own 3.11, layers are folders without an export, isolation is a chroot.
"""

import argparse
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parents[1]
RELEASE = "bookworm"  # of FROM's tag
PACKAGES = "ca-certificates,python3,python3-venv"
PASSED = re.compile(r"PIP_\w+|\w+_proxy|SSL_\w+|REQUESTS_CA_BUNDLE", re.IGNORECASE)  # how this machine reaches packages
CHECKS = (
    "molf check",
    "git log --oneline --all",
    "dvc status --quiet params.yaml; dvc dag | tail -n 3",
    "python -m pipelines.serve --help | head -n 1",
    "mlflow --version",
    "prefect --version",
    "python -c 'import boto3, psycopg2, asyncpg, torch, molf; print(torch.__version__, molf.__file__)'",
)


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions: name and the rest, with continued lines joined and comments left out."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", kept)
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def context(folder: Path) -> Iterator[Path]:
    """The files that the build sees: all but what .dockerignore names; paths below the folder."""
    patterns = [line for line in (folder / ".dockerignore").read_text().split("\n") if line and line[0] != "#"]

    def left_out(path: PurePosixPath) -> bool:
        return any(
            fnmatch.fnmatchcase(path.name, pattern[3:]) if pattern.startswith("**/") else _matches(path, pattern)
            for pattern in patterns
        )

    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not left_out(PurePosixPath(here / name))]
        yield from (here / name for name in files if not left_out(PurePosixPath(here / name)))


def _matches(path: PurePosixPath, pattern: str) -> bool:
    parts = pattern.split("/")
    return len(parts) == len(path.parts) and all(map(fnmatch.fnmatchcase, path.parts, parts))


class Root:
    """The root folder in which instructions are executed, with what ENV, ARG, USER and WORKDIR have set."""

    def __init__(self, path: Path, arguments: dict[str, str]) -> None:
        self.path, self.arguments = path, arguments
        self.variables = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.user, self.folder, self.entry = "0:0", "/", ""

    def run(self, command: str) -> None:
        """A shell line inside, as RUN has it; its failure ends this program."""
        passed = {key: value for key, value in os.environ.items() if PASSED.fullmatch(key)}
        line = ["chroot", f"--userspec={self.user}", str(self.path), "/bin/sh", "-c", 'cd "$0" && exec /bin/sh -c "$1"']
        environment = {**passed, **self.variables, **self.arguments}
        if subprocess.run([*line, self.folder, command], env=environment).returncode:
            sys.exit(f"failed: {command}")

    def execute(self, name: str, rest: str) -> None:
        """One instruction."""
        match name:
            case "ARG":
                key, _, default = rest.partition("=")
                self.arguments.setdefault(key, default)
            case "ENV":
                for key, _, value in (word.partition("=") for word in shlex.split(rest)):
                    self.variables[key] = re.sub(r"\$(\w+)", lambda found: self.variables[found[1]], value)
            case "WORKDIR":
                self.folder = rest
                self.inside(rest).mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user = rest
                self.variables["HOME"] = "/home/molf"
            case "COPY":
                *sources, target = rest.split()
                self.copy(sources, self.inside(self.folder) / target)
            case "RUN":
                self.run(rest)
            case "ENTRYPOINT":
                self.entry = shlex.quote(rest.strip('[]"'))

    def inside(self, path: str) -> Path:
        return self.path / path.lstrip("/")

    def copy(self, sources: list[str], target: Path) -> None:
        """As COPY: a folder's content, or files by their names."""
        for file in context(REPOSITORY):
            for source in sources:
                within = source == "." or file == Path(source)
                place = target / (file if source == "." else file.name)
                if within and not (REPOSITORY / file).is_symlink():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(REPOSITORY / file, place)


def prepare(root: Path, share: list[str]) -> None:
    """Makes the clean root and mounts what a container has; the mounts end with this process's namespace."""
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    for path in ("/dev", *share):
        place = root / path.lstrip("/")
        if Path(path).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        subprocess.run(["mount", "--rbind", path, place], check=True)


def main() -> None:
    """Executes all instructions, then those after the environment once more, as a change in the code would."""
    parser = argparse.ArgumentParser(description="Execute the Dockerfile in a clean root.")
    parser.add_argument("--device", default="cpu", help="of the build: cpu or cuda (%(default)s)")
    parser.add_argument("--arg", action="append", default=[], help="another build argument: NAME=VALUE")
    parser.add_argument(
        "--share", action="append", default=[], help="a path of this machine seen inside: pip's settings"
    )
    parser.add_argument(
        "--keep", type=Path, help="a new folder for the root, which then stays (default: a temporary one)"
    )
    options = parser.parse_args()
    if os.environ.get("TRY_IMAGE") != "inside":
        if os.geteuid():
            sys.exit("error: chroot and debootstrap need root")
        if shutil.which("debootstrap") is None:
            sys.exit("error: no debootstrap; apt-get install debootstrap")
        if options.keep and options.keep.exists() and any(options.keep.iterdir()):
            sys.exit(f"error: --keep {options.keep}: it is not empty; give a new folder")
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, *sys.argv]
        os.execvpe(own[0], own, {**os.environ, "TRY_IMAGE": "inside"})
    folder = options.keep or Path(tempfile.mkdtemp(prefix="image-", dir="/var/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        began = time.monotonic()
        prepare(folder, options.share)
        print(f"{time.monotonic() - began:7.1f} s  FROM, by debootstrap", flush=True)
        arguments = dict(argument.split("=", 1) for argument in options.arg)
        root = Root(folder, {"DEVICE": options.device, **arguments})
        steps = instructions((REPOSITORY / "Dockerfile").read_text())
        states = []
        for name, rest in steps:
            states.append((root.user, root.folder))
            began = time.monotonic()
            root.execute(name, rest)
            if name in ("RUN", "COPY"):
                print(f"{time.monotonic() - began:7.1f} s  {name} {rest[:90]}", flush=True)
        own = ["du", "-sm", *(f"--exclude={folder}/{place.strip('/')}" for place in (*options.share, "dev", "proc"))]
        size = subprocess.run([*own, folder], capture_output=True, text=True).stdout.split()[0]
        print(f"{size:>7} MB in the root", flush=True)
        for check in CHECKS:
            print(f"as the image's user: {check}", flush=True)
            root.run(f"{root.entry} sh -c {shlex.quote(check)}")
        code = steps.index(("COPY", ". ."))
        root.user, root.folder = states[code]
        began = time.monotonic()
        for name, rest in steps[code:]:
            root.execute(name, rest)
        root.run(f"{root.entry} molf check")
        print(f"{time.monotonic() - began:7.1f} s  a change in the code, molf check included", flush=True)
    finally:
        if options.keep is None:
            # Mounts first: what they show is this machine's own.
            for place in reversed([*options.share, "/dev", "/proc"]):
                subprocess.run(["umount", "--recursive", "--lazy", folder / place.lstrip("/")], check=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
