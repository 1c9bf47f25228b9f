"""From sources to sets: the passes one after the other, over all units, on all cores.

sets.partial/ holds what is finished; the stage that was killed goes on from there. Whatever needs
all rows at once (duplicates, what is held out, which 8-grams are common) is decided between two
passes, from the hashes alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scripts.corpus import columnar, filters, holdout, passes, writer
from scripts.corpus.files import File
from scripts.corpus.holdout import DUPLICATE, GONE, HELD, KEEP, KINDS, LEAK
from scripts.corpus.judged import pair
from scripts.corpus.passes import BAD_ANSWER, Work
from scripts.corpus.pool import PASSES
from scripts.corpus.recipe import Recipe
from scripts.corpus.shapes import CHAT, FOLDERS, PAIR, TEXT
from scripts.corpus.tokenizer import train_tokenizer
from scripts.run.errors import InputError

UNIT = 16 << 20, 256 << 20  # bytes of a unit, at least and at most
UNITS = 1024  # about so many there are, between these
RunPass = Callable[[str, Work], None]


class Preparation:
    """Prepare the sets of one data stage in `folder`. `run_pass(name, work)` runs a pass over all
    units, here or on several nodes."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        sources: list[tuple[list[File], float]],
        run_pass: RunPass,
    ):
        self.folder, self.recipe, self.run_pass = folder, recipe, run_pass
        self.files = [file for found, _ in sources for file in found]
        self.validation: set[Path] = set()
        sizes = [f.path.stat().st_size for f in self.files if f.format != columnar.HUB]
        self.bytes = sum(sizes)
        size = max(UNIT[0], min(UNIT[1], self.bytes // UNITS))
        units, weights = [], []
        for found, weight in sources:
            for file in found:
                parts = columnar.units(file, size)
                units += parts
                weights += [weight] * len(parts)
        self.work = Work(folder, tuple(units), tuple(weights), recipe, folder)

    def add_validation(self, found: list[File]) -> None:
        """Add the files whose rows are all held out. Raises InputError for those that are read to
        train on: their rows would be counted twice, and none of them trained on."""
        read = {file.path.resolve() for file in self.files}
        both = [str(file.path) for file in found if file.path.resolve() in read]
        if both:
            raise InputError(f"VALIDATION: {', '.join(both[:5])}: is in DATA, too; give other rows")
        units = [unit for file in found for unit in columnar.units(file, UNIT[1])]
        self.files += found
        self.validation |= {file.path for file in found}
        self.work = dataclasses.replace(
            self.work,
            units=(*self.work.units, *units),
            weights=(*self.work.weights, *(1.0 for _ in units)),
        )

    def begin(self) -> None:
        """Make the folders. What an attempt of other files or settings left is removed; files that
        have changed since are named. Raises InputError."""
        settings = {"recipe": dataclasses.asdict(self.recipe), "files": list(map(str, self.files))}
        now = {"settings": settings, "marks": self.marks()}
        passes.index_of.cache_clear()  # of another preparation in this process
        writer.chat_of.cache_clear()
        path = self.folder / "input.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            same = before["settings"] == json.loads(json.dumps(settings))
            if same and (self.folder / "out").exists():  # else it was handed over already
                self.check_marks()
                return
        shutil.rmtree(self.folder, ignore_errors=True)
        kinds = (*PASSES, "first", "decided", "final", "held", "dropped", "made")
        for name in (*kinds, *(f"out/{folder}" for folder in FOLDERS.values())):
            (self.folder / name).mkdir(parents=True)
        path.write_text(json.dumps(now), encoding="utf-8")

    def marks(self) -> dict[str, list[int]]:
        """Return size and time of every file, by path."""
        found = {str(f.path): f.path.stat() for f in self.files if f.format != columnar.HUB}
        return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in found.items()}

    def check_marks(self) -> None:
        """Raise InputError naming the files that have changed since they were first looked at."""
        before = json.loads((self.folder / "input.json").read_text(encoding="utf-8"))["marks"]
        now = self.marks()
        changed = [path for path, mark in before.items() if now.get(path) != mark]
        if changed:
            raise InputError(
                f"{path}: has changed while it was read; wait until it is written, then choose "
                "another RUN, or make clean STAGE=data"
                for path in changed[:20]
            )

    def reports(self, name: str) -> Iterator[dict[str, Any]]:
        """Return what a pass reported, unit by unit."""
        return (self.work.report(name, n) for n in range(len(self.work.units)))

    def hashes(self, name: str) -> np.ndarray:
        """Return one of look's arrays over all units."""
        found = [np.load(self.work.file("look", n, ".npz"))[name] for n in self.numbers]
        return np.concatenate(found) if found else np.array([], np.uint64)

    @property
    def numbers(self) -> range:
        """Return the numbers of the units."""
        return range(len(self.work.units))

    def pair_judged_answers(self) -> dict[int, int]:
        """Make a pair of each good and bad answer to one prompt, as units more; return what is
        decided of each bad answer by its row's number."""
        made, decided = pair(self.work, {n for n in self.numbers if self.is_validation(n)})
        self.validation |= {unit.file.path for (_, held), unit in made.items() if held}
        if made:
            units = (*self.work.units, *made.values())
            weights = (*self.work.weights, *(weight for weight, _ in made))
            self.work = dataclasses.replace(self.work, units=units, weights=weights)
            self.run_pass("look", self.work)
        return decided

    def decide(self, bad_answers: dict[int, int]) -> None:
        """Decide of every row whether it is kept, held out, a duplicate or dropped."""
        kinds, whole, asked = (self.hashes(name) for name in ("kinds", "whole", "asked"))
        decided = np.full(len(kinds), GONE, np.uint8)
        usable = kinds < BAD_ANSWER
        decided[usable] = KEEP
        for row, what in bad_answers.items():
            decided[row] = what
        given = np.concatenate(
            [
                np.full(self.work.report("look", n)["rows"], self.is_validation(n))
                for n in self.numbers
            ]
        )
        if self.recipe.duplicates == "drop":
            usable_first = holdout.first_of_each(whole, usable & ~given)
            decided[usable & ~given & ~usable_first] = DUPLICATE
        if self.recipe.filters:
            decided[given & usable] = HELD  # what is given to be held out is not filtered
            self._spread("first", decided)
            self.run_pass("sift", self.work)
            self.run_pass("match", self.work)
            filters.decide(self.work, kinds, decided)
        alive = (decided == KEEP) & ~given
        share = self.recipe.validation if isinstance(self.recipe.validation, (int, float)) else 0.0
        decided[holdout.choose(kinds, whole, asked, alive, share)] = HELD
        decided[given & usable] = HELD
        seen = np.unique(asked[given & usable])
        decided[alive & np.isin(asked, seen) & (decided == KEEP)] = LEAK
        self._spread("decided", decided)

    def is_validation(self, number: int) -> bool:
        """Tell whether a unit belongs to VALIDATION."""
        return self.work.units[number].file.path in self.validation

    def _spread(self, name: str, decided: np.ndarray) -> None:
        """Write what was decided, unit by unit."""
        start = 0
        for number in self.numbers:
            end = start + self.work.report("look", number)["rows"]
            np.save(self.work.file(name, number, ".npy"), decided[start:end])
            start = end

    def find_leaks(self) -> None:
        """Decide which kept rows hold a held-out one, by the 8-grams that are not common."""
        index = passes.index_of(self.folder, len(self.work.units))
        counts = np.zeros(len(index.places), np.int64)
        for number in self.numbers:
            found = np.load(self.work.file("compare", number, ".npy"))
            counts += np.bincount(found[:, 1], minlength=len(counts))
        for number in self.numbers:
            found = np.load(self.work.file("compare", number, ".npy"))
            rare = found[counts[found[:, 1]] <= holdout.COMMON] if len(found) else found
            decided = passes.mask(self.work, "decided", number)
            for row in np.unique(rare[:, 0]):
                if index.leaks(rare[rare[:, 0] == row][:, 1].tolist()):
                    decided[row] = LEAK
            np.save(self.work.file("final", number, ".npy"), decided)

    def choose_sample(self, megabytes: float) -> None:
        """Decide how large a share of the kept rows the tokenizer is trained on."""
        kept = Counter[str]()
        kinds, characters = self.hashes("kinds"), 0
        decided = np.concatenate([passes.mask(self.work, "decided", n) for n in self.numbers])
        for place, kind in enumerate(KINDS):
            kept[kind] = int(np.sum((kinds == place) & (decided == KEEP)))
        characters = sum(report["characters"] for report in self.reports("look"))
        wanted = [kind for kind in (TEXT, CHAT) if kept[kind]] or [PAIR]
        share = min(1.0, megabytes * 1e6 / max(characters, 1))
        content = {"share": share, "kinds": wanted, "megabytes": share * characters / 1e6}
        (self.folder / "sample.json").write_text(json.dumps(content), encoding="utf-8")

    def sample(self) -> dict[str, Any]:
        """Return how much text the tokenizer was trained on, and of which kinds."""
        return dict(json.loads((self.folder / "sample.json").read_text(encoding="utf-8")))

    def train_tokenizer(self, vocabulary: int, context: int) -> Path:
        """Train the tokenizer on the sample, once; return its directory."""
        final, part = self.folder / "out" / "tokenizer", self.folder / "tokenizer.part"
        if not final.exists():
            shutil.rmtree(part, ignore_errors=True)
            train_tokenizer(self._sample_texts(), vocabulary, context, part)
            os.replace(part, final)
        return final

    def _sample_texts(self) -> Iterator[str]:
        for number in self.numbers:
            path = self.work.file("collect", number, ".sample")
            with open(path, encoding="utf-8") as file:
                for line in file:
                    yield from json.loads(line)
