"""Answers that a label judges (KTO's data): pairs where a prompt has a good and a bad one."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Optional

from scripts.corpus.files import File, Unit
from scripts.corpus.holdout import DROPPED, USED
from scripts.corpus.passes import Work


class _Place(NamedTuple):
    """Say where a judged answer lies: its unit, its byte there, its number among all rows."""

    unit: int
    byte: int
    row: int


def pair(work: Work) -> tuple[Optional[Unit], dict[int, int]]:
    """Pair the good and the bad answers to each prompt, in order; only places are in memory.

    Returns the pairs as a unit more, None if there are none, and what is decided of each bad
    answer by its row's number.
    """
    by_prompt: dict[int, tuple[list[_Place], list[_Place]]] = {}
    first = 0
    for number in range(len(work.units)):
        with open(work.file("look", number, ".judged"), "rb") as file:
            byte = 0
            for line in file:
                row = json.loads(line)
                place = _Place(number, byte, first + row["at"])
                by_prompt.setdefault(row["asked"], ([], []))[not row["good"]].append(place)
                byte += len(line)
        first += work.report("look", number)["rows"]
    made, decided = work.folder / "made" / "pairs.jsonl", {}
    with open(made, "w", encoding="utf-8") as out:
        for good, bad in by_prompt.values():
            for left, right in zip(good, bad):
                sides = {"chosen": _turns(work, left), "rejected": _turns(work, right)}
                out.write(json.dumps(sides) + "\n")
            decided.update({place.row: USED for place in bad[: len(good)]})
            decided.update({place.row: DROPPED for place in bad[len(good) :]})
    return (Unit(File(made, "jsonl", "")) if made.stat().st_size else None), decided


def _turns(work: Work, place: _Place) -> Any:
    with open(work.file("look", place.unit, ".judged"), "rb") as file:
        file.seek(place.byte)
        return json.loads(file.readline())["messages"]
