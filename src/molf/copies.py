"""Which rows are copies of others, exactly or nearly: pure functions over columns of text.

Two texts are near copies when the sets of their 5-character pieces overlap: their similarity is shared pieces / all
pieces (Jaccard). It is estimated from MinHash signatures, and pairs are found by locality-sensitive hashing, so that no
row meets all others.
"""

import hashlib
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pandas as pd
from rensa import RMinHash

SLOTS = 128  # values of a signature; an estimated similarity s has a standard error of at most sqrt(s (1 - s) / 128)
PIECE = 5  # characters
SEED = 20_260_507  # another one makes other signatures, and finds other pairs near the threshold
LONGEST = 2**22  # characters of a text that count, so that one absurd row does not cost gigabytes
CHARACTERS = 200_000  # normalised at once: buffers of some megabytes, whatever the number of rows
PAIRS = 8_192  # compared at once: 8 MB of signatures
# A bucket with more rows than this is not compared pair by pair: its rows are sorted, and each meets this many that
# follow; as long as it has no near copy yet, LONE.
NEIGHBOURS, LONE = 16, 128
# Two rows of one cluster that know this many near copies each are not compared again.
ENOUGH = 8
FOUND, SURELY, MARGIN = (
    0.95,
    0.999,
    0.05,
)  # least chance to find a pair at the threshold, and one that lies MARGIN above
DROPPED, SPACE = 0, 32


def _odd_numbers(count: int) -> list[int]:
    """Multipliers of hashes modulo 2^64 (splitmix64), the same for ever."""
    numbers = []
    for step in range(1, count + 1):
        value = step * 0x9E3779B97F4A7C15 % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        numbers.append((value ^ value >> 31) | 1)
    return numbers


WEIGHTS = np.array(_odd_numbers(SLOTS), np.uint64)


def signatures(texts: "pd.Series | Sequence[str]") -> np.ndarray:
    """MinHash signatures of the texts' 5-character pieces.

    A text is normalised first: Unicode's NFKC, case folded, each run of white space and punctuation one space (a text
    of nothing else keeps its own), characters that do not show left out. It is read with a space in front, so that its
    first word is like any other; below 5 characters it is one piece.

    Args:
        texts: Any number, none missing. Of each, the first LONGEST characters count.

    Returns:
        uint32 (rows, 128). Two rows agree, on average, in as large a part of the 128 as their pieces overlap. The same
        on every machine and however the rows are cut into calls.
    """
    rows = texts.tolist() if isinstance(texts, pd.Series) else texts
    found = np.empty((len(rows), SLOTS), np.uint32)
    for start, stop in _chunks(rows):
        hashes, starts = _pieces(*_codes(rows[start:stop]))
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts.astype(np.uint64), SLOTS, SEED)
        found[start:stop] = matrix.to_rows()
    return found


def _chunks(rows: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Spans of rows that hold at most CHARACTERS together; a longer row stands alone."""
    ends = np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)))
    start = 0
    while start < len(rows):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + CHARACTERS, side="right")))
        yield start, stop
        start = stop


@cache
def _folding() -> np.ndarray:
    """What each code point counts as, uint32 (0x110000,): SPACE for what parts words, DROPPED for what is invisible."""
    table = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    # All that parts words or is invisible lies in planes 0, 1 and 14.
    for point in [*range(0x20000), *range(0xE0000, 0xF0000)]:
        kind = unicodedata.category(chr(point))
        if kind[0] in "ZP" or kind == "Cc":
            table[point] = SPACE
        elif kind == "Cf":
            table[point] = DROPPED
    table[ord("A") : ord("Z") + 1] += 32  # the case of letters beyond ASCII is folded before
    return table


def _codes(rows: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Normalised texts as code points, uint32 (characters,); where each starts and the last ends, int64 (rows + 1,)."""
    folded = [
        row[:LONGEST] if row.isascii() else unicodedata.normalize("NFKC", row[:LONGEST]).casefold() for row in rows
    ]
    # The line break is the space in front of a row. Half of a surrogate pair passes as itself.
    flat = np.frombuffer(("\n" + "\n".join(folded)).encode("utf-32-le", "surrogatepass"), "<u4")
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, folded), np.int64, len(rows)) + 1, out=starts[1:])
    codes = _folding()[flat]
    shows = codes != DROPPED
    if not shows.all():
        codes, flat, starts = codes[shows], flat[shows], _moved(starts, shows)
    word = codes != SPACE
    kept = word.copy()
    kept[:-1] |= word[1:]  # a space stays where a word follows it, and none follows the last of a row
    empty = ~np.logical_or.reduceat(word, starts[:-1])
    if empty.any():
        own = np.repeat(empty, np.diff(starts))
        codes, kept = np.where(own, flat, codes), kept | own
    return codes[kept], _moved(starts, kept)


