"""Corpus → tokenizer, pretraining text, SFT and preference sets, held-out sets: sets/.

python -m scripts.data runs/<run>/data
"""

import hashlib
import json
import os
import sys

from scripts import rundir
from scripts.architecture import read_architecture
from scripts.corpus import Corpus, python_documentation, user_files
from scripts.splits import split
from scripts.stage import Stage, run
from scripts.tokenizer import tokenize


def main(stage: Stage) -> dict:
    """Read, split, train the tokenizer, write all sets, hand them over by one rename."""
    source = stage.facts["SOURCE"]
    corpus = python_documentation() if source == "python" else user_files(stage.path("SOURCE"))
    splits = split(corpus)
    sets = stage.scratch("sets.partial")
    sets.mkdir()
    for name, rows in splits.sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (sets / name).write_text(text, encoding="utf-8")
    counts = {name: len(rows) for name, rows in splits.sets.items()}
    questions = [row["messages"][-2]["content"] for row in splits.sets["sft.jsonl"]]
    manifest = {
        "source": corpus.name,
        "corpus": digest(corpus),
        "python": sys.version.split()[0],
        "rows": counts,
        "sample": min(questions, key=len),
        **tokenize(splits.sets, read_architecture(stage.directory / "architecture.json"), sets / "tokenizer"),
    }
    rundir.write_atomic(sets / "data.json", rundir.dump_json(manifest))
    final = stage.scratch("sets")
    os.replace(sets, final)
    inputs = {} if source == "python" else {"source": rundir.describe(stage.path("SOURCE"))}
    return {"inputs": inputs, "outputs": {"sets": rundir.describe(final)}, "summary": manifest}


def digest(corpus: Corpus) -> str:
    """Digest of everything a corpus holds, before any split."""
    content = json.dumps(vars(corpus), ensure_ascii=False, sort_keys=True)
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


if __name__ == "__main__":
    run(main)
