"""What the demo derives from a text, and that nothing held out is ever trained on."""

import sys

import pytest

from scripts.corpus.derive import Corpus, conversation, normalise, sentences, split
from scripts.corpus.python_docs import python_documentation
from scripts.run.errors import InputError

BOOK = "\n\n".join(
    " ".join(
        f"Sentence {p} {s} tells how traveller {p * s} crossed the river near village {s}."
        for s in range(12)
    )
    for p in range(60)
)


def training_texts(sets):
    """Every text that any stage trains on."""
    for row in sets["text.jsonl"]:
        yield row["text"]
    for row in sets["sft.jsonl"]:
        yield from (turn["content"] for turn in row["messages"])
    for row in sets["preference.jsonl"]:
        yield from (turn["content"] for side in ("chosen", "rejected") for turn in row[side])


def assert_nothing_held_out_is_trained_on(splits):
    trained = "\n".join(f" {normalise(text)} " for text in training_texts(splits.sets))
    leaked = [s for s in splits.held_out_sentences if f" {s} " in trained]
    assert leaked == []
    answers = {
        normalise(row["choices"][row["answer"]]) for row in splits.sets["heldout_choice.jsonl"]
    }
    assert answers <= set(splits.held_out_sentences)
    for row in splits.sets["heldout_text.jsonl"]:
        for sentence in sentences(row["text"]):
            held_out = normalise(sentence)
            leaked = len(held_out.split()) >= 4 and f" {held_out} " in trained
            assert not leaked, f"a held-out sentence is trained on: {held_out}"


@pytest.fixture(scope="module")
def corpus():
    return python_documentation()


@pytest.fixture(scope="module")
def documentation(corpus):
    return split(corpus)


def test_documentation_holds_out_enough_and_leaks_nothing(documentation):
    assert len(documentation.sets["heldout_choice.jsonl"]) >= 500
    assert len(documentation.sets["heldout_preference.jsonl"]) >= 500
    assert sum(len(row["text"]) for row in documentation.sets["text.jsonl"]) > 1_500_000
    assert_nothing_held_out_is_trained_on(documentation)


def test_a_rank_reads_the_same_documentation(corpus, monkeypatch):
    """torch.distributed replaces sys.excepthook in each: make data NODES=2 had another corpus."""
    before = corpus.documents
    assert any(text.startswith("sys.excepthook\n") for text in before)
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    assert python_documentation().documents == before


def test_questions_are_fair(documentation):
    rows = documentation.sets["heldout_choice.jsonl"]
    for row in rows:
        assert len({normalise(c) for c in row["choices"]}) == 4
        assert row["question"] != row["shuffled_question"], f"not shuffled: {row}"
    positions = [sum(row["answer"] == i for row in rows) / len(rows) for i in range(4)]
    assert max(positions) < 0.32, "the place of the right answer must not give it away"


def test_the_same_corpus_gives_the_same_sets():
    first, second = (split(Corpus("book", BOOK.split("\n\n"))) for _ in range(2))
    assert first == second
    assert_nothing_held_out_is_trained_on(first)


def test_a_log_without_blank_lines():
    lines = [
        f"2026-01-{d:02} 10:{m:02} worker {m * d} finished step {m} of job {d} in {m + d} seconds"
        for d in range(1, 28)
        for m in range(60)
    ]
    parts = ["\n".join(lines[at : at + 30]) for at in range(0, len(lines), 30)]
    assert_nothing_held_out_is_trained_on(split(Corpus("log", parts)))


def test_conversations_alone_make_every_set():
    sums = [
        conversation(f"Add {i} and {j}", f"The sum of {i} and {j} is exactly {i + j}.")
        for i in range(30)
        for j in range(20)
    ]
    splits = split(Corpus("sums", conversations=sums))
    empty = [name for name, rows in splits.sets.items() if not rows]
    assert empty == [], f"these sets hold nothing: {empty}"
    assert_nothing_held_out_is_trained_on(splits)


def test_too_little_text_says_how_much_is_needed():
    with pytest.raises(InputError, match="too small"):
        split(Corpus("a", ["One sentence is here. Another sentence is there."]))
