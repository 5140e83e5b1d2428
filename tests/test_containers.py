"""Dockerfile, compose.yaml and what they call, as far as that can be looked at without a container engine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from container import make_env, requirements, try_image
from tests.conftest import ROOT

DOCKERFILE = try_image.instructions((ROOT / "Dockerfile").read_text())
COMPOSE = (ROOT / "compose.yaml").read_text()
SECRETS = re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)


def read(name: str = "compose.yaml") -> dict[str, Any]:
    """The file with its anchors resolved, without the blocks that only they name."""
    data: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return {key: value for key, value in data.items() if not key.startswith("x-")}


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_dockerfile_copies_is_there_and_the_code_comes_after_the_environment() -> None:
    seen = {str(file) for file in try_image.context(ROOT)}
    copied = [rest.split()[:-1] for name, rest in DOCKERFILE if name == "COPY"]
    assert copied == [["pyproject.toml", "constraints.txt", "container/requirements.py"], ["."]]
    assert set(copied[0]) <= seen
    names = [name for name, _ in DOCKERFILE]
    installs = next(i for i, (_, rest) in enumerate(DOCKERFILE) if "--requirement" in rest)
    assert DOCKERFILE.index(("COPY", ". .")) > installs
    assert "RUN" not in names[DOCKERFILE.index(("COPY", ". .")) :]  # a change in the code is a copy
    assert ("USER", "1000:1000") in DOCKERFILE and names.count("HEALTHCHECK") == 1
    entry = json.loads(dict(DOCKERFILE)["ENTRYPOINT"])[0]
    assert entry.startswith("/image/") and os.access(ROOT / entry.removeprefix("/image/"), os.X_OK)


def test_secrets_and_results_stay_out_of_the_image_and_of_git(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    kept = ["dvc.yaml", "src/molf/nn.py", "data/.gitignore", "sweeps/.gitignore", ".dvc/config", ".env.example"]
    left = [
        ".env",
        ".git/HEAD",
        "src/__pycache__/a.pyc",
        "results/a/b.json",
        "sweeps/model/task/method/factor-0.3/trial.json",
        "data/general/x",
        ".dvc/cache/a",
        ".dvc/config.local",
        "mlflow.db",
    ]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert {str(file) for file in try_image.context(tmp_path)} == {*kept, ".dockerignore"}
    if (ROOT / ".git").exists():
        assert subprocess.run(["git", "check-ignore", "--quiet", ".env"], cwd=ROOT, check=False).returncode == 0


def test_the_environments_layer_installs_what_pyproject_names(capsys: pytest.CaptureFixture[str]) -> None:
    requirements.main(["pipeline", "s3"])
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torch>=") for line in printed)
    assert {"setuptools", "mlflow", "prefect", "dvc", "dvc-s3", "boto3", "psycopg2-binary"} <= {
        re.split(r"[<>=\[]", line)[0] for line in printed
    }
    assert not any(line.startswith("pytest") for line in printed)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_keep_to_the_schema(name: str) -> None:
    spec = pytest.importorskip("compose_spec")
    filled = json.loads(re.sub(r"\$\{\w+(:-(\w+)|:\?[^}]+)\}", lambda found: found[2] or "x", json.dumps(read(name))))
    spec.PyCompose.from_json(json.dumps(filled)).validate()
    with pytest.raises(Exception, match="unknown|no such|expected|invalid"):
        filled["services"]["worker"]["depends_on"] = 3
        spec.PyCompose.from_json(json.dumps(filled)).validate()


def test_compose_has_no_password_of_its_own_and_listens_on_the_loopback_alone() -> None:
    used = set(re.findall(r"\$\{(\w+):\?make secrets writes .env with it\}", COMPOSE))
    assert used == set(SECRETS)
    assert set(re.findall(r"\$\{(\w+)", COMPOSE)) - used == {"MOLF_DEVICE"}
    services = read()["services"]
    for name, service in services.items():
        for key, value in service["environment"].items():
            assert not re.search("PASSWORD|SECRET|KEY$|KEY_ID$", key) or value.startswith("${"), (name, key)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "privileged" not in service and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "restart" in service and ("build" in service or re.search(r":v?\d+\.\d+\S*$", service["image"])), name
        assert service.get("read_only") or name == "worker", name
    assert set(read()["volumes"]) == {
        v.partition(":")[0] for s in services.values() for v in s.get("volumes", []) if v[0] != "."
    }


def test_every_service_waits_for_what_it_needs_to_be_healthy() -> None:
    services = read()["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            ends = services[other]["healthcheck"].get("disable", False)
            assert how["condition"] == ("service_completed_successfully" if ends else "service_healthy"), (name, other)
    for place, url in re.findall(r"http://(\w+):(\d+)", json.dumps(services["worker"]["environment"])):
        command = " ".join(services[place]["command"])
        assert f":{url}" in command or f"--port={url}" in command


def test_files_that_compose_names_are_there() -> None:
    for service in read()["services"].values():
        for volume in service.get("volumes", []):
            if volume.startswith("."):
                assert (ROOT / volume.partition(":")[0]).is_file()
        for word in (*service.get("entrypoint", []), *service.get("command", [])):
            if word.startswith("/image/"):
                assert (ROOT / word.removeprefix("/image/")).is_file()
    module = read()["services"]["worker"]["command"][2]
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


def test_make_secrets_writes_random_ones_for_the_owner_alone_and_never_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(ROOT / ".env.example", folder)
        assert make_env.main(folder) == 0
        assert (folder / ".env").stat().st_mode & 0o777 == 0o600
        written.append(dict(line.split("=") for line in (folder / ".env").read_text().splitlines()))
    assert list(written[0]) == SECRETS
    values = [value for found in written for value in found.values()]
    assert len(set(values)) == 2 * len(SECRETS) and all(re.fullmatch("[0-9a-f]{48}", value) for value in values)
    before = (folder / ".env").read_text()
    capsys.readouterr()
    assert make_env.main(folder) == 2
    printed = capsys.readouterr()
    assert (folder / ".env").read_text() == before and "stays" in printed.err
    assert not any(value in printed.err + printed.out for value in values)


class Image:
    """A folder as the image has it, and a project that its entry lays out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.project = folder / "image", folder / "project"
        for name in ("container/entry", "dvc.yaml", "params.yaml", ".gitignore"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        self.project.mkdir()

    def start(self, *command: str, code: int = 0) -> str:
        names = {
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@b",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@b",
        }
        done = subprocess.run(
            [self.folder / "container/entry", *command],
            cwd=self.project,
            env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(self.project.parent), **names},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def history(self) -> list[str]:
        return self.start("git", "log", "--format=%s", "--first-parent").splitlines()


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path)


