"""What is done to one unit of the input at a time, by any process that comes along.

Each function reads unit `number` again, writes its results by one rename, and does nothing where
they lie already: memory does not grow with the corpus, and a killed stage goes on from there.
"""

from __future__ import annotations

import functools
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.corpus import columnar, holdout
from scripts.corpus.files import Unit
from scripts.corpus.holdout import HELD, KEEP, KINDS
from scripts.corpus.lines import BadRow
from scripts.corpus.recipe import Recipe
from scripts.corpus.shapes import CHAT, JUDGED, TEXT, Row, read_row
from scripts.corpus.turns import Unknown, Unusable

BAD_ANSWER = len(KINDS)  # a judged answer that is not to be learned
NO_KIND = BAD_ANSWER + 1
SHOWN = 20  # bad rows that are named


@dataclass(frozen=True)
class Work:
    """Say what every pass needs to know; the same in each process."""

    folder: Path  # where the passes write
    units: tuple[Unit, ...]
    weights: tuple[float, ...]  # of each unit's source
    recipe: Recipe
    model: Path  # has the tokenizer and the chat template, from `write` on
    vocabulary: int = 0
    longest: int = 0  # tokens of a conversation

    @property
    def dropping(self) -> tuple[str, ...]:
        """Name the passes that drop rows, in their order."""
        return ("look", *(["sift"] if self.recipe.filters else []), "held", "write")

    def file(self, kind: str, number: int, ending: str) -> Path:
        """Return where a pass keeps what it makes of a unit."""
        return self.folder / kind / f"{number:05d}{ending}"

    def place(self, where: str) -> str:
        """Return a place in a file as the sets name it: a file that the stage made itself without
        its folder, since the same data gives the same bytes in any run."""
        return where.replace(f"{self.folder.parent}/", "", 1)

    def done(self, kind: str, number: int) -> bool:
        """Tell whether a pass has finished a unit."""
        return self.file(kind, number, ".json").exists()

    def report(self, kind: str, number: int) -> dict[str, Any]:
        """Return what a pass reported of a unit."""
        return dict(json.loads(self.file(kind, number, ".json").read_text(encoding="utf-8")))

    def finish(self, kind: str, number: int, report: dict[str, Any]) -> None:
        """Write a pass's report of a unit, last: it marks the unit as finished."""
        path = self.file(kind, number, ".json")
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report), encoding="utf-8")
        os.replace(part, path)


def read(work: Work, number: int) -> Iterator[tuple[str, Row | BadRow | Unusable]]:
    """Read a unit's rows as what they are: (where, row or what is wrong with it)."""
    for where, raw in columnar.rows(work.units[number]):
        if isinstance(raw, BadRow):
            yield where, raw
            continue
        try:
            yield where, read_row(raw, work.recipe.columns)
        except Unknown as problem:
            yield where, BadRow(str(problem))
        except Unusable as problem:
            yield where, problem


class Dropped:
    """Write the rows that are dropped, with the reason, and count them."""

    def __init__(self, work: Work, kind: str, number: int):
        self.path, self.count = work.file("dropped", number, f".{kind}.jsonl"), Counter[str]()
        self.lines: list[str] = []
        self.place = work.place

    def add(self, where: str, reason: str, content: Any = "") -> None:
        """Note one row. Its text stands there in part: a corpus may be half duplicates."""
        self.count[reason.partition(":")[0]] += 1
        begins = json.dumps(content)[:300]  # ASCII: half an emoji cannot be written otherwise
        row = {"where": self.place(where), "reason": reason, "begins": begins}
        self.lines.append(json.dumps(row) + "\n")

    def save(self) -> dict[str, int]:
        """Write the file; return the counts by reason."""
        self.path.write_text("".join(self.lines), encoding="ascii")
        return dict(self.count)


