"""What the README, the container and the Makefile promise is there."""

import re
from pathlib import Path

import pytest
import yaml

from molf import presets
from molf.cli import run
from molf.config import check_params, read_yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_every_command_of_the_readme_exists(capsys: object) -> None:
    spans = [*re.findall(r"`([^`\n]+)`", README), *re.findall(r"```sh\n(.+?)```", README, flags=re.DOTALL)]
    made = set(re.findall(r"\bmake ([a-z]+)", " ".join(spans)))
    assert {"run", "test"} <= made <= TARGETS
    called = {name for span in spans for name in re.findall(r"(?:^|&& |bin/)molf ([a-z]+)", span, flags=re.MULTILINE)}
    assert {"show", "preset", "pin", "track"} <= called
    for name in called:
        try:
            run([name, "--help"])
        except SystemExit as ended:
            assert ended.code == 0, name


def test_every_command_of_the_guide_to_the_verdict_exists() -> None:
    text = (ROOT / "docs/verdict.md").read_text()
    spans = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"```sh\n(.+?)```", text, flags=re.DOTALL)]
    called = {name for span in spans for name in re.findall(r"\bmolf ([a-z]+)", span)}
    assert {"compare", "predict", "show", "lineage"} <= called
    for name in called:
        with pytest.raises(SystemExit) as ended:
            run([name, "--help"])
        assert ended.value.code == 0, name


def test_the_guide_to_methods_names_what_is_there() -> None:
    from molf import methods

    text = (ROOT / "docs/add-a-method.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+\([a-z, ]*\))` \|", text, flags=re.MULTILINE)
    assert rows == re.findall(r"^([a-z_]+\([a-z, ]*\)) ->", methods.__doc__ or "", flags=re.MULTILINE)
    for name in re.findall(r"`((?:src|tests)/[a-z_/]+(?:\.py|\.yaml)?)`", text):
        assert (ROOT / name).exists(), name
    (grid,) = re.findall(r"```yaml\n(.+?)```", text, flags=re.DOTALL)
    params = presets.merged("rivals", read_yaml(ROOT / "params.yaml")) | yaml.safe_load(grid)
    assert len(check_params(params, "docs/add-a-method.md").cells()) == 2


def test_every_file_of_the_readme_exists() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for row in re.findall(r"^\| (`[^|]+) \|", README.partition("## Map")[2], flags=re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            # The stages' outputs are not in git.
            if name not in ("models/", "weights/", "results/", "reports/"):
                assert any((folder / name).exists() for folder in (ROOT, ROOT / "src/molf")), name


def test_the_readmes_blocks_for_params_parse() -> None:
    params = read_yaml(ROOT / "params.yaml")
    for text in re.findall(r"```yaml\n(.+?)```", README, flags=re.DOTALL):
        for key, block in yaml.safe_load(text).items():
            params[key] |= block
    assert len(check_params(params, "README.md").cells()) == 3


def test_the_readmes_library_lines_run() -> None:
    import torch

    (code,) = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)
    names = {"model": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))}
    exec(code, names)
    assert type(names["model"][0]) is torch.nn.Linear


def test_ci_calls_the_readmes_test_command_and_acceptance() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make test", "make acceptance"]
