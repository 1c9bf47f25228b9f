"""Corpus → tokenizer, pretraining text, SFT and preference sets, held-out sets: sets/.

python -m scripts.data runs/<run>/data
"""

import hashlib
import json
import os
import sys

from scripts.corpus.sources import Corpus, python_documentation, user_files
from scripts.corpus.splits import split
from scripts.corpus.tokenizer import tokenize
from scripts.job.stage import Stage, run
from scripts.run import digests, files
from scripts.tools.architecture import read_architecture


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
    files.write_atomic(sets / "data.json", files.dump_json(manifest))
    final = stage.scratch("sets")
    os.replace(sets, final)
    inputs = {} if source == "python" else {"source": digests.describe(stage.path("SOURCE"))}
    return {"inputs": inputs, "outputs": {"sets": digests.describe(final)}, "summary": manifest}


def digest(corpus: Corpus) -> str:
    """Digest of everything a corpus holds, before any split."""
    content = json.dumps(vars(corpus), ensure_ascii=False, sort_keys=True)
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


if __name__ == "__main__":
    run(main)
