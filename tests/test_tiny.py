"""The tiny base model: an ordinary checkpoint, the same every time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf import tiny
from molf.models import check_folder

SIZE = {"layers": 1, "width": 32, "heads": 2, "vocabulary": 400, "steps": 3, "progress": False}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    directory = tmp_path_factory.mktemp("tiny")
    return directory, tiny.build(directory, seed=0, **SIZE)  # type: ignore[arg-type]


def test_it_is_a_checkpoint_that_transformers_loads(built: tuple[Path, dict[str, float]]) -> None:
    directory, info = built
    check_folder(directory, "models.tiny")
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32
    assert info["parameters"] == model.num_parameters()
    assert info["steps"] == 3 and info["tokens"] == 3 * tiny.BATCH * tiny.LENGTH and info["final_loss"] > 0


def test_its_tokenizer_gives_back_any_text_and_tells_the_letters_apart(built: tuple[Path, dict[str, float]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built[0])
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for text in ("Answer: A", "SELECT name FROM birds WHERE place = 'Arvik'", "ä 漢字 \t🙂"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in "ABCD"]
    assert len({tuple(ids) for ids in letters}) == 4 and all(len(ids) <= 2 for ids in letters)


def test_the_same_seed_makes_the_same_weights(built: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    tiny.build(tmp_path / "again", seed=0, **SIZE)  # type: ignore[arg-type]
    tiny.build(tmp_path / "other", seed=1, **SIZE)  # type: ignore[arg-type]
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (built[0] / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (built[0] / name).read_bytes()


def test_too_little_text_is_an_error(built: tuple[Path, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="fill no row of 128"):
        tiny.pack(AutoTokenizer.from_pretrained(built[0]), [("one", " two")])


def test_rows_hold_all_documents_and_contexts_are_not_learnt(built: tuple[Path, dict[str, float]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built[0])
    ids, labels = tiny.pack(tokenizer, [("Which?", " A"), ("", "It is so.")] * 40)
    assert ids.shape == labels.shape and ids.shape[1] == tiny.LENGTH
    told, learnt = str(tokenizer.decode(ids.flatten())), str(tokenizer.decode(labels[labels >= 0]))
    assert told.startswith("<bos>Which? A<eos><bos>It is so.<eos>")
    assert learnt.startswith(" A<eos>It is so.<eos> A<eos>")
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])
