"""Every shape of row that people have: what it is taken for, what is dropped, what is refused."""

import json

import pytest

from scripts.corpus.lines import DECODER
from scripts.corpus.shapes import read_row
from scripts.corpus.turns import Unknown, Unusable


def said(turns):
    """Write a conversation as "s:… u:… a:…"; a turn that is not learned in brackets."""
    words = [f"{t['role'][0]}:{t['content']}" for t in turns]
    return " ".join(w if t["weight"] else f"({w})" for w, t in zip(words, turns))


def taken(row, columns=None):
    """Recognise a row as a file would give it; return its kind and what it holds, in short."""
    found = read_row(DECODER.decode(json.dumps(row)), columns)
    content = found.content
    if found.kind == "text":
        return found.kind, content["text"]
    if found.kind == "pair":
        return found.kind, f"{said(content['chosen'])} | {said(content['rejected'])}"
    if found.kind == "judged":
        return found.kind, f"{said(content['messages'])} {content['good']}"
    return found.kind, said(content["messages"])


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def share(role, value):
    return {"from": role, "value": value}


Q, S = turn("user", "q"), turn("system", "s")
A, B = turn("assistant", "a"), turn("assistant", "b")
H, G = share("human", "q"), share("gpt", "a")
SHAPES = [
    ({"text": "t"}, ("text", "t")),
    ({"content": "t", "id": 3}, ("text", "t")),
    ({"text": "t", "messages": None, "chosen": None}, ("text", "t")),
    ({"text": "t", "label": 1}, ("text", "t")),
    ({"messages": [Q, A]}, ("chat", "u:q a:a")),
    ({"messages": [S, Q, A, Q, B]}, ("chat", "s:s u:q a:a u:q a:b")),
    ({"messages": [Q, A], "text": None}, ("chat", "u:q a:a")),
    ({"messages": [Q, A], "prompt": "q", "prompt_id": "x"}, ("chat", "u:q a:a")),
    ({"messages": [A, Q, B]}, ("chat", "a:a u:q a:b")),
    ({"messages": [turn("developer", "s"), Q, A]}, ("chat", "s:s u:q a:a")),
    ({"messages": [turn("user", [{"type": "text", "text": "q"}]), A]}, ("chat", "u:q a:a")),
    ({"messages": [Q, turn("assistant", "no", weight=0), Q, A]}, ("chat", "u:q (a:no) u:q a:a")),
    ({"messages": [Q, turn("assistant", "no", train=False), Q, A]}, ("chat", "u:q (a:no) u:q a:a")),
    ({"messages": json.dumps([Q, A])}, ("chat", "u:q a:a")),
    ({"conversations": [H, G]}, ("chat", "u:q a:a")),
    ({"conversations": [share("system", "s"), H, G]}, ("chat", "s:s u:q a:a")),
    ({"conversations": [H, G], "system": "s"}, ("chat", "s:s u:q a:a")),
    ({"conversation": [Q, A], "source": "x"}, ("chat", "u:q a:a")),
    ({"instruction": "i", "output": "o"}, ("chat", "u:i a:o")),
    ({"instruction": "i", "input": "x", "output": "o"}, ("chat", "u:i\n\nx a:o")),
    ({"instruction": "i", "input": "", "output": "o", "text": "all"}, ("chat", "u:i a:o")),
    (
        {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]},
        ("chat", "s:s u:q a:a u:i a:o"),
    ),
    ({"instruction": "i", "response": "o"}, ("chat", "u:i a:o")),
    ({"instruction": "i", "context": "x", "response": "o"}, ("chat", "u:i\n\nx a:o")),
    ({"prompt": "q", "completion": "a"}, ("chat", "u:q a:a")),
    ({"prompt": [S, Q], "completion": [A]}, ("chat", "s:s u:q a:a")),
    ({"prompt": "q", "response": "a"}, ("chat", "u:q a:a")),
    ({"question": "q", "answer": 42}, ("chat", "u:q a:42")),
    ({"query": "q", "response": "a"}, ("chat", "u:q a:a")),
    ({"input": "q", "output": "a"}, ("chat", "u:q a:a")),
    ({"system_prompt": "s", "question": "q", "response": "a"}, ("chat", "s:s u:q a:a")),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("pair", "u:q a:a | u:q a:b")),
    (
        {"question": "q", "chosen": "a", "rejected": "b", "system": "s"},
        ("pair", "s:s u:q a:a | s:s u:q a:b"),
    ),
    (
        {"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"},
        ("pair", "u:i\n\nx a:a | u:i\n\nx a:b"),
    ),
    ({"prompt": [Q], "chosen": [A], "rejected": [B]}, ("pair", "u:q a:a | u:q a:b")),
    ({"prompt": "q", "chosen": [A], "rejected": [B]}, ("pair", "u:q a:a | u:q a:b")),
    ({"chosen": [S, Q, A], "rejected": [S, Q, B]}, ("pair", "s:s u:q a:a | s:s u:q a:b")),
    (
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 5},
        ("pair", "u:q a:a | u:q a:b"),
    ),
    (
        {"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]},
        ("pair", "u:q a:a u:q a:a | u:q a:a u:q a:b"),
    ),
    (
        {"conversations": [H], "chosen": G, "rejected": share("gpt", "b")},
        ("pair", "u:q a:a | u:q a:b"),
    ),
    ({"messages": [Q], "chosen": A, "rejected": B}, ("pair", "u:q a:a | u:q a:b")),
    (
        {"input": "q", "preferred_output": "a", "non_preferred_output": "b"},
        ("pair", "u:q a:a | u:q a:b"),
    ),
    (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        ("pair", "u:q a:a | u:q a:b"),
    ),
    ({"prompt": "q", "completion": "a", "label": True}, ("judged", "u:q a:a True")),
    ({"messages": [Q, A], "kto_tag": False}, ("judged", "u:q a:a False")),
    ({"messages": [Q, A], "label": "sports"}, ("chat", "u:q a:a")),
    ({"question": "q", "choices": ["x", "y"], "answer": 1}, ("chat", "u:q a:y")),
    ({"question": "q", "choices": ["x", "y"], "answer": "A"}, ("chat", "u:q a:x")),
    (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        ("chat", "u:q a:y"),
    ),
]


