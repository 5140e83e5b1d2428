"""Copies are found: held against piece sets written out literally, on random, mutated and template-like texts."""

import math
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest

from molf import copies
from molf.copies import banding, clusters, exact_keys, near_pairs, partners, signatures

WORDS = ["".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=2 + seed % 8)) for seed in range(3000)]


def text(draw: random.Random, words: int = 50) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def mutated(draw: random.Random, original: str, changes: int) -> str:
    words = original.split(" ")
    for place in draw.sample(range(len(words)), changes):
        words[place] = draw.choice(WORDS)
    return " ".join(words)


def pieces(of: str) -> set[str]:
    """The definition, character by character."""
    folded = unicodedata.normalize("NFKC", of).casefold() if not of.isascii() else of.lower()
    shown = [letter for letter in folded if unicodedata.category(letter) != "Cf"]
    spaced = "".join(" " if unicodedata.category(c)[0] in "PZ" or unicodedata.category(c) == "Cc" else c for c in shown)
    words = spaced.split(" ")
    flat = " " + " ".join(filter(None, words)) if any(words) else "\n" + "".join(shown)
    return {flat[i : i + 5] for i in range(len(flat) - 4)} or {flat}


def similarity(one: str, other: str) -> float:
    a, b = pieces(one), pieces(other)
    return len(a & b) / len(a | b)


def estimate(one: str, other: str) -> float:
    a, b = signatures([one, other])
    return float((a == b).mean())


def pairs_of(texts: Sequence[str], threshold: float) -> dict[tuple[int, int], float]:
    left, right, found = near_pairs(signatures(texts), threshold)
    assert (left < right).all() and len(set(zip(left, right, strict=True))) == len(left)
    return {(int(a), int(b)): float(s) for a, b, s in zip(left, right, found, strict=True)}


def test_estimates_are_the_overlap_of_the_pieces() -> None:
    draw = random.Random(0)
    exact, estimated = [], []
    for _ in range(1500):
        one = text(draw, draw.randint(3, 60))
        other = mutated(draw, one, draw.randint(0, len(one.split(" "))))
        exact.append(similarity(one, other))
        estimated.append(estimate(one, other))
    true, found = np.array(exact), np.array(estimated)
    error = np.sqrt(np.maximum(true * (1 - true), 1e-9) / 128)
    assert true.min() < 0.05 and true.max() == 1
    assert (found[true == 1] == 1).all()
    assert abs((found - true).mean()) < 3 * error.mean() / math.sqrt(len(true))
    assert (np.abs(found - true) <= 4.5 * error + 1 / 128).all()


@pytest.mark.parametrize(
    "one, other",
    [
        ("The Cat, sat!", "the cat  sat"),
        ("  leading\tand\n\nbroken   ", "leading and broken"),
        ("ﬁve ｆｕｌｌ", "five full"),  # compatibility forms
        ("café noir", "cafe\u0301 noir"),  # a combining accent
        ("STRASSE", "straße"),
        ("soft\u00adhyphen and zero\u200bwidth", "softhyphen and zerowidth"),
        ("“quoted” — dash…", "quoted dash"),
        ("don't", "don t"),
    ],
)
def test_what_reads_alike_is_alike(one: str, other: str) -> None:
    assert pieces(one) == pieces(other) and estimate(one, other) == 1


@pytest.mark.parametrize(
    "one, other",
    [
        ("", "a"),
        ("", " "),
        ("???", "!!!"),  # nothing but punctuation: kept
        ("{}", "[]"),
        ("abc", "abd"),
        ("a", "aa"),
        ("1 + 1 = 2", "1 * 1 = 2"),
        ("👩‍🚀 in space with a long enough tail", "👨‍🚀 in space with a long enough tail"),
        ("\ud800 half a pair", "\ud801 half a pair"),
        ("naïve", "naive"),
        ("東京は日本の首都です", "京都は日本の古都です"),
    ],
)
def test_what_differs_is_told_apart(one: str, other: str) -> None:
    assert pieces(one) != pieces(other)
    assert estimate(one, other) < 1 and estimate(one, one) == estimate(other, other) == 1
    assert abs(estimate(one, other) - similarity(one, other)) < 0.2


