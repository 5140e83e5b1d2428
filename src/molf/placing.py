"""The good rows of a task, each once, and the split in which each lies in the end."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from molf import copies, splits
from molf.blocks import SPLITS, TaskBlock
from molf.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 20_000  # rows that are moved together
COPIES = ["split", "example_id", "of_split", "of_example_id", "similarity"]


@dataclass
class Pool:
    """The good rows of one split of the source, each once.

    Attributes:
        examples: Prepared rows: (rows,).
        keys: Of each row's prompt and completion (`copies.exact_keys`): (rows, 2).
        prompts: Of each row's prompt: (rows, 2).
        groups: Of each row's group, or None: (rows, 2).
        signatures: MinHash signatures, or None: (rows, permutations).
    """

    examples: "pa.Table"
    keys: np.ndarray
    prompts: np.ndarray
    groups: np.ndarray | None
    signatures: np.ndarray | None


def once(split: str, pool: Pool) -> pd.DataFrame:
    """Leaves the first of equal rows in a pool; returns those that went (COPIES)."""
    origin = first_equal(pool.keys)
    kept = origin == np.arange(len(origin))
    names = pool.examples["example_id"].to_numpy()
    gone = pd.DataFrame(
        {
            "split": split,
            "example_id": names[~kept],
            "of_split": split,
            "of_example_id": names[origin[~kept]],
            "similarity": 1.0,
        },
        columns=COPIES,
    )
    if len(gone):
        pool.examples = pool.examples.filter(kept)
        pool.keys, pool.prompts = pool.keys[kept], pool.prompts[kept]
        pool.groups = None if pool.groups is None else pool.groups[kept]
        pool.signatures = None if pool.signatures is None else _moved_up(pool.signatures, np.flatnonzero(kept))
    return gone


def _moved_up(table: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Some rows of a table, ascending, in its own memory: at a million signatures a copy takes half a gigabyte."""
    for start in range(0, len(kept), BLOCK):
        block = kept[start : start + BLOCK]
        table[start : start + len(block)] = table[block]
    return table[: len(kept)]


def first_equal(keys: np.ndarray) -> np.ndarray:
    """For each key the number of the first one that equals it: (rows, 2) to (rows,)."""
    pairs = np.ascontiguousarray(keys).view([("high", keys.dtype), ("low", keys.dtype)]).ravel()
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    return first[inverse]


