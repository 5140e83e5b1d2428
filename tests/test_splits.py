"""Cutting whole units, and copies across splits, on rows small enough to say by hand what must come out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from molf import copies, data, splits
from molf.blocks import SPLITS
from molf.errors import UserError
from tests.test_data import block, frame, med_rows, run, write_jsonl


def rows(prompts: list[str], groups: list[int] | None = None, similarity: float | None = 0.8) -> splits.Rows:
    _, labels = np.unique(prompts, return_inverse=True)
    return splits.Rows(
        source=np.zeros(len(prompts), dtype=np.int64),
        prompt=labels,
        group=np.array(groups if groups is not None else [-1] * len(prompts)),
        signatures=None if similarity is None else copies.signatures(prompts),
        similarity=similarity,
    )


LONG = "The committee met on a cold morning in the old town hall, and nobody could say how long the debate would last."
NEAR = LONG.replace("cold", "chill")


def test_a_unit_is_equal_prompts_one_group_or_near_copies() -> None:
    table = rows(["a", "b", "a", "c", "d", LONG, NEAR], [-1, 7, -1, 7, -1, -1, -1])
    left, right, _ = table.pairs()
    labels = splits.units(table, left, right, largest=5)
    assert labels[0] == labels[2] and labels[1] == labels[3] and labels[5] == labels[6]
    assert len(set(labels.tolist())) == 4
    torn = splits.units(table, left, right, largest=1)
    assert torn[5] != torn[6], "a chain too long for one side is torn"
    assert torn[0] == torn[2] and torn[1] == torn[3], "equal prompts and groups are never torn"


def test_a_cut_takes_whole_units_up_to_the_count() -> None:
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2 + [3])
    for seed in range(20):
        for count in range(12):
            part = splits.cut(labels, count, seed)
            assert part.sum() <= count
            for label in range(4):
                assert len(set(part[labels == label].tolist())) == 1
    assert splits.cut(labels, 11, 0).all()
    assert np.array_equal(splits.cut(labels, 4, 3), splits.cut(labels, 4, 3))
    assert len({tuple(splits.cut(np.arange(30), 5, seed)) for seed in range(9)}) > 5


def test_a_leak_names_the_row_and_its_copy() -> None:
    table = rows(["a", LONG, "x", "y", NEAR, "x"])
    paired = np.array([False, True, False, False, True, False])
    found = splits.leak(table, paired, np.array([0, 1, 2]), np.array([3, 4, 5]))
    assert found.rows.tolist() == [1, 2] and found.of.tolist() == [4, 5]
    assert found.exact.tolist() == [False, True]
    assert found.similarity[1] == 1 and 0.8 <= found.similarity[0] < 1


def test_rows_linked_by_a_chain_alone_are_no_copies() -> None:
    words = [f"word{i}" for i in range(60)]
    chain = [" ".join(words[i : i + 40]) for i in range(0, 16, 2)]  # each like the next, the first unlike the last
    table = rows(chain)
    left, right, _ = table.pairs()
    assert (copies.clusters(len(chain), left, right) == 0).all()
    every = np.ones(len(chain), dtype=bool)
    found = splits.leak(table, every, np.array([0]), np.array([len(chain) - 1]))
    assert not len(found.rows)
    assert len(splits.leak(table, every, np.array([0]), np.array([1])).rows) == 1


# --- through `prepare` ---------------------------------------------------------------------------------------------


def long_rows(count: int) -> list[dict[str, Any]]:
    """Med rows that are unlike each other."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    return [row | {"question": "".join(generator.choice(letters, 120))} for row in med_rows(count)]


def two_files(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, Any]:
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    return {"kind": "file", "path": str(folder), "files": {"train": "train.jsonl", "test": "test.jsonl"}}