def test_signatures_do_not_depend_on_what_stands_around_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    kinds: list[Callable[[], str]] = [
        lambda: text(draw, draw.randint(1, 80)),
        lambda: draw.choice(["", "a", "ab", "abcd", "abcde", "?", "\u200b", "é", "\n\n"]),
        lambda: "".join(chr(draw.choice([0x41, 0xE9, 0x300, 0x1F600, 0x4E00, 0x200D, 0x20])) for _ in range(30)),
    ]
    texts = [draw.choice(kinds)() for _ in range(400)]
    whole = signatures(texts)
    assert whole.shape == (400, 128) and whole.dtype == np.uint32
    assert (whole == np.concatenate([signatures([row]) for row in texts])).all()
    assert (whole == signatures(pd.Series(texts, dtype=object))).all()
    monkeypatch.setattr(copies, "CHARACTERS", 50)
    assert (whole == signatures(texts)).all()
    assert signatures([]).shape == (0, 128)


def test_every_character_counts_as_its_category_says() -> None:
    table = copies._folding()
    for point in range(sys.maxunicode + 1):
        category, own = unicodedata.category(chr(point)), point + 32 if "A" <= chr(point) <= "Z" else point
        expected = 32 if category[0] in "ZP" or category == "Cc" else 0 if category == "Cf" else own
        assert table[point] == expected, hex(point)


def test_signatures_never_change() -> None:
    """Kept files hold results that follow from them: another machine, process or release must agree."""
    code = (
        "import hashlib\n"
        "from molf.copies import exact_keys, signatures\n"
        "texts = ['Who wrote it? Ada.', 'abc', '', 'café 東京 👩‍🚀', 'x' * 3000]\n"
        "for found in (signatures(texts).astype('<u4'), exact_keys(texts).astype('<u8')):\n"
        "    print(hashlib.sha256(found.tobytes()).hexdigest()[:16])\n"
    )
    for kernel in ("auto", "scalar"):
        environment = {**os.environ, "RENSA_FORCE_KERNEL": kernel}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.split() == ["9e6ea6758d5208da", "eb272e05dd379c65"]


def test_a_long_text_counts_to_its_end_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(2)
    long = text(draw, 180_000)
    assert len(long) > 1_000_000
    half = long[: len(long) // 2] + text(draw, 90_000)
    assert estimate(long, long + " ") == 1
    assert abs(estimate(long, half) - similarity(long, half)) < 4.5 * math.sqrt(0.25 / 128)
    monkeypatch.setattr(copies, "LONGEST", 1000)
    assert estimate(long[:1000] + "one end", long[:1000] + "and another") == 1


def test_keys_tell_bytes_apart() -> None:
    texts = ["a", "A", "a ", "", "é", "e\u0301", "a", "\ud800", "\ud801", "a\0", "a" * 10_000, "a" * 9_999]
    keys = exact_keys(pd.Series(texts, dtype=object))
    assert keys.shape == (12, 2) and keys.dtype == np.uint64
    assert (keys[0] == keys[6]).all()
    assert len({tuple(key) for key in keys.tolist()}) == 11
    assert exact_keys([]).shape == (0, 2)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99])