def _moved(starts: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Where rows start when only some of their characters are kept; no row may have been empty."""
    return np.concatenate([[0], np.cumsum(np.add.reduceat(kept, starts[:-1], dtype=np.int64))])


def _pieces(codes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of each row's pieces, uint64 (characters,), and `starts` again.

    There is one for each character, though a row has four pieces fewer: some stand there twice, which a set forgives.
    """
    factor = int(WEIGHTS[0])
    powers = [np.uint64(factor**power % 2**64) for power in range(PIECE)]
    wide = np.zeros(len(codes) + PIECE - 1, np.uint64)
    wide[: len(codes)] = codes
    # c0 f^4 + c1 f^3 + c2 f^2 + c3 f + c4, by pairs.
    pairs = wide[:-1] * powers[1] + wide[1:]
    hashes = pairs[: len(codes)] * powers[3] + pairs[2 : len(codes) + 2] * powers[1] + wide[PIECE - 1 :]
    lengths = np.diff(starts)
    first, last = starts[:-1], starts[1:]
    # A short row's one piece, with zeros behind it: no text holds one.
    short = np.flatnonzero(lengths < PIECE)
    places = first[short, None] + np.arange(PIECE)
    letters = np.where(places < last[short, None], wide[places], np.uint64(0))
    hashes[first[short]] = (letters * np.array(powers[::-1])).sum(axis=1, dtype=np.uint64)
    # The last four windows of a row reach into the next one: its first piece stands for them.
    for back in range(1, PIECE):
        rows = lengths >= back
        hashes[last[rows] - back] = hashes[first[rows]]
    hashes ^= hashes >> np.uint64(32)
    hashes *= WEIGHTS[1]
    hashes ^= hashes >> np.uint64(29)
    return hashes, starts


def exact_keys(texts: "pd.Series | Sequence[str]") -> np.ndarray:
    """128 bits of each text, uint64 (rows, 2): equal for equal texts, which are taken as they are.

    Among 10^8 unlike texts some two have one key with a chance of 10^-23.
    """
    rows = texts.tolist() if isinstance(texts, pd.Series) else texts
    digests = [hashlib.blake2b(row.encode("utf-8", "surrogatepass"), digest_size=16).digest() for row in rows]
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2).astype(np.uint64)


