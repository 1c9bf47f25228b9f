"""Make the sets that every later stage reads: DATA → sets/, with tokenizer and held-out sets.

A cluster runs it: python -m scripts.data runs/<run>/data
"""

import hashlib
import json
import os
import sys

from scripts.corpus.sources import PYTHON, Corpus, read_corpus
from scripts.corpus.splits import split
from scripts.corpus.tokenizer import tokenize
from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.run import files
from scripts.tools.architecture import read_architecture


def main(stage: Parent) -> dict:
    """Read, split, train the tokenizer, write all sets, hand them over by one rename."""
    source = None if stage.facts["DATA"] == PYTHON else stage.path("DATA")
    sizes = read_architecture(stage.directory / "architecture.json")
    stage.phase("reads the text")
    corpus = read_corpus(source)
    stage.phase("splits it into sets")
    sets = split(corpus).sets
    partial = stage.scratch("sets.partial")
    partial.mkdir()
    for name, rows in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (partial / name).write_text(text, encoding="utf-8")
    questions = [row["messages"][-2]["content"] for row in sets["sft.jsonl"]]
    stage.phase("trains the tokenizer")
    manifest = {
        "source": corpus.name,
        "corpus": digest(corpus),
        "python": sys.version.split()[0],
        "rows": {name: len(rows) for name, rows in sets.items()},
        "sample": min(questions, key=len),
        **tokenize(sets, sizes, partial / "tokenizer"),
    }
    stage.phase("hands the sets over")
    files.write_json(partial / "data.json", manifest)
    final = stage.scratch("sets")
    os.replace(partial, final)
    describe = stage.digests.describe
    inputs = {"source": describe(source)} if source else {}
    return {"inputs": inputs, "outputs": {"sets": describe(final)}, "summary": manifest}


def digest(corpus: Corpus) -> str:
    """Compute the digest of everything that a corpus holds, before any split."""
    content = json.dumps(vars(corpus), ensure_ascii=False, sort_keys=True)
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


if __name__ == "__main__":
    run(main)
