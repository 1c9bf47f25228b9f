"""What a data stage says at its end: each file, what it was taken for, and where its rows went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.corpus.chat import Chat
from scripts.corpus.holdout import HELD, USED
from scripts.corpus.passes import Work, mask
from scripts.corpus.shapes import NAMES

SHOWN = 20  # files
QUANTILES = {"least": 0.0, "median": 0.5, "95 %": 0.95, "most": 1.0}


def files(work: Work) -> list[dict[str, Any]]:
    """Count the rows of each file: {"file", "rows", "shapes", "unused", "kept", "held", "paired",
    "left_out", "dropped"}, in rows; the five last add up to "rows"."""
    found: dict[Path, dict[str, Any]] = {}
    for number, unit in enumerate(work.units):
        name = Path(work.place(str(unit.file.path)))
        row = found.setdefault(
            name,
            {
                "file": str(name),
                "rows": 0,
                "shapes": Counter(),
                "unused": Counter(),
                "kept": Counter(),
                "held": 0,
                "paired": 0,  # bad answers: they are not learned, but stand in a pair
                "left_out": 0,  # by a weight below 1
                "dropped": Counter(),
            },
        )
        look = work.report("look", number)
        row["rows"] += look["rows"]
        decided = mask(work, "final", number)
        row["held"] += int(np.sum(decided == HELD))
        row["held"] -= sum(work.report("held", number)["dropped"].values())
        row["paired"] += int(np.sum(decided == USED))
        for key in ("shapes", "unused"):
            row[key].update(look[key])
        last = work.report("write", number)
        row["kept"].update(last["kept"])
        row["left_out"] += last["left_out"]
        for kind in work.dropping:
            row["dropped"].update(work.report(kind, number)["dropped"])
    return list(found.values())


def lines(manifest: Mapping[str, Any], folder: str) -> list[str]:
    """Format one line a file, then why rows were dropped, what was passed over, and tokens."""
    counts, found = manifest["files"], []
    for row in counts[:SHOWN]:
        shapes = ", ".join(many(n, NAMES[kind]) for kind, n in sorted(row["shapes"].items()))
        unused = ", ".join(sorted(row["unused"]))
        kept = sum(row["kept"].values())
        found.append(
            f"{Path(row['file']).name}: {row['rows']:,} rows: {shapes or 'nothing to train on'}"
            + (f" (not used: {unused})" if unused else "")
            + f"; kept {kept:,}, held out {row['held']:,}, "
            + f"dropped {sum(row['dropped'].values()):,}"
            + (f", bad answers of pairs {row['paired']:,}" if row["paired"] else "")
            + (f", left out by its weight {row['left_out']:,}" if row["left_out"] else "")
        )
    if len(counts) > SHOWN:
        found.append(f"… and {len(counts) - SHOWN} more files (data.json lists them)")
    why = sorted(manifest["dropped"].items(), key=lambda item: -item[1])
    found += [f"dropped {n:,}: {reason}" for reason, n in why]
    found += [f"the first not understood: {bad}" for bad in manifest["not_understood"]]
    passed = manifest["passed_over"]
    if passed:
        more = f" and {len(passed) - 5} more" if len(passed) > 5 else ""
        found.append(f"passed over: {', '.join(passed[:5])}{more}")
    for kind, spread in manifest["lengths"].items():
        if spread:
            sizes = ", ".join(f"{q} {spread[q]:,}" for q in QUANTILES)
            found.append(f"tokens of {NAMES[kind][1]}: {spread['tokens']:,} in all; {sizes}")
    if manifest["sample"]:
        found.append(f"a sample, what is learned in ⟦ ⟧: {folder}/sample.txt")
    if why:
        found.append(f"each dropped row with its reason: {folder}/dropped.jsonl")
    return found


def many(count: int, names: tuple[str, str]) -> str:
    """Write a number with what it counts."""
    return f"{count:,} {names[0] if count == 1 else names[1]}"


def spread(lengths: np.ndarray) -> dict[str, int]:
    """Return count, sum, least, median, 95 % and most of lengths in tokens."""
    if not len(lengths):
        return {}
    ordered = np.sort(lengths)
    last = len(ordered) - 1
    numbers = {k: int(ordered[round(q * last)]) for k, q in QUANTILES.items()}
    return {"rows": len(ordered), "tokens": int(ordered.sum(dtype=np.uint64)), **numbers}


def sample(chat: Chat, turns: list[dict[str, Any]]) -> str:
    """Show one conversation as the model sees it, what is learned between ⟦ and ⟧."""
    shown = ""
    for piece in chat.pieces(turns):
        learned = piece.answer and piece.turns[0]["weight"]
        shown += f"⟦{piece.text}⟧" if learned else piece.text
    return shown


def dropped_file(work: Work, path: Path) -> None:
    """Gather what every pass has dropped, unit by unit, into one file."""
    with open(path, "wb") as out:
        for number in range(len(work.units)):
            for kind in work.dropping:
                part = work.file("dropped", number, f".{kind}.jsonl")
                if part.exists():
                    out.write(part.read_bytes())
