"""What a source holds, by the first rows of its files: seen before a job is queued.

Standard library alone. Of parquet, arrow, zst and the hub nothing is known before they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from scripts.corpus.files import File, Unit, find
from scripts.corpus.lines import BadRow, open_plain, rows
from scripts.corpus.shapes import CHAT, JUDGED, PAIR, columns_problems, read_row
from scripts.corpus.turns import Unknown, Unusable
from scripts.run.errors import InputError

FILES, ROWS = 50, 200  # that are looked at


class Preview(NamedTuple):
    """Hold the kinds of rows that were seen, whether there may be others, and what is wrong."""

    kinds: frozenset[str]
    whole: bool
    problems: list[str]


def preview(path: Path, columns: Mapping[str, str]) -> Preview:
    """Look at the first rows of a file, or of every file of a folder."""
    problems = columns_problems(columns)
    if problems:
        return Preview(frozenset(), False, problems)
    try:
        files, _ = find(path)
    except InputError as error:
        return Preview(frozenset(), False, error.problems)
    kinds: set[str] = set()
    names: set[str] = set()
    for file in files[:FILES]:
        if _readable(file):
            names |= _look(file, columns, kinds, problems)
    whole = all(map(_readable, files[:FILES])) and len(files) <= FILES
    absent = [name for name in columns.values() if name not in names]
    if absent and names and whole:
        there = ", ".join(sorted(names)[:20])
        problems.insert(0, f"COLUMNS: {', '.join(absent)}: no such column; there are {there}")
    return Preview(frozenset(kinds), whole, problems[:20])


def _readable(file: File) -> bool:
    return file.format not in ("parquet", "arrow") and file.compression != ".zst"


def _look(file: File, columns: Mapping[str, str], kinds: set[str], problems: list[str]) -> set[str]:
    """Add what the first rows of a file are, and what is wrong with them; return their columns."""
    names: set[str] = set()
    try:
        with open_plain(file) as stream:
            for where, raw in islice(rows(Unit(file), stream), ROWS):
                try:
                    if isinstance(raw, BadRow):
                        raise Unknown(raw.why)
                    names |= set(raw) if isinstance(raw, dict) else set()
                    kind = read_row(raw, columns).kind
                    kinds |= {CHAT, PAIR} if kind == JUDGED else {kind}
                except Unknown as problem:
                    problems.append(f"{where}: {problem}")
                except Unusable:
                    pass
    except InputError as error:
        problems += error.problems
    return names
