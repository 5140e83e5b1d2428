"""Which rows go to which split: cutting, copies inside and across splits. Pure functions of row numbers and labels."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from molf import copies


@dataclass(frozen=True)
class Rows:
    """All rows of a task that may be kept, numbered through, those of one source split behind those of another.

    Attributes:
        source: Number of each row's split in the source: (rows,).
        prompt: Label of its prompt, alike where prompts are equal: (rows,).
        group: Label of its group, alike where rows must stay on one side; -1: a row of its own: (rows,).
        signatures: MinHash signatures, or None where near copies are not looked for: (rows, permutations).
        similarity: From which two rows are near copies, or None.
    """

    source: np.ndarray
    prompt: np.ndarray
    group: np.ndarray
    signatures: np.ndarray | None
    similarity: float | None

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Near copies: row, later row, estimated similarity. Every row that has a near copy stands in one pair at
        least."""
        if self.signatures is None or self.similarity is None:
            none = np.empty(0, dtype=np.int64)
            return none, none, np.empty(0)
        return copies.near_pairs(self.signatures, self.similarity)


@dataclass(frozen=True)
class Leak:
    """Rows of one split of which another holds a copy.

    Attributes:
        rows: Their numbers.
        of: For each, the row in the other split.
        similarity: For each; 1 where the prompts are equal.
        exact: For each, whether the prompts are equal.
    """

    rows: np.ndarray
    of: np.ndarray
    similarity: np.ndarray
    exact: np.ndarray

    def said(self, split: str, of: str, dropped: bool) -> dict[str, Any]:
        """What summary.json says of it."""
        exact = int(self.exact.sum())
        count = len(self.rows)
        return {"split": split, "of_split": of, "exact": exact, "near": count - exact, "dropped": dropped * count}


def units(rows: Rows, left: np.ndarray, right: np.ndarray, largest: int) -> np.ndarray:
    """Labels of rows that must not be torn apart by a cut: equal prompts, one group, near copies.

    Near copies make chains, which in rows from one template hold nearly all of them: a chain of over `largest` rows
    cannot lie on one side and counts as its rows.
    """
    count = len(rows.prompt)
    near = copies.clusters(count, left, right)
    small = np.bincount(near, minlength=count)[near[left]] <= largest
    linked = [
        _chain(rows.prompt),
        _chain(np.where(rows.group < 0, -1 - np.arange(count), rows.group)),
        (left[small], right[small]),
    ]
    return copies.clusters(count, *(np.concatenate(side) for side in zip(*linked, strict=True)))


def _chain(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that link each row with the next one of its label."""
    order = np.argsort(labels, kind="stable")
    same = labels[order][1:] == labels[order][:-1]
    return order[:-1][same], order[1:][same]


def cut(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws whole units until they hold `count` rows, or as many below it as units allow: a mask (rows,).

    Args:
        labels: Of each row's unit.
        count: Rows wanted.
        seed: Of the draw.
    """
    names, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(names), dtype=bool)
    left = count
    for unit in np.random.default_rng(seed).permutation(len(names)):
        if sizes[unit] <= left:
            chosen[unit] = True
            left -= sizes[unit]
            if not left:
                break
    return chosen[inverse]


def leak(rows: Rows, paired: np.ndarray, inside: np.ndarray, others: np.ndarray) -> Leak:
    """Rows of `inside` of which `others` hold a copy.

    Args:
        rows: All.
        paired: Which of them have a near copy at all: (rows,) of bool.
        inside: Row numbers.
        others: Row numbers of the split that they must not be in.
    """
    of = np.full(len(inside), -1, dtype=np.int64)
    similarity = np.zeros(len(inside))
    prompts, first = np.unique(rows.prompt[others], return_index=True)
    exact = np.isin(rows.prompt[inside], prompts)
    of[exact] = others[first[np.searchsorted(prompts, rows.prompt[inside[exact]])]]
    similarity[exact] = 1.0
    if rows.signatures is not None and rows.similarity is not None:
        # A chain links rows that are no copies of each other, so the rows themselves are held against each other.
        asked, theirs = ~exact & paired[inside], others[paired[others]]
        of[asked], similarity[asked] = copies.partners(rows.signatures, inside[asked], theirs, rows.similarity)
    found = of >= 0
    return Leak(inside[found], of[found], similarity[found], exact[found])
