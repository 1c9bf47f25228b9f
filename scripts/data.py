"""Corpus → tokenizer, pretraining text, SFT and preference sets, held-out sets: sets/.

    python -m scripts.data runs/<run>/data
"""

import json
import os
import sys

from scripts import rundir
from scripts.architecture import read_architecture
from scripts.corpus import python_documentation, user_files
from scripts.errors import InputError
from scripts.splits import Splits, split
from scripts.stage import Stage, run


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
    manifest = {"source": corpus.name, "python": sys.version.split()[0], "rows": counts, **tokenize(stage, splits, sets)}
    rundir.write_atomic(sets / "data.json", rundir.dump_json(manifest))
    final = stage.scratch("sets")
    os.replace(sets, final)
    inputs = {} if source == "python" else {"source": rundir.describe(stage.path("SOURCE"))}
    return {"inputs": inputs, "outputs": {"sets": rundir.describe(final)}, "summary": manifest}


def tokenize(stage: Stage, splits: Splits, sets) -> dict:
    """Train the tokenizer for the model's vocabulary; refuse conversations longer than its context."""
    from scripts.tokenizer import render, train_tokenizer

    sizes = read_architecture(stage.directory / "architecture.json")
    documents = [row["text"] for row in splits.sets["text.jsonl"]]
    turns = [turn["content"] for row in splits.sets["sft.jsonl"] for turn in row["messages"]]
    tokenizer = train_tokenizer(documents + turns, sizes["vocab"], sizes["context"], sets / "tokenizer")
    chats = [row["messages"] for row in splits.sets["sft.jsonl"]]
    chats += [row[side] for row in splits.sets["preference.jsonl"] for side in ("chosen", "rejected")]
    lengths = [len(e.ids) for e in tokenizer.encode_batch([render(chat) for chat in chats], add_special_tokens=False)]
    long = [(length, chat) for length, chat in zip(lengths, chats) if length > sizes["context"]]
    if long:
        raise InputError(
            f"a conversation of {length} tokens is longer than the model's context of {sizes['context']}; shorten or remove "
            f"the one that begins {chat[0]['content'][:60]!r}" for length, chat in long[:20]
        )
    tokens = sum(len(e.ids) + 1 for e in tokenizer.encode_batch(documents))  # + 1: the end of each document
    return {"tokens": tokens, "vocabulary": tokenizer.get_vocab_size()}


if __name__ == "__main__":
    run(main)
