"""The last pass over a unit writes what is trained on: tokens of texts, lines of conversations."""

from __future__ import annotations

import functools
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from scripts.corpus import tokens
from scripts.corpus.chat import Chat, Piece
from scripts.corpus.holdout import DROPPED, DUPLICATE, KEEP, KINDS, LEAK, NEAR
from scripts.corpus.passes import Dropped, Work, held_rows, mask, rows_of
from scripts.corpus.shapes import CHAT, FOLDERS, PAIR, TEXT
from scripts.corpus.turns import Unusable
from scripts.run.errors import InputError

ENDINGS = {TEXT: ".ds", CHAT: ".jsonl", PAIR: ".jsonl"}
WHY = {
    DUPLICATE: "a duplicate of another row",
    NEAR: "a near-duplicate of another text (MinHash)",
    LEAK: "holds half or more of a held-out row, or has its prompt",
    DROPPED: "a bad answer (label) without a good one to its prompt",
}
BATCH = 1 << 20  # characters that are encoded at a time
Batch = list[tuple[str, dict[str, Any], int]]  # (where, content, copies)


@functools.lru_cache(maxsize=1)
def chat_of(model: Path) -> Chat:
    """Return the tokenizer and template of a directory, loaded once in each process."""
    return Chat(model)


def write(work: Work, number: int) -> None:
    """Write what is trained on of one unit."""
    if not work.done("write", number):
        _Writer(work, number).run()


class _Writer:
    """Write the training sets of one unit."""

    def __init__(self, work: Work, number: int):
        self.work, self.number, self.chat = work, number, chat_of(work.model)
        self.dropped = Dropped(work, "write", number)
        self.lengths = {kind: array("I") for kind in KINDS}
        self.kept: Counter[str] = Counter()
        self.left_out = 0  # rows that a weight below 1 leaves out
        self.sample: list[Any] = []

    def run(self) -> None:
        """Write every set that the unit has rows for, then the report."""
        folder = self.work.folder / "out"
        paths = {kind: folder / name / f"{self.number:05d}" for kind, name in FOLDERS.items()}
        parts = {kind: path.with_suffix(".part") for kind, path in paths.items()}
        with ExitStack() as stack:
            files = {kind: stack.enter_context(open(part, "wb")) for kind, part in parts.items()}
            for kind, batch in self.batches():
                self.encode(kind, batch, files[kind])
        if self.lengths[TEXT]:
            np.cumsum(self.lengths[TEXT], dtype=np.uint64).tofile(f"{paths[TEXT]}.ds.index")
        for kind, part in parts.items():
            if self.lengths[kind]:
                os.replace(part, paths[kind].with_suffix(ENDINGS[kind]))
            else:
                part.unlink()
        lengths = {kind: np.array(found, np.uint32) for kind, found in self.lengths.items()}
        np.savez(self.work.file("write", self.number, ".npz"), **lengths)
        report = {"kept": self.kept, "left_out": self.left_out, "sample": self.sample}
        self.work.finish("write", self.number, {**report, "dropped": self.dropped.save()})

    def batches(self) -> Iterator[tuple[str, Batch]]:
        """Gather rows of one kind until they hold BATCH characters."""
        work, number = self.work, self.number
        whole = np.load(work.file("look", number, ".npz"))["whole"]
        weight, gathered, size = work.weights[number], {kind: [] for kind in KINDS}, Counter()
        for index, what, where, kind, content in rows_of(work, number, mask(work, "final", number)):
            if what in WHY:
                self.dropped.add(where, WHY[what], content)
            if what != KEEP:
                continue
            # A weight's fraction is the share of rows that stand once more, by their hash.
            copies = int(weight) + (int(whole[index]) / (1 << 64) < weight % 1)
            self.left_out += not copies
            if copies:
                gathered[kind].append((where, content, copies))
                size[kind] += len(content["text"]) if kind == TEXT else 4000
            if size[kind] > BATCH:
                yield kind, gathered[kind]
                gathered[kind], size[kind] = [], 0
        yield from gathered.items()

    def encode(self, kind: str, batch: Batch, file: IO[bytes]) -> None:
        """Write a batch of rows, each as often as it is to stand there."""
        if kind == TEXT:
            texts = [content["text"] for _, content, _ in batch]
            for (_, _, copies), ids in zip(batch, self.chat.encode_documents(texts)):
                file.write(np.asarray(ids, tokens.dtype(self.work.vocabulary)).tobytes() * copies)
                self.lengths[TEXT].extend([len(ids)] * copies)
            self.kept[TEXT] += len(batch)
            return
        for (where, content, copies), (row, length, why) in zip(batch, fit(self.work, kind, batch)):
            if why and self.work.recipe.too_long == "refuse" and why.startswith("longer"):
                raise InputError(
                    f"{where}: {why}; ARGS=too_long=drop leaves such rows out, counted"
                )
            if why:
                self.dropped.add(where, why, content)
                continue
            if not self.lengths[kind] and kind == CHAT:
                self.chat.check(row["messages"])
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line.encode() * copies)
            self.lengths[kind].extend([length] * copies)
            self.kept[kind] += 1
            if kind == CHAT:
                self.notice(row["messages"])

    def notice(self, turns: list[dict[str, Any]]) -> None:
        """Keep the conversation with the shortest question, to show and to ask later."""
        asked = next((t["content"] for t in reversed(turns) if t["role"] == "user"), None)
        if asked and (not self.sample or len(asked) < len(self.sample[0])):
            self.sample = [asked, turns]