def look(work: Work, number: int) -> None:
    """Recognise every row, and write its kind and hashes."""
    if work.done("look", number):
        return
    dropped, bad = Dropped(work, "look", number), []
    kinds, wholes, askeds = array("B"), array("Q"), array("Q")  # a packed file is one unit
    counts: dict[str, Counter[str]] = {"shapes": Counter(), "unused": Counter()}
    characters = 0
    with open(work.file("look", number, ".judged"), "w", encoding="utf-8") as judged:
        for where, row in read(work, number):
            try:
                kind, whole, asked = _keys(row, work.recipe.seed)
            except ValueError as problem:  # UnicodeEncodeError, too
                why = str(problem)
                if isinstance(problem, UnicodeEncodeError):
                    why = "half a surrogate pair: it cannot be encoded"
                if isinstance(row, BadRow):
                    bad.append(f"{where}: {row.why}")
                dropped.add(where, why, row.content if isinstance(row, Row) else "")
                kind, whole, asked = NO_KIND, 0, 0
            kinds.append(kind)
            wholes.append(whole)
            askeds.append(asked)
            if kind == NO_KIND:
                continue
            counts["shapes"][row.kind] += 1
            counts["unused"].update(row.unused)
            characters += sum(map(len, _said(*_plain(row))))
            if row.kind == JUDGED:
                said = {"at": len(kinds) - 1, "asked": asked, **row.content}
                judged.write(json.dumps(said) + "\n")
    np.savez(
        work.file("look", number, ".npz"),
        kinds=np.array(kinds, np.uint8),
        whole=np.array(wholes, np.uint64),
        asked=np.array(askeds, np.uint64),
    )
    report = {
        "rows": len(kinds),
        "characters": characters,
        "bad": bad[:SHOWN],
        "bad_rows": len(bad),
        "dropped": dropped.save(),
        **counts,
    }
    work.finish("look", number, report)


def _plain(row: Row) -> tuple[str, dict[str, Any]]:
    """Return a row's kind and content, of a judged one the conversation."""
    if row.kind == JUDGED:
        return CHAT, {"messages": row.content["messages"]}
    return row.kind, row.content


def _keys(row: Row | BadRow | Unusable, seed: int) -> tuple[int, int, int]:
    """Return (number of the kind, hash, hash of the prompt) of a row.

    Raises ValueError with the reason for one that cannot be used.
    """
    if isinstance(row, BadRow):
        raise ValueError(f"not understood: {row.why}")
    if isinstance(row, Unusable):
        raise row
    kind, content = _plain(row)
    learned = row.kind != JUDGED or row.content["good"]
    return KINDS.index(kind) if learned else BAD_ANSWER, *holdout.keys(kind, content, seed)


def mask(work: Work, kind: str, number: int) -> np.ndarray:
    """Return what was decided for each row of a unit."""
    return np.load(work.file(kind, number, ".npy"))


def rows_of(
    work: Work, number: int, decided: np.ndarray
) -> Iterator[tuple[int, int, str, str, dict[str, Any]]]:
    """Read a unit's usable rows: (index, what was decided, where, kind, content)."""
    for index, (where, row) in enumerate(read(work, number)):
        if isinstance(row, Row):
            yield (index, int(decided[index]), where, *_plain(row))


def collect(work: Work, number: int) -> None:
    """Write the rows that are held out, and a share of the others for the tokenizer."""
    if work.done("collect", number):
        return
    decided = mask(work, "decided", number)
    whole = np.load(work.file("look", number, ".npz"))["whole"]
    share = json.loads((work.folder / "sample.json").read_text())
    limit = int(share["share"] * (1 << 64))
    path = work.file("collect", number, ".jsonl")
    with (
        open(path, "w", encoding="utf-8") as held,
        open(path.with_suffix(".sample"), "w", encoding="utf-8") as sample,
    ):
        for index, what, where, kind, content in rows_of(work, number, decided):
            if what == HELD:
                row = {"kind": kind, "where": where, **content}
                held.write(json.dumps(row, ensure_ascii=False) + "\n")
            elif what == KEEP and int(whole[index]) < limit and kind in share["kinds"]:
                sample.write(json.dumps(_said(kind, content), ensure_ascii=False) + "\n")
    work.finish("collect", number, {})


def _said(kind: str, content: dict[str, Any]) -> list[str]:
    """Return the texts of a row, without markup."""
    if kind == TEXT:
        return [content["text"]]
    turns = content["messages"] if kind == CHAT else content["chosen"] + content["rejected"][-1:]
    return [turn["content"] for turn in turns]


def held_rows(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """Read the rows of a unit that are held out: kind, where and content."""
    with open(folder / f"collect/{number:05d}.jsonl", encoding="utf-8") as file:
        yield from map(json.loads, file)


@functools.lru_cache(maxsize=1)
def index_of(folder: Path, units: int) -> holdout.Index:
    """Return the index of all held-out rows, made once in each process."""
    rows = (row for number in range(units) for row in held_rows(folder, number))
    return holdout.Index(holdout.item(row["kind"], row) for row in rows)


def compare(work: Work, number: int) -> None:
    """Write which held-out 8-grams stand in which training row."""
    if work.done("compare", number):
        return
    index, found = index_of(work.folder, len(work.units)), []
    for at, what, _, kind, content in rows_of(work, number, mask(work, "decided", number)):
        if what == KEEP:
            grams = index.grams(holdout.words(holdout.text(kind, content)))
            found += [(at, gram) for gram in sorted(grams)]
    np.save(work.file("compare", number, ".npy"), np.array(found, np.uint32).reshape(-1, 2))
    work.finish("compare", number, {})
