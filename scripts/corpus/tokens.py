"""Token shards: a bare little-endian array of token numbers beside the ends of its documents.

<name>.ds        uint16, or uint32 where the vocabulary has 65,536 entries or more
<name>.ds.index  uint64: where each document ends, in tokens

The files are datatrove's (its DocumentTokenizer writes them, too); all shards of a folder, in
order, are one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

MASK = (1 << 64) - 1
HELD_TEXT = "heldout_text"  # the folder of held-out tokens in sets/


def dtype(vocabulary: int) -> type[np.unsignedinteger]:
    """Return the type that holds every token number of a vocabulary."""
    return np.uint16 if vocabulary < 1 << 16 else np.uint32


def write(folder: Path, documents: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Write documents as one shard of a new folder; nothing where there are none."""
    folder.mkdir(exist_ok=True)
    if documents:
        parts = [np.asarray(ids, dtype(vocabulary)) for ids in documents]
        np.concatenate(parts).tofile(folder / "00000.ds")
        ends = np.cumsum([len(part) for part in parts], dtype=np.uint64)
        ends.tofile(folder / "00000.ds.index")


class Tokens:
    """Read sequences of `length` + 1 tokens out of a folder of shards, memory-mapped, in an order
    that a seed and the epoch decide.

    Neighbouring sequences share one token: the last of one is the first of the next, which is its
    label. Nothing is read or kept in memory before it is asked for.
    """

    def __init__(self, folder: Path, length: int, vocabulary: int, seed: int = 0):
        paths = sorted(path for path in folder.glob("*.ds") if path.stat().st_size)
        self.shards = [np.memmap(path, dtype(vocabulary), "r") for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)
        self.length, self.seed = length, seed
        self.total = int(self.ends[-1]) if paths else 0  # tokens
        self.sequences = max(0, (self.total - 1) // length)

    def __getitem__(self, number: int) -> np.ndarray:
        """Return a sequence, int64 of shape (length + 1,), by its number from the first epoch's
        first on."""
        epoch, place = divmod(number, self.sequences)
        return self.in_order(permute(place, self.sequences, self.seed + epoch))

    def in_order(self, number: int) -> np.ndarray:
        """Return a sequence, int64 of shape (length + 1,), by its place in the text; after the last
        comes the first."""
        start = number % self.sequences * self.length
        return self.read(start, start + self.length + 1)

    def read(self, start: int, end: int) -> np.ndarray:
        """Return the tokens from `start` to `end` of the stream, across shards, int64."""
        parts, shard = [], int(np.searchsorted(self.ends, start, side="right"))
        while start < end:
            base = int(self.ends[shard - 1]) if shard else 0
            part = self.shards[shard][start - base : end - base]
            parts.append(part)
            start, shard = start + len(part), shard + 1
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found.astype(np.int64)


def permute(place: int, total: int, seed: int) -> int:
    """Return where a seeded permutation of 0…total-1 sends a place, in constant memory.

    A Feistel network of four rounds over the next power of four permutes; a result beyond `total`
    is permuted again until it is inside (cycle walking; Black and Rogaway, CT-RSA 2002).
    """
    half = max(1, ((total - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for turn in range(4):
            # splitmix64's finisher (Steele, Lea, Flood, OOPSLA 2014)
            mixed = (right + seed * 0x9E3779B97F4A7C15 + turn * 0xD1B54A32D192ED03 + 1) & MASK
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & low)
        place = left << half | right
        if place < total:
            return place
