"""What a training did: the loss on general text against a plain loop, the moves of weights against planted ones."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from molf import damage, general, tiny
from molf.config import WeightChange, evaluation_fingerprint
from molf.errors import RunError
from molf.evaluation import LanguageModel
from molf.models import load_model, load_tokenizer
from molf.modules import place
from molf.paths import read_json, write_json
from tests.conftest import SHAPE, write_base
from tests.trained import METHODS

LOOK = WeightChange(top=10, threshold=0.5)


def lm(folder: Path, batch_size: int = 8) -> LanguageModel:
    return LanguageModel(load_model(folder, torch.float32), load_tokenizer(folder), batch_size)


def moves(*given: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    found = damage.moves(*given)
    assert found is not None
    return found


def frame(*texts: str) -> pd.DataFrame:
    return pd.DataFrame({"text_id": [f"t-{i}" for i in range(len(texts))], "text": texts})


TEXTS = frame("w1 w2 w3 w4 w5", "w7", "w9 w8 w7 w6 w5 w4 w3 w2 w1 w0 w11 w12", "w1 w1")


# --- general text ----------------------------------------------------------------------------------------------------


def plain_nll(model: LanguageModel, ids: list[int]) -> float:
    """One text, token by token."""
    total = 0.0
    for end in range(1, len(ids)):
        logits = model.model(torch.tensor([ids[:end]])).logits[0, -1]
        total -= float(torch.log_softmax(logits.double(), 0)[ids[end]])
    return total


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_loss_is_that_of_a_plain_loop_whatever_the_batch(base: Path, batch_size: int) -> None:
    model = lm(base, batch_size)
    found = damage.general_nll(model, TEXTS, 64)
    assert list(found["text_id"]) == list(TEXTS["text_id"])
    for row, text in zip(found.itertuples(), TEXTS["text"], strict=True):
        ids = [0, *model.tokenizer.encode(text, add_special_tokens=False)]
        assert row.tokens == len(text.split()) and row.bytes == len(text) and not row.cut
        with torch.no_grad():
            assert row.nll == pytest.approx(plain_nll(model, ids), abs=1e-4)
    told = damage.of_general(found, {"hash": "h", "generated": False})
    nll = found["nll"].sum()
    assert told["loss"] == pytest.approx(nll / 20) and (told["texts"], told["tokens"], told["cut"]) == (4, 20, 0)
    assert told["bits_per_byte"] == pytest.approx(nll / math.log(2) / TEXTS["text"].str.len().sum())


def test_of_a_long_text_the_beginning_counts_and_so_of_its_bytes(base: Path) -> None:
    model = lm(base)
    found = damage.general_nll(model, TEXTS, 4)  # BOS and three words
    whole = damage.general_nll(model, frame("w1 w2 w3", "w7", "w9 w8 w7", "w1 w1"), 64)
    assert list(found["cut"]) == [True, False, True, False]
    assert list(found["tokens"]) == list(whole["tokens"]) and list(found["bytes"]) == list(whole["bytes"])
    assert list(found["nll"]) == pytest.approx(list(whole["nll"]), abs=1e-5)
    model.model.config.max_position_embeddings = 3
    assert damage.general_nll(model, TEXTS, 64)["tokens"].max() == 2


def test_without_a_bos_the_first_token_is_not_predicted_nor_are_its_bytes_counted(base: Path) -> None:
    tokenizer = tiny.train_tokenizer(["one two three"], 300)
    tokenizer.bos_token = None
    model = LanguageModel(load_model(write_vocabulary(base, 300), torch.float32), tokenizer, 8)
    texts = frame("one two", "ä🙂", "o")
    found = damage.general_nll(model, texts, 64)
    for row, text in zip(found.itertuples(), texts["text"], strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert row.tokens == len(ids) - 1
        with torch.no_grad():
            assert row.nll == pytest.approx(plain_nll(model, ids), abs=1e-4)
    assert found["bytes"][0] == 7 - len(tokenizer.decode(tokenizer.encode("one two")[0]))
    with pytest.raises(RunError, match="no text has a token to predict"):
        damage.of_general(found[2:], {"hash": "h", "generated": False})


def write_vocabulary(base: Path, size: int) -> Path:
    from transformers import LlamaConfig

    return write_base(
        base.parent / f"vocabulary-{size}", LlamaConfig(intermediate_size=48, **SHAPE | {"vocab_size": size})
    )


def test_few_logits_are_made_at_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = damage.general_nll(lm(base), TEXTS, 64)
    monkeypatch.setattr(damage, "LOGITS", 1)
    model = lm(base)
    sizes = []
    plain = model.model.forward

    def counted(**given: Any) -> Any:
        sizes.append(len(given["input_ids"]))
        return plain(**given)

    monkeypatch.setattr(model.model, "forward", counted)
    alone = damage.general_nll(model, TEXTS, 64)
    assert sizes == [1, 1, 1, 1]
    assert list(alone["nll"]) == pytest.approx(list(whole["nll"]), abs=1e-5)


def test_a_broken_model_is_said(base: Path) -> None:
    model = lm(base)
    with torch.no_grad():
        model.model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(RunError, match="general text t-0 is not finite, of 4 in all"):
        damage.general_nll(model, TEXTS, 64)


# --- singular values -------------------------------------------------------------------------------------------------


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def weight(rows: int, columns: int, seed: int = 0, count: int | None = None) -> torch.Tensor:
    """A matrix of known singular values, from 10 down to 1."""
    count = count or min(rows, columns)
    values = torch.linspace(10, 1, count, dtype=torch.float64)
    return orthonormal(rows, count, seed) * values @ orthonormal(columns, count, seed + 1).T


def by_svd(base: torch.Tensor, tuned: torch.Tensor, top: int, threshold: float) -> int:
    left = [torch.linalg.svd(matrix.double(), full_matrices=False)[0] for matrix in (base, tuned)]
    return int(((left[1][:, :top].T @ left[0]).abs().amax(dim=1) < threshold).sum())


SHAPES = [(40, 40), (24, 64), (64, 24)]


@pytest.mark.parametrize("shape", SHAPES)
def test_intruders_are_those_of_a_plain_decomposition(shape: tuple[int, int]) -> None:
    base = weight(*shape).float()
    counts = set()
    for seed, scale in enumerate((0.1, 0.5, 1.0, 3.0)):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for threshold in (0.3, 0.5, 0.9):
            counts.add(damage.intruders(base, base + scale * noise, 10, threshold))
            assert damage.intruders(base, base + scale * noise, 10, threshold) == by_svd(
                base, base + scale * noise, 10, threshold
            )
    assert len(counts) > 3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_direction_is_an_intruder_only_if_the_base_has_none_near_it(shape: tuple[int, int]) -> None:
    rows, columns = shape
    base = weight(*shape)
    left, _, right = torch.linalg.svd(base, full_matrices=False)
    spread = left.mean(dim=1) / left.mean(dim=1).norm()  # at the same small angle to every direction of the base
    along = left[:, 3]
    other = right.T.mean(dim=1) / right.T.mean(dim=1).norm()
    assert damage.intruders(base, base + 40 * torch.outer(spread, other), 5, 0.5) == 1
    assert damage.intruders(base, base + 40 * torch.outer(along, right[3]), 5, 0.5) == 0
    # Too small to be among the first five: another count of vectors finds it not.
    assert damage.intruders(base, base + 1e-3 * torch.outer(spread, other), 5, 0.5) == 0


def test_what_the_base_lacks_is_found_in_a_base_of_low_rank() -> None:
    base = weight(40, 60, count=8)
    new = torch.randn(40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    span = torch.linalg.svd(base, full_matrices=False)[0][:, :8]
    new = new - span @ (span.T @ new)
    tuned = base + 20 * torch.outer(new / new.norm(), torch.ones(60, dtype=torch.float64) / 60**0.5)
    assert damage.intruders(base, tuned, 1, 0.5) == 1 and damage.intruders(base, tuned, 40, 0.5) == 1
    assert damage.intruders(base, base, 40, 0.99) == 0


@pytest.mark.parametrize(("degrees", "expected"), [(30, 0), (59, 0), (61, 1), (90, 1)])
def test_a_direction_turned_out_of_the_base_counts_beyond_the_threshold(degrees: float, expected: int) -> None:
    base = weight(40, 60, count=20)
    left, values, right = torch.linalg.svd(base, full_matrices=False)
    new = torch.randn(40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    new = new - left[:, :20] @ (left[:, :20].T @ new)
    angle = math.radians(degrees)
    turned = left.clone()
    turned[:, 0] = math.cos(angle) * left[:, 0] + math.sin(angle) * new / new.norm()
    tuned = turned[:, :20] * values[:20] @ right[:20]
    assert damage.intruders(base, tuned, 10, math.cos(math.radians(60))) == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_a_change_of_equal_singular_values_has_its_rank_as_effective_rank(shape: tuple[int, int], rank: int) -> None:
    change = orthonormal(shape[0], rank, 1) @ orthonormal(shape[1], rank, 2).T
    assert damage.effective_rank(change.float()) == pytest.approx(rank, rel=1e-3)
    assert damage.effective_rank(1e-9 * change) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_effective_rank_is_the_entropys(shape: tuple[int, int]) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    shares = torch.linalg.svdvals(change.double())
    shares /= shares.sum()
    assert damage.effective_rank(change) == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-9)
    assert damage.effective_rank(torch.zeros(shape)) == 0


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.mlp.up_proj", ("mlp.up_proj", 3)),
        ("model.layers.11.experts.2.up", ("experts.2.up", 11)),
        ("model.embed_tokens", ("embed_tokens", 0)),
    ],
)
def test_a_modules_name_tells_its_type_and_layer(module: str, expected: tuple[str, int]) -> None:
    assert place(module) == expected


# --- weights of models -----------------------------------------------------------------------------------------------


def test_an_untouched_model_has_not_moved(tied_base: Path) -> None:
    table, told = moves(load_model(tied_base, torch.float32), damage.Stored(tied_base), LOOK)
    assert list(table) == list(damage.COLUMNS)
    assert len(table) == 2 * 7 and set(table["layer"]) == {0, 1}
    assert set(table["type"]) == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    }
    assert not table[["change_norm", "effective_rank", "intruders"]].to_numpy().any()
    assert told == {
        **dict.fromkeys(("relative_change", "elsewhere", "effective_rank", "intruders", "not_found"), 0),
        **{"looked_at": 140, "top": 10, "threshold": 0.5},
    }


def test_what_moved_is_found_where_it_moved(tied_base: Path) -> None:
    model = load_model(tied_base, torch.float32)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module = "model.layers.1.mlp.up_proj"
    target = model.get_parameter(f"{module}.weight")
    rows, columns = target.shape
    change = (orthonormal(rows, 2, 1) @ orthonormal(columns, 2, 2).T).float() * 3
    with torch.no_grad():
        target.add_(change)
        model.model.embed_tokens.weight[0] += 1.0
    table, told = moves(model, damage.Stored(tied_base), LOOK)
    row = table.set_index("module").loc[module]
    assert (row["layer"], row["type"], row["rows"], row["columns"]) == (1, "mlp.up_proj", rows, columns)
    assert row["change_norm"] == pytest.approx(3 * 2**0.5, rel=1e-4)
    assert row["base_norm"] == pytest.approx(float(base[f"{module}.weight"].norm()), rel=1e-5)
    assert row["effective_rank"] == pytest.approx(2, abs=0.01) and row["intruders"] == 2
    others = table[table["module"] != module]
    assert not others[["change_norm", "effective_rank", "intruders"]].to_numpy().any()
    whole = math.sqrt((table["base_norm"] ** 2).sum())
    assert told["relative_change"] == pytest.approx(3 * 2**0.5 / whole, rel=1e-4)
    assert told["intruders"] == 2 and told["effective_rank"] == pytest.approx(2 / 14, abs=1e-3)
    linear = {f"{name}.weight" for name in table["module"]} | {"lm_head.weight"}
    rest = math.sqrt(sum(float(tensor.norm()) ** 2 for name, tensor in base.items() if name not in linear))
    assert told["elsewhere"] == pytest.approx(32**0.5 / rest, rel=1e-4)


def test_an_adapter_moves_its_targets_by_its_rank_and_nothing_else(base: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_model(base, torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    table, told = moves(adapted.merge_and_unload(), damage.Stored(base), LOOK)
    assert table["effective_rank"].between(1, 3.1).all() and told["elsewhere"] == 0 and told["relative_change"] > 0


def test_weights_of_a_bfloat16_model_are_held_against_the_base_as_it_was_loaded(base: Path) -> None:
    told = moves(load_model(base, torch.bfloat16), damage.Stored(base), LOOK)[1]
    assert told["relative_change"] == told["elsewhere"] == 0


def test_weights_in_several_files_and_under_longer_names_are_found(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for number, half in enumerate(halves):
        save_file(
            {f"language_model.{name}": tensor for name, tensor in half.items()}, tmp_path / f"{number}.safetensors"
        )
    table, told = moves(load_model(base, torch.float32), damage.Stored(tmp_path), LOOK)
    assert len(table) == 14 and told["not_found"] == 0 and not table["change_norm"].any()


def test_weights_that_are_not_in_the_files_are_counted_and_none_at_all_is_no_table(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    module = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, module: tensors[module][:-1].contiguous()}, tmp_path / "model.safetensors")
    table, told = moves(load_model(base, torch.float32), damage.Stored(tmp_path), LOOK)
    assert len(table) == 13 and told["not_found"] == 1
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert damage.moves(load_model(base, torch.float32), damage.Stored(tmp_path), LOOK) is None


def test_what_is_not_asked_for_is_not_measured(base: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"kind": "none", "generated": False})
    for folder, block in ((base, None), (None, LOOK)):
        assert damage.measure(lm(base), tmp_path, folder, block) == ({}, {"general": None, "weights": None})
    tables, told = damage.measure(lm(base), tmp_path, base, LOOK)
    assert list(tables) == ["weights"] and told["general"] is None and told["weights"]["looked_at"] == 140
    text = {"kind": "file", "generated": False, "max_length": 64, "hash": "h"}
    write_json(tmp_path / "summary.json", text)
    TEXTS.to_parquet(tmp_path / "text.parquet")
    tables, told = damage.measure(lm(base), tmp_path, None, LOOK)
    assert list(tables) == ["general"] and told == {
        "general": damage.of_general(tables["general"], text),
        "weights": None,
    }


def test_the_stage_leaves_what_was_asked_and_what_was_measured(trained: Path) -> None:
    task = trained / "results/tiny/fact"
    examples = pd.read_parquet(trained / "data/prepared/fact/test.parquet")
    losses = {}
    for method in ("base", *METHODS):
        folder = task / method / "seed-0/evaluation"
        predictions, told = pd.read_parquet(folder / "predictions.parquet"), read_json(folder / "metrics.json")
        assert list(predictions["example_id"]) == list(examples["example_id"])
        assert list(predictions["prompt"]) == list(examples["prompt"])
        assert list(predictions["gold"]) == list(examples["completion"].str.strip())
        assert told["fingerprint"] == evaluation_fingerprint(told)
        assert told["general"]["hash"] == general.folder_hash(trained / "data/general")
        losses[method] = told["general"]["loss"]
        general_rows = pd.read_parquet(folder / "general.parquet")
        assert losses[method] == pytest.approx(general_rows["nll"].sum() / general_rows["tokens"].sum())
        if method == "base":
            assert told["weights"] is None and not (folder / "weights.parquet").exists()
            continue
        table = pd.read_parquet(folder / "weights.parquet")
        assert list(table) == list(damage.COLUMNS) and len(table) == 14
        moved = told["weights"]
        assert moved["relative_change"] > 0 and moved["not_found"] == 0
        assert (moved["elsewhere"] > 0) == (method in ("fft", "molf"))  # adapters leave the rest alone
        assert (table["effective_rank"] > 0).all()
        if method == "lora":
            assert table["effective_rank"].max() < 3.1
    assert len(set(losses.values())) == len(losses)


def test_an_evaluation_on_another_text_has_another_fingerprint(trained: Path) -> None:
    told = read_json(trained / "results/tiny/fact/fft/seed-0/evaluation/metrics.json")
    others = [told | {"general": told["general"] | {"hash": "other"}}, told | {"general": None}]
    assert len({evaluation_fingerprint(metrics) for metrics in [told, *others]}) == 3
