"""The data stage's work, from its recipe to sets/: what every later stage reads.

text/*.ds        tokens to pretrain on         heldout_text.jsonl, heldout_text/*.ds
sft/*.jsonl      conversations to finetune on  heldout_sft.jsonl, heldout_choice.jsonl
preference/*.jsonl  pairs to align on          heldout_preference.jsonl
tokenizer/       where no model was given      dropped.jsonl, sample.txt, data.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.corpus import columnar, files, filters, passes, pool, table, tokens, writer
from scripts.corpus.derive import Corpus, split
from scripts.corpus.files import File
from scripts.corpus.holdout import KINDS
from scripts.corpus.lines import BadRow
from scripts.corpus.prepare import Preparation, RunPass
from scripts.corpus.python_docs import PYTHON, python_documentation
from scripts.corpus.recipe import Recipe, Source
from scripts.corpus.shapes import CHAT, FOLDERS, PAIR, TEXT, Row
from scripts.corpus.turns import Unusable
from scripts.run.digests import sha256
from scripts.run.errors import InputError

HELD_OUT = {TEXT: "heldout_text.jsonl", CHAT: "heldout_sft.jsonl", PAIR: "heldout_preference.jsonl"}
CHOICE = "heldout_choice.jsonl"
PARTIAL = "sets.partial"  # in the stage's directory, until the sets are whole


@dataclasses.dataclass
class Target:
    """Say what the sets are for: a model's directory with tokenizer and template, or None where one
    is to be trained; its vocabulary and its context in tokens."""

    model: Path | None
    vocabulary: int
    context: int


def find(recipe: Recipe) -> tuple[list[tuple[list[File], float]], list[str]]:
    """List the files of every source with its weight, and what was passed over.

    Raises InputError.
    """
    found, passed, problems = [], [], []
    for source in recipe.sources:
        path = Path(source.path.removeprefix("hf://datasets/").removeprefix("hf://")).expanduser()
        if files.HUB_ID.fullmatch(source.path) and not path.exists():
            found.append(([File(path, columnar.HUB, "")], source.weight))
            continue
        try:
            there, aside = files.find(path)
            found.append((there, source.weight))
            passed += aside
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return found, passed


class Sets:
    """Make the sets of one data stage in `folder`; `show(phase, detail)` is told how far it is, and
    `run_pass(name, work)` runs a pass over all units: here, unless another is given."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        target: Target,
        show: Callable[[str, str], None],
        run_pass: RunPass | None = None,
    ):
        self.recipe, self.target, self.show = recipe, target, show
        self.run_pass = run_pass or partial(pool.run_pass, show=show)
        if recipe.filters:
            filters.check(recipe.filters)
        self.held_out: dict[str, list[dict[str, Any]]] = {}
        self.corpus_digest = ""  # of what was derived
        self.name = ", ".join(Path(source.path).name for source in recipe.sources)
        sources, self.passed = self.sources(folder)
        self.prepared = Preparation(folder, recipe, sources, self.run_pass)
        if isinstance(recipe.validation, str):
            given, _ = find(dataclasses.replace(recipe, sources=[Source(recipe.validation)]))
            self.prepared.add_validation(given[0][0])
        self.out = folder / "out"

    def sources(self, folder: Path) -> tuple[list[tuple[list[File], float]], list[str]]:
        """Return the files to read; where the recipe derives, the one that is made of them."""
        if not self.recipe.derive:
            return find(self.recipe)
        corpus, passed = self.corpus(folder)
        made = split(corpus).sets
        self.recipe.validation, self.recipe.duplicates = 0.0, "keep"
        self.held_out = {name: rows for name, rows in made.items() if name.startswith("heldout")}
        path = folder.with_name("derived.jsonl")
        kept = [made[name] for name in ("text.jsonl", "sft.jsonl", "preference.jsonl")]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for rows in kept for row in rows)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")  # one that is there keeps its time
        self.corpus_digest = f"sha256:{sha256(path)}"
        return [([File(path, "jsonl", "")], 1.0)], passed

    def corpus(self, folder: Path) -> tuple[Corpus, list[str]]:
        """Read every source into memory: deriving is for a small text."""
        self.show("reads the text", "")
        if [source.path for source in self.recipe.sources] == [PYTHON]:
            corpus = python_documentation()
            self.name = corpus.name
            return corpus, []
        sources, passed = find(self.recipe)
        work = Preparation(folder, self.recipe, sources, self.run_pass).work
        corpus, problems = Corpus(self.name), []
        for number in range(len(work.units)):
            for where, row in passes.read(work, number):
                if isinstance(row, (BadRow, Unusable)):
                    problems.append(f"{where}: {row.why if isinstance(row, BadRow) else row}")
                else:
                    _add(corpus, row)
        if problems:
            raise InputError(problems[:20])
        return corpus, passed

    def make(self) -> dict[str, Any]:
        """Run every pass, and return the manifest (data.json). Raises InputError."""
        prepared = self.prepared
        prepared.begin()
        self.run("look")
        prepared.decide(prepared.pair_judged_answers())
        self.refuse_what_is_dropped(self.decided("decided"))
        prepared.choose_sample(0 if self.target.model else self.recipe.tokenizer_megabytes)
        self.run("collect")
        self.run("compare")
        prepared.find_leaks()
        final = self.decided("final")
        self.refuse_what_is_dropped(final)
        model = self.model()
        longest = min(self.recipe.max_seq_len or self.target.context, self.target.context)
        prepared.work = dataclasses.replace(
            prepared.work, model=model, vocabulary=self.target.vocabulary, longest=longest
        )
        self.write_held_out()
        self.run("write")
        prepared.check_marks()
        return self.manifest(final)

    def run(self, name: str) -> None:
        """Run one pass over all units."""
        self.run_pass(name, self.prepared.work)

    def model(self) -> Path:
        """Return the directory with the tokenizer: the model's, or one that is trained now."""
        if self.target.model:
            return self.target.model
        self.show("trains the tokenizer", "")
        return self.prepared.train_tokenizer(self.target.vocabulary, self.target.context)

    def decided(self, name: str) -> Counter[int]:
        """Count what was decided of the rows."""
        work = self.prepared.work
        found: Counter[int] = Counter()
        for number in range(len(work.units)):
            numbers, counts = np.unique(passes.mask(work, name, number), return_counts=True)
            found.update(dict(zip(numbers.tolist(), counts.tolist())))
        return found

    def refuse_what_is_dropped(self, decided: Counter[int]) -> None:
        """Raise InputError, before hours of work, if more is dropped than the recipe allows."""
        why: Counter[str] = Counter()
        for name in ("look", "sift") if self.recipe.filters else ("look",):
            for report in self.prepared.reports(name):
                why.update(report["dropped"])
        why.update({what: decided[n] for n, what in writer.WHY.items() if decided[n]})
        rows = sum(report["rows"] for report in self.prepared.reports("look"))
        self.refuse(why, rows)

    def refuse(self, why: Counter[str], rows: int) -> None:
        """Raise InputError if the reasons add up to more than the recipe's share of all rows."""
        share = sum(why.values()) / max(rows, 1)
        if rows == 0 or share > self.recipe.max_dropped:
            reasons = [f"dropped {count:,} of {rows:,} rows: {what}" for what, count in why.items()]
            limit = f"{share:.1%} are dropped, max_dropped is {self.recipe.max_dropped:.0%}"
            mend = f'if that is meant: ARGS="max_dropped={min(1.0, share + 0.005):.2f}"'
            raise InputError([*reasons, f"{limit}; {mend}"] if rows else "DATA holds no rows")

    def write_held_out(self) -> None:
        """Write the held-out rows that are short enough. Raises InputError, before hours of work,
        if that is too few of them: they are a sample of all."""
        work, rows = self.prepared.work, {kind: [] for kind in KINDS}
        why: Counter[str] = Counter()
        for number in self.prepared.numbers:
            why.update(writer.write_held_out(work, number, rows))
        long = sum(why.values())
        total = sum(map(len, rows.values())) + long
        share = long / max(total, 1)
        # Of twenty rows two may be long by chance: more than two standard errors above the limit.
        if share - 2 * (share * (1 - share) / max(total, 1)) ** 0.5 > self.recipe.max_dropped:
            self.refuse(why, total)
        for kind, name in HELD_OUT.items():
            self.held_out.setdefault(name, [_without_choices(row) for row in rows[kind]])
        self.held_out.setdefault(CHOICE, _questions(rows[CHAT]))
        for name, content in self.held_out.items():
            with open(self.out / name, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        texts = (row["text"] for row in self.held_out[HELD_OUT[TEXT]])
        documents = writer.chat_of(work.model).encode_documents(list(texts))
        tokens.write(self.out / tokens.HELD_TEXT, documents, work.vocabulary)

    def manifest(self, final: Counter[int]) -> dict[str, Any]:
        """Write what describes the sets beside them; return the manifest. Raises InputError if too
        little is left."""
        work, chat = self.prepared.work, writer.chat_of(self.prepared.work.model)
        counts, why, kept = table.files(work), Counter(), Counter()
        for row in counts:
            why.update(row["dropped"])
            kept.update(row["kept"])
        self.refuse(why, sum(row["rows"] for row in counts))
        if self.recipe.derive:  # what is held out was never among the rows that were read
            derived = sum(len(self.held_out[name]) for name in HELD_OUT.values())
            counts[0]["rows"] += derived
            counts[0]["held"] += derived
        if not kept:
            raise InputError("DATA: no row is left to train on")
        reports = list(self.prepared.reports("write"))
        asked, turns = min(
            (r["sample"] for r in reports if r["sample"]),
            key=lambda said: len(said[0]),
            default=("", []),
        )
        table.dropped_file(work, self.out / "dropped.jsonl")
        if turns:
            text = table.sample(chat, turns) + "\n"
            (self.out / "sample.txt").write_text(text, encoding="utf-8")
        lengths = [np.load(work.file("write", n, ".npz")) for n in self.prepared.numbers]
        spreads = {k: table.spread(np.concatenate([found[k] for found in lengths])) for k in KINDS}
        rows = {FOLDERS[kind]: kept[kind] for kind in KINDS}
        rows.update({name.partition(".")[0]: len(found) for name, found in self.held_out.items()})
        tokenizer = work.model / "tokenizer.json"
        return {
            "source": self.name,
            "corpus": self.corpus_digest,
            "python": sys.version.split()[0],
            "rows": rows,
            "files": counts,
            "passed_over": self.passed,
            "dropped": dict(why),
            "not_understood": [bad for r in self.prepared.reports("look") for bad in r["bad"]][:1],
            "lengths": spreads,
            "max_seq_len": work.longest,
            "tokens": spreads[TEXT].get("tokens", 0),
            "vocabulary": work.vocabulary,
            "tokenizer": f"sha256:{sha256(tokenizer)}",
            "tokenizer_megabytes": self.prepared.sample()["megabytes"],
            "sample": asked,
        }


def _add(corpus: Corpus, row: Row) -> None:
    """Add one row to what is derived from."""
    if row.kind == TEXT:
        corpus.documents.append(row.content["text"])
    elif row.kind == PAIR:
        corpus.preferences.append(row.content)
    else:
        corpus.conversations.append(row.content["messages"])


def _without_choices(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("choices", "answer")}


def _questions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the multiple-choice questions among held-out conversations, each with another's
    question for the control."""
    asked = [(row["messages"][-2]["content"], row) for row in rows if "choices" in row]
    others = [question for question, _ in asked[1:] + asked[:1]]
    return [
        {
            "question": question,
            "shuffled_question": other,
            "choices": row["choices"],
            "answer": row["answer"],
        }
        for (question, row), other in zip(asked, others)
    ]