def test_an_empty_volume_becomes_a_repository_with_the_images_code(image: Image) -> None:
    assert image.start("cat", "dvc.yaml") == (ROOT / "dvc.yaml").read_text()
    assert image.start("git", "status", "--porcelain") == ""
    assert image.history() == ["The image's code"]
    image.start("sh", "-c", "exit 7", code=7)


def test_a_new_images_code_comes_in_and_edits_stay(image: Image) -> None:
    image.start("true")
    edited = (image.project / "params.yaml").read_text().replace("seeds: [0]", "seeds: [0, 1]", 1)
    (image.project / "params.yaml").write_text(edited)
    (image.project / "dvc.lock").write_text("mine")
    (image.folder / "dvc.yaml").write_text("# new\n" + (ROOT / "dvc.yaml").read_text())
    (image.folder / "added.py").touch()
    assert image.start("head", "-n", "1", "dvc.yaml") == "# new\n"
    assert (image.project / "params.yaml").read_text() == edited
    assert (image.project / "dvc.lock").read_text() == "mine" and (image.project / "added.py").exists()
    history = image.history()
    assert history == ["The image's new code", "As it was before the image's new code", "The image's code"]
    assert image.history() == history  # nothing is new


def test_edits_that_the_new_code_contradicts_are_kept_and_named(image: Image) -> None:
    image.start("true")
    first, rest = (ROOT / "params.yaml").read_text().split("\n", 1)
    (image.project / "params.yaml").write_text(f"# mine\n{rest}")
    (image.folder / "params.yaml").write_text(f"# the image's\n{rest}")
    said = image.start("true", code=2)
    assert "params.yaml" in said and "undo those edits" in said
    assert (image.project / "params.yaml").read_text() == f"# mine\n{rest}"
    image.start("true", code=2)  # and is not forgotten
    (image.project / "params.yaml").write_text(f"{first}\n{rest}")
    assert image.start("head", "-n", "1", "params.yaml") == "# the image's\n"


def test_a_clone_of_ones_own_is_left_as_it_is(image: Image) -> None:
    subprocess.run(["git", "init", "--quiet", image.project], check=True)
    assert image.start("ls") == ""


def test_a_folder_with_files_of_the_same_names_is_not_overwritten(image: Image) -> None:
    (image.project / "params.yaml").write_text("mine")
    assert "params.yaml" in image.start("true", code=2)
    assert (image.project / "params.yaml").read_text() == "mine"
    assert not (image.project / ".git").exists()


def test_the_remote_of_the_data_is_set_outside_git(image: Image) -> None:
    image.start("true")
    shutil.copytree(
        ROOT / ".dvc", image.project / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local")
    )
    image.start("sh", "-c", "git add --all && git commit --quiet -m dvc")
    environment = {**os.environ, "DVC_REMOTE": "s3://dvc", "DVC_NO_ANALYTICS": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(image.folder / "container/entry"), "dvc", "remote", "list"]
    done = subprocess.run(
        command, cwd=image.project, env={**environment, "PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[:2] == ["team", "s3://dvc"]
    assert image.start("git", "status", "--porcelain") == ""