@pytest.mark.parametrize(("row", "wanted"), SHAPES)
def test_a_row_is_taken_for_what_it_is(row, wanted):
    assert taken(row) == wanted


def test_columns_of_other_names():
    row = {"frage": "q", "beste": "a", "schlechte": "b"}
    columns = {"prompt": "frage", "chosen": "beste", "rejected": "schlechte"}
    assert taken(row, columns) == ("pair", "u:q a:a | u:q a:b")


def test_columns_that_are_not_used_are_named():
    assert read_row({"text": "t", "score": "1", "id": "7"}).unused == ("score",)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"body": "t"}, "columns body fit no shape; the nearest is"),
        ({"prompt": "q"}, "(prompt, completion); completion is missing"),
        ({"prompt": "q", "zzz": 1}, 'COLUMNS="completion=zzz"'),
        ({"prompt": "q", "choosen": "a", "regected": "b"}, "pairs"),
        ({"ans": "a", "quest": "q"}, 'COLUMNS="question=quest,answer=ans"'),
        ([1], "not an object"),
        ({"messages": "hello"}, "turns must be a list"),
        ({"messages": [{"role": "robot", "content": "q"}]}, "role 'robot'; known: system"),
        ({"messages": [Q, turn("tool", "x"), A]}, "a turn of a tool"),
        ({"messages": [Q, turn("assistant", None, tool_calls=[{}])]}, "a turn of a tool"),
        ({"messages": [turn("user", [{"type": "image_url"}]), A]}, "part of type 'image_url'"),
        ({"messages": [Q, A], "images": ["x.png"]}, "column 'images'"),
        ({"messages": [Q, A], "tools": [{"name": "f"}]}, "column 'tools'"),
        ({"messages": [S, Q, A], "system": "other"}, "which one counts"),
        ({"chosen": "a", "rejected": "b"}, "without a prompt"),
        ({"input_ids": [1, 2]}, "input_ids"),
        ({"question": "q", "choices": ["x", "y"], "answer": 7}, "none of 2 choices"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(row, why):
    with pytest.raises(Unknown) as problem:
        taken(row)
    assert why in str(problem.value)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": None}, "an empty row"),
        ({"text": "  \n"}, "an empty text"),
        ({"instruction": "i", "output": ""}, "an empty answer"),
        ({"messages": [Q]}, "without an answer"),
        ({"messages": [Q, turn("assistant", " ")]}, "an empty answer"),
        ({"messages": [Q, turn("assistant", "a", weight=0)]}, "without an answer"),
        ({"prompt": "q", "chosen": "a", "rejected": " a "}, "equal answers"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "one answer alone"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "an answer on each side"),
    ],
)
def test_what_teaches_nothing_is_dropped_with_a_reason(row, why):
    with pytest.raises(Unusable) as problem:
        taken(row)
    assert why in str(problem.value)
