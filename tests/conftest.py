"""A project of its own for tests that run the real stages, the real files where they are, a random model and rows."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ruamel.yaml import YAML

from molf.paths import PRIVATE, own_tools
from tests.browser import chromium as chromium
from tests.browser import window as window

ROOT = Path(__file__).parents[1]
SHARED = ROOT / "../shared/data"
WORDS = [f"w{i}" for i in range(40)]  # of the `base` fixture's tokenizer
QUIET = {**PRIVATE, "HF_HUB_OFFLINE": "1"}

# A grid of two cells that takes a minute: what it learns does not matter.
SMALL: dict[str, Any] = {
    "grid": {"models": ["tiny"], "tasks": ["fact"], "methods": ["fft", "lora"], "seeds": [0], "tune": []},
    "models.tiny.layers": 1,
    "models.tiny.width": 32,
    "models.tiny.heads": 2,
    "models.tiny.vocabulary": 400,
    "models.tiny.steps": 3,
    "tasks.fact.source.rows": {"train": 24, "validation": 8},
    "tasks.fact.limits": {"train": 24, "validation": 8, "test": None},
    "methods.lora.r": 4,
    "methods.molf.r": [4],
    "methods.molf-e.r": [2, 4],
    "training.epochs": 1,
    "training.batch_size": 8,
    "training.threads": 2,
    "compare.bootstrap": 200,
}


class Project:
    """A copy of the repository's files in a folder of its own, with git and DVC, as a user has it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, root / name)
        self.run("git", "init", "--quiet")
        self.commit("start")

    @property
    def environment(self) -> dict[str, str]:
        return {**own_tools(), **QUIET, "PYTHONPATH": str(self.root / "src")}

    def run(self, *command: str, code: int | None = 0) -> str:
        """Runs a command in the project.

        Args:
            command: Program and arguments.
            code: The exit code that it must have; None takes any.

        Returns:
            What it printed, errors included.
        """
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert code is None or done.returncode == code, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def repro(self, *arguments: str) -> list[str]:
        """`dvc repro`; returns the names of the stages that ran."""
        return re.findall(r"^Running stage '(.+)':", self.run("dvc", "repro", *arguments), flags=re.MULTILINE)

    def edit(self, changes: dict[str, Any]) -> None:
        """Changes params.yaml by dotted keys."""
        yaml, path = YAML(), self.root / "params.yaml"
        data = yaml.load(path.read_text())
        for dotted, value in changes.items():
            *keys, last = dotted.split(".")
            block = data
            for key in keys:
                block = block[key]
            block[last] = value
        with path.open("w") as file:
            yaml.dump(data, file)

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        author = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        self.run("git", *author, "commit", "--quiet", "--allow-empty", "-m", message)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh copy with a grid that takes a minute."""
    made = Project(tmp_path / "project")
    made.edit(SMALL)
    return made


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real files beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the real data sets (../shared/data) are not here")
    return SHARED


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with a word-level tokenizer."""
    from transformers import LlamaConfig

    return write_base(tmp_path_factory.mktemp("base"), LlamaConfig(intermediate_size=48, **SHAPE))


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, whose head is its embedding, with biases and a width that two processes cannot halve."""
    from transformers import LlamaConfig

    config = LlamaConfig(intermediate_size=45, tie_word_embeddings=True, attention_bias=True, **SHAPE)
    return write_base(tmp_path_factory.mktemp("tied"), config)


SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS) + 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def write_base(folder: Path, config: Any) -> Path:
    """Random weights of a configuration, and the tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def frame(rows: int = 24) -> pd.DataFrame:
    prompts = [f"w{i % 13} w{i % 7} w{(3 * i) % 11}" + " w1" * (i % 4) for i in range(rows)]
    return pd.DataFrame({"prompt": prompts, "completion": [f" w{20 + i % 5}" + " w2" * (i % 3) for i in range(rows)]})


def talks(rows: int = 24) -> pd.DataFrame:
    """Conversations of one to three answers, as prepared rows have them."""
    asked = frame(rows)
    found = []
    for i in range(rows):
        turns = [{"role": "system", "content": "w39 w38"}] * (i % 2)
        for j in range(1 + i % 3):
            prompt, completion = asked.iloc[(i + j) % rows][["prompt", "completion"]]
            turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
        found.append(turns)
    return pd.DataFrame(
        {
            "example_id": [f"train-{i}" for i in range(rows)],
            "prompt": ["what was said before"] * rows,
            "completion": [turns[-1]["content"] for turns in found],
            "messages": found,
        }
    )


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its four cells trained, to be copied before it is changed."""
    from tests.trained import make

    return make(tmp_path_factory.mktemp("trained") / "project", base)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SQLite store of MLflow that is set up already: migrations take seconds, copying takes none."""
    from molf.mlflow_store import Store

    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        Store("another", root)
    return (root / "mlflow.db").read_bytes()