class Placing:
    """The rows of all pools, numbered through, and the split in which each lies in the end.

    Attributes:
        leaks: What summary.json says of copies across splits.
        left_out: {split: {dropped, limited}}: rows that left it as copies of another split's, and over its limit.
    """

    def __init__(self, name: str, block: TaskBlock, pools: dict[str, Pool]) -> None:
        self.name, self.block, self.pools = name, block, pools
        sizes = [len(pool.examples) for pool in pools.values()]
        self.starts = dict(zip(pools, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        source = np.repeat(np.arange(len(pools)), sizes)
        prompts = first_equal(np.concatenate([pool.prompts for pool in pools.values()]))
        self.rows = splits.Rows(
            source, prompts, self._groups(sum(sizes)), self._signatures(), block.duplicates.similarity
        )
        self.left, self.right, self.estimate = self.rows.pairs()
        self.paired = np.zeros(sum(sizes), dtype=bool)
        self.paired[self.left] = self.paired[self.right] = True
        self.leaks: list[dict[str, Any]] = []
        self.left_out = {split: {"dropped": 0, "limited": 0} for split in SPLITS}
        self._refused: list[tuple[str, str, splits.Leak]] = []
        self.chosen = self._facts() if block.kind == "fact" else self._splits()
        self.rows = replace(self.rows, signatures=None)  # the largest part of all, and of no use any more

    def _groups(self, count: int) -> np.ndarray:
        if self.block.split.group is None:
            return np.full(count, -1)
        keys = np.concatenate([pool.groups for pool in self.pools.values() if pool.groups is not None])
        return np.where((keys == copies.exact_keys([""])).all(axis=1), -1, first_equal(keys))

    def _signatures(self) -> np.ndarray | None:
        parts = [pool.signatures for pool in self.pools.values() if pool.signatures is not None]
        if not parts:
            return None
        for pool in self.pools.values():
            pool.signatures = None  # at a million rows half a gigabyte, which need not be held twice
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _of(self, split: str) -> np.ndarray:
        """Row numbers of a split of the source."""
        return self.starts[split] + np.arange(len(self.pools[split].examples))

    def _cut(self, pool: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Cuts rows off a pool for a split that the source lacks: as many as its limit or share says."""
        share, count = getattr(self.block.split, split), getattr(self.block.limits, split)
        if count is None:
            if not share:
                raise UserError(
                    f"tasks.{self.name}.split.{split}: 0 leaves no row for {split}, which the source lacks too; set a "
                    f"share such as 0.1, or limits.{split}, or give it rows of its own"
                )
            # Of 100 rows 0.29 are 29, though their product is a little less.
            count = max(1, int(round(len(self.pools["train"].examples) * share, 6)))
        labels = splits.units(self.rows, self.left, self.right, count)
        part = splits.cut(labels[pool], count, self.block.split.seed + SPLITS.index(split))
        return pool[part], pool[~part]

    def _limited(self, rows: np.ndarray, split: str) -> np.ndarray:
        """At most as many rows as the limit says, drawn by the seed, in their order."""
        limit = getattr(self.block.limits, split)
        if limit is None or limit >= len(rows):
            return np.sort(rows)
        self.left_out[split]["limited"] = len(rows) - limit
        return np.sort(np.random.default_rng(self.block.split.seed).choice(rows, limit, replace=False))

    def _facts(self) -> dict[str, np.ndarray]:
        """Trained and scored on the same facts by definition, and tuned on others."""
        limits, pool = self.block.limits, self._of("train")
        given = {"source: a test split": "test" in self.pools, "limits.test": limits.test}
        if any(given.values()):
            why = "fact is scored on the facts that it trains; leave it out"
            raise UserError([f"tasks.{self.name}.{what}: {why}" for what, has in given.items() if has])
        if "validation" in self.pools:
            others = self._of("validation")
        elif limits.train:
            shuffled = np.random.default_rng(self.block.split.seed).permutation(pool)
            pool, others = shuffled[: limits.train], shuffled[limits.train :]
        else:
            others, pool = self._cut(pool, "validation")
        facts = self._limited(pool, "train")
        seen = np.isin(self.rows.prompt[others], self.rows.prompt[facts])
        self._note("validation", "train", splits.leak(self.rows, self.paired, others[seen], facts), dropped=True)
        self.left_out["validation"]["dropped"] = int(seen.sum())
        return {"train": facts, "validation": self._limited(others[~seen], "validation"), "test": facts}

    def _splits(self) -> dict[str, np.ndarray]:
        pool = self._of("train")
        parts: dict[str, np.ndarray] = {}
        for split in ("test", "validation"):
            if split in self.pools:
                parts[split] = self._of(split)
            else:
                parts[split], pool = self._cut(pool, split)
        parts["test"] = self._limited(parts["test"], "test")
        parts["validation"] = self._apart("validation", parts["validation"], {"test": parts["test"]})
        parts["validation"] = self._limited(parts["validation"], "validation")
        others = {split: parts[split] for split in ("test", "validation")}
        parts["train"] = self._limited(self._apart("train", pool, others), "train")
        return parts

    def _apart(self, split: str, rows: np.ndarray, others: dict[str, np.ndarray]) -> np.ndarray:
        """The rows of which the other splits hold no copy, or all where copies are kept.

        What was cut off the same rows is no mistake of the source, so its few copies, of chains too long for one side,
        just leave.
        """
        across = self.block.duplicates.across
        gone = []
        for of, theirs in others.items():
            found = splits.leak(self.rows, self.paired, rows, theirs)
            dropped = across == "drop" or (across == "fail" and self._source(split) == self._source(of))
            self._note(split, of, found, dropped)
            if dropped:
                gone.append(found.rows)
            elif across == "fail" and len(found.rows):
                self._refused.append((split, of, found))
        apart = np.setdiff1d(rows, np.concatenate(gone)) if gone else rows
        self.left_out[split]["dropped"] = len(rows) - len(apart)
        return apart

    def _source(self, split: str) -> str:
        """The split of the source off which a split is."""
        return split if split in self.pools else "train"

    def _note(self, split: str, of: str, found: splits.Leak, dropped: bool) -> None:
        if len(found.rows):
            self.leaks.append(found.said(split, of, dropped))

    def refuse_leaks(self) -> None:
        """Raises `UserError` for copies across splits that the block does not allow."""
        if not self._refused:
            return
        lines = [f"tasks.{self.name}: rows of one split have copies in another, so its scores would flatter:"]
        for split, of, found in self._refused:
            exact = int(found.exact.sum())
            best = int(np.argmax(found.similarity))
            one, other = self._name(found.rows[best]), self._name(found.of[best])
            lines.append(
                f"    {split} rows also in {of}: {exact:,} with an equal prompt, {len(found.rows) - exact:,} near "
                f"copies; such as {one} and {other}"
            )
        lines.append(
            f"    set tasks.{self.name}.duplicates.across to drop (they leave the split named first) or keep, mend "
            "the files, or raise duplicates.similarity"
        )
        raise UserError("\n".join(lines))

    def _name(self, row: int) -> str:
        split = list(self.pools)[int(self.rows.source[row])]
        return str(self.pools[split].examples["example_id"][int(row) - self.starts[split]])

    def near_inside(self) -> dict[str, int]:
        """How many rows of each split of the source have a near copy before them there."""
        own = self.rows.source[self.left] == self.rows.source[self.right]
        later = np.unique(self.right[own])
        counts = np.bincount(self.rows.source[later], minlength=len(self.pools))
        return dict(zip(self.pools, counts.tolist(), strict=True))

    def copies(self) -> pd.DataFrame:
        """Every pair of near copies that was found, inside and across splits of the source (COPIES)."""
        names = np.concatenate([pool.examples["example_id"].to_numpy() for pool in self.pools.values()])
        labels = np.array(list(self.pools), dtype=object)
        source = self.rows.source
        return pd.DataFrame(
            {
                "split": labels[source[self.right]],
                "example_id": names[self.right],
                "of_split": labels[source[self.left]],
                "of_example_id": names[self.left],
                "similarity": self.estimate.astype(np.float64),
            },
            columns=COPIES,
        )

    def table(self, split: str) -> "pa.Table":
        """The examples of a split, in the order of their source."""
        import pyarrow as pa

        parts = []
        for name, pool in self.pools.items():
            own = self.chosen[split] - self.starts[name]
            mask = np.zeros(len(pool.examples), dtype=bool)
            mask[own[(own >= 0) & (own < len(mask))]] = True
            if mask.any():
                parts.append(pool.examples.filter(mask))
        return pa.concat_tables(parts, promote_options="default") if parts else self.pools["train"].examples.slice(0, 0)