def test_copies_across_splits_fail_leave_or_stay_as_the_block_says(tmp_path: Path) -> None:
    made = long_rows(60)
    near = made[50] | {"question": made[50]["question"] + "?"}
    source = two_files(tmp_path, [*made[:40], made[45], near], made[40:])
    limits = {"train": None, "validation": 4, "test": None}

    def prepared(across: str, similarity: float | None = 0.8) -> dict[str, Any]:
        rule = {"similarity": similarity, "across": across}
        return run("med", block("med", source=source, limits=limits, duplicates=rule), tmp_path)

    with pytest.raises(UserError) as caught:
        prepared("fail")
    text = str(caught.value)
    assert "train rows also in test: 1 with an equal prompt, 1 near copies" in text
    assert "set tasks.med.duplicates.across to drop (they leave the split named first)" in text
    assert len(frame(tmp_path, "copies")) == 2, "what was found is kept to be looked at"

    dropped = prepared("drop")
    assert {"split": "train", "of_split": "test", "exact": 1, "near": 1, "dropped": 2} in dropped["leaks"]
    assert dropped["rows"]["train"]["kept"] + dropped["rows"]["validation"]["kept"] == 40
    ids = set(frame(tmp_path, "train")["example_id"]) | set(frame(tmp_path, "validation")["example_id"])
    assert not ids & {"train-41", "train-42"}

    kept = prepared("keep")
    assert kept["leaks"][0]["dropped"] == 0
    assert kept["rows"]["train"]["kept"] + kept["rows"]["validation"]["kept"] == 42
    assert any("have copies in test and are kept" in text for text in kept["warnings"])

    exact = prepared("drop", similarity=None)
    assert sum(leak["near"] for leak in exact["leaks"]) == 0 and exact["rows"]["train"]["near_duplicates"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_in_two_given_splits_fails_whichever_row_the_third_one_takes(seed: int, tmp_path: Path) -> None:
    made = long_rows(30)
    source = two_files(tmp_path, made[:20], [made[0], *made[20:]])
    source["files"]["validation"] = source["files"].pop("test")
    rule = {"validation": 0.1, "test": 0.5, "seed": seed, "group": None}
    task = block("med", source=source, split=rule, duplicates={"similarity": None, "across": "fail"})
    with pytest.raises(UserError, match=r"(train|validation) rows also in (validation|test): 1 with an equal prompt"):
        run("med", task, tmp_path)


@pytest.mark.parametrize("across", ["drop", "keep"])
@pytest.mark.parametrize("given", [(), ("validation",), ("test",), ("validation", "test")])
@pytest.mark.parametrize("limit", [None, 5])
def test_every_row_of_the_source_is_accounted_for(
    across: str, given: tuple[str, ...], limit: int | None, tmp_path: Path
) -> None:
    made = long_rows(60)
    near = made[50] | {"question": made[50]["question"] + "?"}
    files = {"train": [*made[:36], made[0], made[45], near, made[1] | {"cop": 9}]}
    files |= {"validation": [*made[36:46], made[55]], "test": [*made[46:], made[36]]}
    files = {split: rows for split, rows in files.items() if split in ("train", *given)}
    for split, rows in files.items():
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    source = {"kind": "file", "path": str(tmp_path), "files": {split: f"{split}.jsonl" for split in files}}
    rule = {"similarity": 0.8, "across": across}
    limits = dict.fromkeys(SPLITS, limit)
    summary = run("med", block("med", source=source, duplicates=rule, limits=limits, max_rejected=0.1), tmp_path)
    kept = [set(frame(tmp_path, split)["example_id"]) for split in SPLITS]
    assert len(set().union(*kept)) == sum(map(len, kept)), "no row lies in two splits"
    counts = summary["rows"].values()
    gone = sum(count[why] for count in counts for why in ("rejected", "duplicates", "dropped", "limited"))
    assert sum(count["raw"] for count in counts) == sum(map(len, files.values())) == sum(map(len, kept)) + gone
    assert [summary["rows"][split]["kept"] for split in SPLITS] == [len(ids) for ids in kept]


def test_a_group_lies_on_one_side(tmp_path: Path) -> None:
    nobody = [None, "", " ", float("nan")]
    made = [row | {"author": i % 12 if i % 5 else nobody[i // 5 % 4]} for i, row in enumerate(long_rows(120))]
    path = write_jsonl(tmp_path / "rows.jsonl", made)
    rule = {"validation": 0.2, "test": 0.2, "seed": 3, "group": "author"}
    source = {"kind": "file", "path": str(path)}
    run("med", block("med", source=source, split=rule), tmp_path)
    sides: dict[int, set[str]] = {}
    sizes = {}
    for split in SPLITS:
        table = frame(tmp_path, split)
        sizes[split] = len(table)
        for name in table["example_id"]:
            author = made[int(name.split("-")[1]) - 1]["author"]
            if isinstance(author, int):
                sides.setdefault(author, set()).add(split)
    assert all(len(where) == 1 for where in sides.values()) and len(sides) == 12
    assert sizes["validation"] == sizes["test"] == 24 and sizes["train"] == 72
    with pytest.raises(
        UserError, match="tasks.med.split.group: the train rows have no column writer; there is question"
    ):
        run("med", block("med", source=source, split=rule | {"group": "writer"}), tmp_path)


def test_near_copies_of_one_file_are_cut_to_one_side(tmp_path: Path) -> None:
    made = long_rows(40)
    made += [row | {"question": row["question"] + " !"} for row in made]
    path = write_jsonl(tmp_path / "rows.jsonl", made)
    rule = {"similarity": 0.8, "across": "fail"}
    summary = run("med", block("med", source={"kind": "file", "path": str(path)}, duplicates=rule), tmp_path)
    assert summary["leaks"] == [] and sum(count["kept"] for count in summary["rows"].values()) == 80
    assert summary["rows"]["train"]["near_duplicates"] == 40
    assert any("near copies of a row before them" in text for text in summary["warnings"])


def test_several_files_of_a_split_are_one_after_the_other(tmp_path: Path) -> None:
    made = med_rows(40)
    for number in (1, 2):
        write_jsonl(tmp_path / f"{number}.jsonl", made[(number - 1) * 20 : number * 20])
    made[25]["cop"] = 9
    write_jsonl(tmp_path / "2.jsonl", made[20:])
    source = {"kind": "file", "path": str(tmp_path), "files": {"train": ["1.jsonl", "2.jsonl"]}}
    summary = run("med", block("med", source=source, max_rejected=0.1), tmp_path)
    assert summary["rows"]["train"]["raw"] == 40 and [file["rows"] for file in summary["source"]["files"]["train"]] == [
        20,
        20,
    ]
    rejected = frame(tmp_path, "rejected")
    assert rejected[["file", "source_row"]].to_numpy().tolist() == [[1, 6]]
    names = pd.concat([frame(tmp_path, split) for split in SPLITS])["example_id"]
    assert {"train-1-1", "train-2-1"} <= set(names) and names.is_unique and len(names) == 39


def test_an_answer_that_is_too_frequent_is_warned_of(tmp_path: Path) -> None:
    made = [row | {"cop": 1 if i % 4 else 2} for i, row in enumerate(long_rows(80))]
    write_jsonl(tmp_path / "rows.jsonl", made)
    summary = run("med", block("med", source={"kind": "file", "path": str(tmp_path / "rows.jsonl")}), tmp_path)
    assert summary["answers"]["train"] == {"most_common": "A", "share": pytest.approx(0.75, abs=0.05), "distinct": 2}
    constant = [row | {"cop": 1} for row in made]
    write_jsonl(tmp_path / "rows.jsonl", constant)
    summary = run("med", block("med", source={"kind": "file", "path": str(tmp_path / "rows.jsonl")}), tmp_path)
    assert any(text.startswith("train: 100% of the answers are 'A'") for text in summary["warnings"])
    assert "100% of the answers" in data.describe(summary)
    assert json.loads((tmp_path / "prepared/summary.json").read_text()) == summary
