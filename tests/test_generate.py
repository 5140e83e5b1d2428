"""The invented world: complete, the same every time, and apart from what is asked of it."""

import sqlite3
from collections import Counter

import pytest

from molf import generate
from molf.tasks import TASKS, fact, med

COUNTS = {"train": 60, "validation": 12, "test": 24}


@pytest.mark.parametrize("kind", generate.MAKERS)
def test_rows_are_as_many_as_asked_differ_and_repeat_by_seed(kind: str) -> None:
    made = generate.rows(kind, COUNTS, 3)
    assert {split: len(rows) for split, rows in made.items()} == COUNTS
    all_rows = [str(sorted(row.items(), key=str)) for rows in made.values() for row in rows]
    assert len(set(all_rows)) == len(all_rows)
    assert generate.rows(kind, COUNTS, 3) == made
    assert generate.rows(kind, COUNTS, 4) != made


@pytest.mark.parametrize(("kind", "there"), [("fact", 300), ("med", 768)])
def test_more_rows_than_the_world_has_is_an_error_with_the_number(kind: str, there: int) -> None:
    generate.rows(kind, {"train": there}, 0)
    with pytest.raises(ValueError, match=f"{there + 1} generated {kind} rows .* has {there}"):
        generate.rows(kind, {"train": there + 1}, 0)


def test_a_kind_without_a_generator_is_named() -> None:
    assert {*generate.MAKERS} < {*TASKS}
    with pytest.raises(ValueError, match="of kind sql, med, fact only, not of choice; name a file"):
        generate.rows("choice", COUNTS, 0)


def test_facts_have_true_neighbours_that_are_never_edited() -> None:
    world = {(subject, relation): true for subject, relation, true in generate._facts()}
    by_prompt = {
        phrasing.format(subject): true
        for (subject, relation), true in world.items()
        for phrasing in generate.RELATIONS[relation][:2]
    }
    rows = generate.rows("fact", {"train": 200, "validation": 100}, 0)
    edited = set()
    for row in (*rows["train"], *rows["validation"]):
        rewrite = row["requested_rewrite"]
        prompt = rewrite["prompt"].format(rewrite["subject"])
        edited.add(prompt)
        true = rewrite["target_true"]["str"]
        assert by_prompt[prompt] == true != rewrite["target_new"]["str"]
        assert [by_prompt[paraphrase] for paraphrase in row["paraphrase_prompts"]] == [true]
        assert 1 <= len(row["neighborhood_prompts"]) <= 2
        assert all(by_prompt[neighbour] == true for neighbour in row["neighborhood_prompts"])
    neighbours = {prompt for split in rows.values() for row in split for prompt in row["neighborhood_prompts"]}
    assert len(edited) == 300 and not edited & neighbours


def test_running_text_tells_the_truth_and_nothing_that_may_be_edited() -> None:
    tales = generate.running_text(0, 300)
    assert tales == generate.running_text(0, 300) != generate.running_text(1, 300)
    told = {sentence for tale in tales for sentence in tale.removesuffix(".").split(". ")}
    kept = {
        f"{phrasing.format(subject)} {true}"
        for subject, relation, true in generate._halves()[1]
        for phrasing in generate.RELATIONS[relation][:2]
    }
    drugs = {f"{drug} is {kind}" for kind, names in generate._drugs().items() for drug in names}
    assert told <= kept | drugs and told & kept and told & drugs
    for seed in range(3):
        for row in generate.rows("fact", {"train": 300}, seed)["train"]:
            rewrite = row["requested_rewrite"]
            prompts = [rewrite["prompt"].format(rewrite["subject"]), *row["paraphrase_prompts"]]
            assert not any(sentence.startswith(f"{prompt} ") for prompt in prompts for sentence in told)


def test_running_text_is_none_of_the_pretraining_nor_of_a_task() -> None:
    documents = {text for _, text in generate.pretraining_text(0)}
    tales = generate.running_text(0, 200)
    assert not documents & set(tales)
    asked = [row["question"] for row in generate.rows("med", {"train": 768}, 0)["train"]]
    assert not any(question in tale for question in asked for tale in tales)


def test_the_right_answer_is_what_the_drug_is_and_stands_everywhere_alike() -> None:
    rows = generate.rows("med", {"train": 400}, 1)["train"]
    assert Counter(row["cop"] for row in rows) == {1: 100, 2: 100, 3: 100, 4: 100}
    drugs = generate._drugs()
    for row in rows:
        drug = row["question"].removeprefix("What is ").removesuffix("?")
        right = [drug in drugs[row[option]] for option in med.OPTIONS]
        assert right == [place == row["cop"] for place in (1, 2, 3, 4)]


def test_every_gold_query_runs_and_returns_something() -> None:
    for row in generate.rows("sql", {"train": 120}, 2)["train"]:
        database = sqlite3.connect(":memory:")
        database.executescript(row["sql_context"])
        assert database.execute(row["sql"]).fetchall(), row
        database.close()


def test_pretraining_teaches_the_world_but_no_question_of_the_tasks() -> None:
    documents = generate.pretraining_text(0, choices=20, queries=300)
    assert documents == generate.pretraining_text(0, choices=20, queries=300)
    for subject, relation, true in generate._facts():
        for phrasing in generate.RELATIONS[relation][:2]:
            assert (fact.prompt(phrasing, subject), fact.completion(true)) in documents
    told = "\n".join("".join(document) for document in documents)
    assert not any(f"What is {drug}?" in told for drugs in generate._drugs().values() for drug in drugs)
    for row in generate.rows("sql", {"train": 200}, 0)["train"]:
        assert row["sql_prompt"] not in told and row["sql"] not in told