def banding(similarity: float) -> tuple[int, int]:
    """(bands, slots of each) that find a pair of that similarity with a chance of FOUND, one MARGIN above with SURELY.

    Rows meet when all slots of some band agree: with b bands of r slots that has a chance of 1 - (1 - s^r)^b. The
    widest bands that suffice are taken, since those bring the fewest rows together in vain.
    """

    def chance(similar: float, slots: int) -> float:
        return 1 - (1 - min(similar, 1.0) ** slots) ** (SLOTS // slots)

    wide_enough = [
        slots
        for slots in range(1, SLOTS + 1)
        if chance(similarity, slots) >= FOUND and chance(similarity + MARGIN, slots) >= SURELY
    ]
    return SLOTS // wide_enough[-1], wide_enough[-1]


def near_pairs(signatures: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of rows whose estimated similarity reaches a threshold.

    All that the bands of `banding` bring together, where a row has few near copies. Where many rows are alike, work and
    pairs stay proportional to the rows: each meets some NEIGHBOURS in every bucket, the most alike first, so that a
    row with near copies is still paired with some of them, and rows that are linked through others stay linked. Of
    rows with equal signatures each is paired with the first, which alone meets others.

    Args:
        signatures: uint32 (rows, 128).
        similarity: From 0.5 to 1.

    Returns:
        (left, right, estimate), int64, int64 and float32 (pairs,): left < right, sorted, each pair once.
    """
    keys = _hashed(signatures, np.arange(len(signatures)), slice(None))
    twins, rows = _equal_rows(signatures, keys)
    known, estimates = [twins], [np.ones(len(twins), np.float32)]
    labels, count = np.arange(len(signatures)), len(signatures)
    partners = np.zeros(count, np.int64)
    codes = np.empty(0, np.int64)  # of the pairs of `rows` found so far, sorted
    bands, slots = banding(similarity)
    for band in range(bands):
        bucket, row = _bucketed(signatures, keys, rows, slice(band * slots, (band + 1) * slots))
        for apart in range(1, LONE + 1):
            here = np.flatnonzero(bucket[apart:] == bucket[:-apart])
            if not len(here):
                break
            left, right = row[here], row[here + apart]
            fewest = np.minimum(partners[left], partners[right])
            settled = (fewest >= ENOUGH) & (labels[left] == labels[right]) | (fewest > 0) & (apart > NEIGHBOURS)
            fresh = np.sort(np.minimum(left, right)[~settled] * count + np.maximum(left, right)[~settled])
            fresh = fresh[~_contains(codes, fresh)]
            estimate = _estimates(signatures, fresh // count, fresh % count)
            near = estimate >= similarity
            if not near.any():
                continue
            known.append(fresh[near])
            estimates.append(estimate[near])
            codes = np.sort(np.concatenate([codes, fresh[near]]))
            ends = np.divmod(fresh[near], count)
            partners += np.bincount(np.concatenate(ends), minlength=count)
            labels = _joined(labels, *ends)
    found, similar = np.concatenate(known), np.concatenate(estimates)
    order = np.argsort(found)
    return found[order] // count, found[order] % count, similar[order]


def partners(
    signatures: np.ndarray, inside: np.ndarray, others: np.ndarray, similarity: float
) -> tuple[np.ndarray, np.ndarray]:
    """For each of some rows its nearest copy among others, as far as the bands of `banding` bring them together.

    Where very many of the others are alike, a row meets those NEIGHBOURS of every bucket that are most like it on
    either side, and LONE as long as it has no near copy.

    Args:
        signatures: uint32 (all rows, 128).
        inside: Numbers of the rows in question.
        others: Numbers of the rows that they are held against; none of them stands in `inside`.
        similarity: From which two rows are near copies, from 0.5 to 1.

    Returns:
        (of, estimate), int64 and float32 (inside,): the other row, of equally similar ones the first, and the estimated
        similarity; -1 and 0 where there is none.
    """
    rows = np.concatenate([inside, others])
    keys = np.zeros(len(signatures), np.uint64)
    keys[rows] = _hashed(signatures, rows, slice(None))
    of, best = np.full(len(signatures), -1), np.zeros(len(signatures), np.float32)
    other_side = np.zeros(len(signatures), bool)
    other_side[others] = True
    bands, slots = banding(similarity)
    for band in range(bands):
        bucket, row = _bucketed(signatures, keys, rows, slice(band * slots, (band + 1) * slots))
        here, there = np.flatnonzero(~other_side[row]), np.flatnonzero(other_side[row])
        # The others before and behind each row, the nearest first.
        behind = np.searchsorted(there, here)
        sides = [(here, behind, 1), (here, behind - 1, -1)]
        for far in range(LONE):
            for side, (mine, at, step) in enumerate(sides):
                inner = (at >= 0) & (at < len(there))
                mine, at = mine[inner], at[inner]
                same = bucket[mine] == bucket[there[at]]
                same &= (far < NEIGHBOURS) | (of[row[mine]] < 0)
                mine, at = mine[same], at[same]
                one, other = row[mine], row[there[at]]
                estimate = _estimates(signatures, one, other)
                nearer = (estimate > best[one]) | ((estimate == best[one]) & (other < of[one]))
                nearer &= estimate >= similarity
                of[one[nearer]], best[one[nearer]] = other[nearer], estimate[nearer]
                sides[side] = mine, at + step, step
    return of[inside], best[inside]


def _hashed(signatures: np.ndarray, rows: np.ndarray, slots: slice) -> np.ndarray:
    """A hash of the same slots of some rows, uint64 (rows,)."""
    found = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), PAIRS):
        part = signatures[rows[start : start + PAIRS], slots]
        found[start : start + PAIRS] = part.astype(np.uint64) @ WEIGHTS[: part.shape[1]]
    return found


def _equal_rows(signatures: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with an equal signature before them, as codes of the pairs of both; and the other rows, ascending."""
    order = np.argsort(keys, kind="stable")
    fresh = np.ones(len(order), bool)
    fresh[1:] = keys[order[1:]] != keys[order[:-1]]
    first = order[np.flatnonzero(fresh)[np.cumsum(fresh) - 1]]
    left, right = first[~fresh], order[~fresh]
    # Unlike signatures with one key stay rows of their own.
    equal = _estimates(signatures, left, right) == 1
    left, right = left[equal], right[equal]
    own = np.ones(len(order), bool)
    own[right] = False
    return left * len(order) + right, np.flatnonzero(own)


def _bucketed(signatures: np.ndarray, keys: np.ndarray, rows: np.ndarray, band: slice) -> tuple[np.ndarray, np.ndarray]:
    """(bucket, row) of the rows that agree with another one in all slots of a band, bucket by bucket.

    The rows of a bucket are sorted by the slots that follow, so that those which are more alike stand nearer; the order
    in which rows were given has no part in it.
    """
    bucket = _hashed(signatures, rows, band)
    order = np.argsort(bucket)
    bucket, rows = bucket[order], rows[order]
    shared = np.zeros(len(rows), bool)
    shared[1:] = bucket[1:] == bucket[:-1]
    shared[:-1] |= shared[1:]
    bucket, rows = bucket[shared], rows[shared]
    further = (np.arange(8) + band.stop) % SLOTS
    order = np.lexsort((keys[rows], *signatures[rows[:, None], further[::-1]].T, bucket))
    return bucket[order], rows[order]


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each value is among the ordered ones."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


def _estimates(signatures: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimated similarity of each pair, float32 (pairs,): the part of the slots in which both agree."""
    found = np.empty(len(left), np.float32)
    for start in range(0, len(left), PAIRS):
        pairs = slice(start, start + PAIRS)
        found[pairs] = np.count_nonzero(signatures[left[pairs]] == signatures[right[pairs]], axis=1) / SLOTS
    return found


def clusters(n: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The smallest row that each of `n` rows is linked to by pairs, directly or through others; int64 (n,)."""
    return _joined(np.arange(n), left, right)


def _joined(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Clusters after pairs were added to those that `labels` tell, each a cluster's smallest row."""
    labels = labels.copy()
    while True:
        one, other = labels[left], labels[right]
        apart = one != other
        if not apart.any():
            return labels
        left, right, one, other = left[apart], right[apart], one[apart], other[apart]
        np.minimum.at(labels, np.maximum(one, other), np.minimum(one, other))
        while True:
            nearer = labels[labels]
            if np.array_equal(nearer, labels):
                break
            labels = nearer