def write_held_out(
    work: Work, number: int, rows: dict[str, list[dict[str, Any]]]
) -> dict[str, int]:
    """Add the held-out rows of a unit that are short enough to `rows`, by kind; note the others as
    dropped, and return the count of each reason."""
    dropped = Dropped(work, "held", number)
    batches: dict[str, Batch] = {kind: [] for kind in KINDS}
    for row in held_rows(work.folder, number):
        batches[row.pop("kind")].append((row.pop("where"), row, 1))
    rows[TEXT] += [row for _, row, _ in batches.pop(TEXT)]
    for kind, batch in batches.items():
        for (where, row, _), (fitting, _, why) in zip(batch, fit(work, kind, batch)):
            if why:
                dropped.add(where, f"held out, but {why}", row)
            else:
                rows[kind].append({**row, **fitting})
    counts = dropped.save()
    work.finish("held", number, {"dropped": counts})
    return counts


def fit(work: Work, kind: str, batch: Batch) -> Iterator[tuple[dict[str, Any], int, str]]:
    """Yield (row to write, its tokens, why it is dropped) of each (where, content, copies)."""
    chat, names = chat_of(work.model), ("messages",) if kind == CHAT else ("chosen", "rejected")
    rendered: list[Any] = []
    for _, content, _ in batch:
        try:
            rendered.append([chat.pieces(content[name]) for name in names])
        except Unusable as problem:
            rendered.append(problem)
    texts = [
        piece.text
        for sides in rendered
        if not isinstance(sides, Unusable)
        for pieces in sides
        for piece in pieces
    ]
    counts = iter([len(ids) for ids in chat.encode(texts)])
    for (_, content, _), sides in zip(batch, rendered):
        if isinstance(sides, Unusable):
            yield {}, 0, str(sides)
            continue
        lengths = [[next(counts) for _ in pieces] for pieces in sides]
        longest, row = max(map(sum, lengths)), {name: content[name] for name in names}
        if longest > work.longest and kind == CHAT and work.recipe.too_long == "cut":
            turns, longest = _cut(sides[0], lengths[0], work.longest)
            row = {"messages": turns}
        if longest > work.longest or not longest:
            yield {}, 0, f"longer than {work.longest} tokens: {max(map(sum, lengths))}"
        else:
            yield row, longest, ""


def _cut(pieces: list[Piece], lengths: list[int], longest: int) -> tuple[list[Any], int]:
    """Return the first turns of a conversation that fit, with whole answers, and their tokens."""
    turns: list[Any] = []
    size = fitting = end = 0
    for piece, length in zip(pieces, lengths):
        size += length
        turns += piece.turns
        if piece.answer and size <= longest:
            fitting, end = size, len(turns)
    return turns[:end], fitting
