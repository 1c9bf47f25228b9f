"""Rows to prepare, and sets made of them in this process."""

import json
from pathlib import Path

from scripts.corpus.recipe import Recipe, Source
from scripts.corpus.sets import Sets, Target

SYSTEM = {"role": "system", "content": "You answer in one sentence."}


def asked(n: int) -> dict:
    """Return one question, of words that no other has together."""
    return {"role": "user", "content": f"Which {WORDS[n % 11]} stands by plot {n * 7}?"}


def answer(n: int) -> dict:
    """Return one answer."""
    first, second = WORDS[n % 11], WORDS[(n * 5 + n // 11) % 11]
    text = f"The {first} number {n * 7} lifts one {second} of {n * 13} in winter."
    return {"role": "assistant", "content": text}


WORDS = ("cellar", "engine", "jetty", "kiln", "pier", "quarry", "stable", "tunnel", "wharf")
WORDS += ("bridge", "orchard")


def chats(count: int = 240) -> list[dict]:
    """Return so many different conversations."""
    return [{"messages": [asked(n), answer(n)]} for n in range(count)]


def pairs(count: int = 240) -> list[dict]:
    """Return so many different pairs."""
    return [
        {"prompt": [asked(n)], "chosen": [answer(n)], "rejected": [answer(n + count)]}
        for n in range(count)
    ]


def write_rows(path: Path, rows: list, ensure_ascii: bool = True) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=ensure_ascii) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def preparation(folder: Path, source: Path, model: Path | None = None, **settings) -> Sets:
    """Return a preparation of one source, with a recipe of these settings."""
    sources = [Source(str(source), settings.pop("weight", 1.0))]
    recipe = Recipe(sources=sources, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    return Sets(folder / "sets.partial", recipe, Target(model, 512, 256), lambda *_: None)


def prepare(folder: Path, source: Path, **settings) -> tuple[dict, Path]:
    """Make the sets of one source; return their manifest and their folder. Every row of every file
    must be counted once, and every dropped one listed."""
    made = preparation(folder, source, **settings)
    manifest = made.make()
    for row in manifest["files"]:
        parts = sum(row["kept"].values()), row["held"], row["paired"], row["left_out"]
        assert sum(parts) + sum(row["dropped"].values()) == row["rows"], row
    listed = (made.out / "dropped.jsonl").read_text().count("\n")
    assert listed == sum(manifest["dropped"].values())
    return manifest, made.out


def read_set(out: Path, name: str) -> list[dict]:
    """Return the rows of a set, in order."""
    files = sorted((out / name).glob("*.jsonl")) if (out / name).is_dir() else [out / name]
    return [json.loads(line) for file in files for line in open(file, encoding="utf-8")]