def test_bands_find_what_they_promise(threshold: float) -> None:
    bands, slots = banding(threshold)
    assert bands * slots <= 128

    def chance(s: float, r: int) -> float:
        return 1 - (1 - s**r) ** (128 // r)

    assert chance(threshold, slots) >= 0.95 and chance(min(threshold + 0.05, 1), slots) >= 0.999
    # No wider band would do.
    assert chance(threshold, slots + 1) < 0.95 or chance(min(threshold + 0.05, 1), slots + 1) < 0.999
    # Signatures in which each slot agrees with that chance: what is found of the pairs, when every estimate would do.
    random_ = np.random.default_rng(3)
    one = random_.integers(0, 2**32, size=(4000, 128), dtype=np.uint32)
    for similar, least in ((threshold, 0.95), (min(threshold + 0.05, 1), 0.999)):
        other = np.where(random_.random((4000, 128)) < similar, one, ~one)
        left, right, _ = near_pairs(np.concatenate([one, other]), threshold)
        reached = (one == other).mean(axis=1) >= threshold
        found = set(zip(left.tolist(), right.tolist(), strict=True))
        got = sum((row, row + 4000) in found for row in np.flatnonzero(reached)) / reached.sum()
        assert got >= least - 3 * math.sqrt(least * (1 - least) / reached.sum())


@pytest.mark.parametrize("threshold, changes", [(0.6, 15), (0.85, 2)])
def test_pairs_are_those_of_the_definition_but_for_the_estimates_error(threshold: float, changes: int) -> None:
    draw = random.Random(4)
    texts = [text(draw, draw.randint(20, 90)) for _ in range(250)]
    texts += [mutated(draw, draw.choice(texts), draw.randint(1, changes)) for _ in range(250)]
    sets = [pieces(row) for row in texts]
    found = pairs_of(texts, threshold)
    error = math.sqrt(threshold * (1 - threshold) / 128)
    near, sure, missed = 0, 0, 0
    for a in range(len(texts)):
        for b in range(a + 1, len(texts)):
            true = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
            if (a, b) in found:
                near += 1
                assert true > threshold - 4.5 * error and abs(found[a, b] - true) < 4.5 * error + 1 / 128
            if true >= threshold + 3 * error:
                sure += 1
                missed += (a, b) not in found
    assert near == len(found) and sure > 40 and missed <= 0.01 * sure


def all_pairs(made: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Every pair whose estimate reaches the threshold."""
    left, right = np.triu_indices(len(made), 1)
    near = np.concatenate([(made[a] == made[a + 1 :]).mean(axis=1) for a in range(len(made) - 1)]) >= threshold
    return left[near], right[near]


def template(draw: random.Random, frame: str) -> str:
    return frame.format(*(draw.choice(WORDS) for _ in range(frame.count("{}"))))


def test_where_thousands_are_alike_pairs_stay_few_and_links_whole() -> None:
    draw = random.Random(5)
    frames = [
        " ".join([*draw.choices(WORDS, k=40), "{}", *draw.choices(WORDS, k=20)]),  # near 0.9
        " ".join([*draw.choices(WORDS, k=30), "{} {}", *draw.choices(WORDS, k=30)]),  # near 0.8
        " ".join([*draw.choices(WORDS, k=15), "{} {} {} {}", *draw.choices(WORDS, k=15)]),  # near 0.6
    ]
    texts = [template(draw, draw.choice(frames)) for _ in range(3000)]
    # And rows inside the crowd that have one true near copy each.
    texts += [mutated(draw, template(draw, frames[2]), 0) + " own" for _ in range(20)]
    draw.shuffle(texts)
    made = signatures(texts)
    left, right, _ = near_pairs(made, 0.85)
    assert len(left) < 40 * len(texts)
    true_left, true_right = all_pairs(made, 0.85)
    assert len(true_left) > 10 * len(left)  # quadratic
    partnered = np.isin(np.arange(len(texts)), np.concatenate([left, right]))
    should = np.isin(np.arange(len(texts)), np.concatenate([true_left, true_right]))
    assert not (partnered & ~should).any()
    assert partnered.sum() >= 0.99 * should.sum()
    # Linked are just those that all pairs would link, but for a row or two at a cluster's rim.
    mine, true = clusters(len(texts), left, right), clusters(len(texts), true_left, true_right)
    assert len(set(mine.tolist())) <= len(set(true.tolist())) + 0.01 * len(texts)


@pytest.mark.parametrize("crowded", [False, True])
def test_partners_are_the_nearest_on_the_other_side(crowded: bool) -> None:
    draw = random.Random(9)
    frame = " ".join([*draw.choices(WORDS, k=25), "{} {}", *draw.choices(WORDS, k=25)])  # near 0.8
    texts = [template(draw, frame) if crowded else text(draw) for _ in range(1500)]
    texts += [mutated(draw, row, draw.randint(0, 4)) for row in draw.sample(texts, 500)]
    texts += draw.choices(texts, k=20)
    made = signatures(texts)
    side = np.array([draw.random() < 0.3 for _ in texts])
    order = np.array(draw.sample(range(len(texts)), len(texts)))
    inside, others = order[~side], order[side]
    of, found = partners(made, inside, others, 0.85)
    alike = np.stack([(made[row] == made[others]).mean(axis=1) for row in inside])
    best = alike.max(axis=1)
    assert (of.dtype, found.dtype) == (np.int64, np.float32) and not set(of.tolist()) & set(inside.tolist())
    paired = of >= 0
    assert (found[~paired] == 0).all() and (found[paired] >= 0.85).all()
    assert (found[paired] == (made[inside[paired]] == made[of[paired]]).mean(axis=1)).all()
    assert 150 < paired.sum() <= (best >= 0.85).sum() and not (paired & (best < 0.85)).any()
    # Among a crowd, some near copy for (nearly) every row; else the nearest, for nearly every one above the threshold.
    assert paired.sum() >= (0.98 if crowded else 0.995) * (best >= 0.85).sum()
    if not crowded:
        assert (found[paired] == best[paired]).mean() > 0.99
        first = [min(others[row == row.max()]) for row in alike[paired]]
        assert (of[paired] == first).mean() > 0.99
    none = np.empty(0, np.int64)
    assert (partners(made, inside, none, 0.85)[0] == -1).all() and len(partners(made, none, others, 0.85)[0]) == 0


def test_equal_rows_are_paired_with_the_first_of_them() -> None:
    draw = random.Random(6)
    a, b = text(draw), text(draw)
    close = mutated(draw, a, 2)
    found = pairs_of([b, a, b, close, a.upper(), b + "!", a], 0.8)
    assert {pair for pair, similar in found.items() if similar == 1} == {(0, 2), (0, 5), (1, 4), (1, 6)}
    assert [pair for pair, similar in found.items() if similar < 1] == [(1, 3)]


def test_order_of_rows_makes_no_difference() -> None:
    draw = random.Random(7)
    frame = " ".join([*draw.choices(WORDS, k=30), "{}", *draw.choices(WORDS, k=30)])
    texts = list({template(draw, frame) for _ in range(300)} | {text(draw) for _ in range(300)})
    texts += [mutated(draw, row, 2) for row in texts[:200]]
    orders = [sorted(texts), sorted(texts, reverse=True), sorted(texts, key=lambda row: re.sub("[aeiou]", "", row))]
    found = []
    for rows in orders:
        made = [row.tobytes() for row in signatures(rows)]  # of equal ones the first is paired
        pairs = pairs_of(rows, 0.8)
        found.append({(frozenset((made[a], made[b])), similar) for (a, b), similar in pairs.items()})
    assert found[0] == found[1] == found[2] and len(found[0]) > 1000


def test_clusters_carry_their_smallest_row() -> None:
    draw = np.random.default_rng(8)
    for _ in range(50):
        n = int(draw.integers(1, 60))
        left, right = draw.integers(0, n, size=(2, int(draw.integers(0, n))))
        expected = list(range(n))
        for _ in range(n):
            for a, b in zip(left.tolist(), right.tolist(), strict=True):
                expected[a] = expected[b] = min(expected[a], expected[b])
        assert clusters(n, left, right).tolist() == expected
    # A chain in the worst of orders.
    order = draw.permutation(20_000)
    assert (clusters(20_000, order[1:], order[:-1]) == 0).all()
    none = np.empty(0, np.int64)
    assert clusters(3, none, none).tolist() == [0, 1, 2] and clusters(0, none, none).tolist() == []


def test_no_rows_and_one_row_have_no_pairs() -> None:
    for texts in ([], ["alone"]):
        left, right, found = near_pairs(signatures(texts), 0.85)
        assert len(left) == len(right) == len(found) == 0
        assert (left.dtype, right.dtype, found.dtype) == (np.int64, np.int64, np.float32)
