"""Answers that a label judges (KTO's data): pairs where a prompt has a good and a bad one."""

from __future__ import annotations

import json
from collections.abc import Container
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

from scripts.corpus.files import File, Unit
from scripts.corpus.holdout import DROPPED, USED
from scripts.corpus.passes import Work


class _Place(NamedTuple):
    """Say where a judged answer lies: its unit, its byte there, its number among all rows."""

    unit: int
    byte: int
    row: int


def pair(work: Work, held: Container[int]) -> tuple[dict[tuple[float, bool], Unit], dict[int, int]]:
    """Pair the good and the bad answers to each prompt, in order; only places are in memory. Those
    of the units in `held` (VALIDATION) are paired among themselves.

    Returns the pairs, one unit for each (weight of the good answer's source, whether held), and
    what is decided of each bad answer by its row's number.
    """
    by_prompt: dict[tuple[int, bool], tuple[list[_Place], list[_Place]]] = {}
    first = 0
    for number in range(len(work.units)):
        with open(work.file("look", number, ".judged"), "rb") as file:
            byte = 0
            for line in file:
                row = json.loads(line)
                place = _Place(number, byte, first + row["at"])
                key = row["asked"], number in held
                by_prompt.setdefault(key, ([], []))[not row["good"]].append(place)
                byte += len(line)
        first += work.report("look", number)["rows"]
    decided: dict[int, int] = {}
    files: dict[tuple[float, bool], IO[str]] = {}
    with ExitStack() as stack:
        for (_, is_held), (good, bad) in by_prompt.items():
            for left, right in zip(good, bad):
                kind = work.weights[left.unit], is_held
                if kind not in files:
                    path = work.folder / f"made/pairs{len(files) or ''}.jsonl"
                    files[kind] = stack.enter_context(open(path, "w", encoding="utf-8"))
                sides = {"chosen": _turns(work, left), "rejected": _turns(work, right)}
                files[kind].write(json.dumps(sides) + "\n")
            decided.update({place.row: USED for place in bad[: len(good)]})
            decided.update({place.row: DROPPED for place in bad[len(good) :]})
    return {k: Unit(File(Path(file.name), "jsonl", "")) for k, file in files.items()}, decided


def _turns(work: Work, place: _Place) -> Any:
    with open(work.file("look", place.unit, ".judged"), "rb") as file:
        file.seek(place.byte)
        return json.loads(file.readline())["messages"]
