"""The corpus: what is read, what is refused, and that nothing held out is ever trained on."""

import json

import pytest

from scripts.corpus.sources import python_documentation, user_files
from scripts.corpus.splits import normalise, sentences, split
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
def documentation():
    return split(python_documentation())


def test_documentation_holds_out_enough_and_leaks_nothing(documentation):
    assert len(documentation.sets["heldout_choice.jsonl"]) >= 500
    assert len(documentation.sets["heldout_preference.jsonl"]) >= 500
    assert sum(len(row["text"]) for row in documentation.sets["text.jsonl"]) > 1_500_000
    assert_nothing_held_out_is_trained_on(documentation)


def test_questions_are_fair(documentation):
    rows = documentation.sets["heldout_choice.jsonl"]
    for row in rows:
        assert len({normalise(c) for c in row["choices"]}) == 4
        assert row["question"] != row["shuffled_question"], f"not shuffled: {row}"
    positions = [sum(row["answer"] == i for row in rows) / len(rows) for i in range(4)]
    assert max(positions) < 0.32, "the place of the right answer must not give it away"


def test_the_same_corpus_gives_the_same_sets(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    first, second = (split(user_files(tmp_path / "book.txt")) for _ in range(2))
    assert first == second
    assert_nothing_held_out_is_trained_on(first)


def test_a_log_without_blank_lines(tmp_path):
    lines = [
        f"2026-01-{d:02} 10:{m:02} worker {m * d} finished step {m} of job {d} in {m + d} seconds"
        for d in range(1, 28)
        for m in range(60)
    ]
    (tmp_path / "app.txt").write_text("\n".join(lines))
    assert_nothing_held_out_is_trained_on(split(user_files(tmp_path / "app.txt")))


def test_conversations_alone_make_every_set(tmp_path):
    rows = [
        {"instruction": f"Add {i} and {j}", "output": f"The sum of {i} and {j} is exactly {i + j}."}
        for i in range(30)
        for j in range(20)
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = split(user_files(tmp_path / "sums.jsonl"))
    empty = [name for name, rows in splits.sets.items() if not rows]
    assert empty == [], f"these sets hold nothing: {empty}"
    assert_nothing_held_out_is_trained_on(splits)


def test_every_form_of_row_is_read(tmp_path):
    rows = [
        {"text": "A document."},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"instruction": "i", "input": "x", "output": "o"},
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = user_files(tmp_path)
    assert corpus.documents == ["A document."]
    assert corpus.conversations[1][0]["content"] == "i\n\nx"
    assert corpus.preferences[0]["rejected"][-1]["content"] == "bad"


GOOD = json.dumps({"text": "fine"})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", (GOOD + "\n") * 16 + '{"text": "cut', ["a.jsonl", "line 17", "not JSON"]),
        ("a.jsonl", GOOD + '\n{"body": "x"}', ["line 2", "body", '"text"']),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "q"}]}', ["line 1", "assistant"]),
        (
            "a.jsonl",
            '{"messages": [{"role": "robot", "content": "q"}, {"role": "user", "content": "q"}]}',
            ["line 1", "role"],
        ),
        ("a.jsonl", '{"prompt": "p", "chosen": "c", "rejected": ""}', ["line 1", "non-empty"]),
        ("a.txt", b"one\ntw\xff\n", ["a.txt", "line 2", "not UTF-8", "0xff", "iconv"]),
        ("a.txt", "  \n", ["a.txt", "empty"]),
        ("a.csv", "x", [".txt or .jsonl"]),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        user_files(file)
    for word in words:
        assert word in str(error.value), f"it does not say {word!r}: {error.value}"


def test_every_bad_line_is_named_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\nnope\n{GOOD}\n[1]\n")
    with pytest.raises(InputError) as error:
        user_files(tmp_path)
    assert ["line 2" in error.value.problems[0], "line 4" in error.value.problems[1]] == [
        True,
        True,
    ]


def test_too_little_text_says_how_much_is_needed(tmp_path):
    (tmp_path / "a.txt").write_text("One sentence is here. Another sentence is there.")
    with pytest.raises(InputError, match="too small"):
        split(user_files(tmp_path / "a.txt"))


def test_a_conversation_longer_than_the_context_is_named(tmp_path):
    from scripts.corpus.tokenizer import tokenize

    (tmp_path / "book.txt").write_text(BOOK)
    sets = split(user_files(tmp_path / "book.txt")).sets
    assert tokenize(sets, {"vocab": 512, "context": 512}, tmp_path / "fits")["vocabulary"] <= 512
    with pytest.raises(
        InputError,
        match=r"longer than the model's context of 16; shorten or remove the one that begins "
        "'What comes",
    ):
        tokenize(sets, {"vocab": 512, "context": 16}, tmp_path / "short")
