"""make generate, but for the engine: prompts, and the file of answers."""

import json

import pytest

from scripts.run.errors import InputError
from scripts.tools.vllm_batch import Answers, messages, read_prompts

ROWS = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}], "id": 7}]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    return path


def test_prompts_are_read_in_both_forms(prompts):
    assert read_prompts(prompts) == ROWS
    assert [messages(row)[0]["content"] for row in ROWS] == ["a", "b"]
    text = prompts.with_suffix(".txt")
    text.write_text("one\n\ntwo {}\n")
    assert read_prompts(text) == [{"prompt": "one"}, {"prompt": "two {}"}]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '"text"',
        "[]",
        '{"prompt": 3}',
        '{"text": "x"}',
        '{"messages": []}',
        '{"messages": "x"}',
        '{"messages": [{"role": "assistant", "content": "done"}]}',
    ],
)
def test_a_line_that_is_no_prompt_is_named(prompts, line):
    prompts.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=r"prompts.jsonl:2: neither a prompt nor messages"):
        read_prompts(prompts)


@pytest.mark.parametrize(("text", "words"), [("\n", "holds no prompt"), (None, "no such file")])
def test_no_prompt_at_all_is_named(prompts, text, words):
    prompts.unlink() if text is None else prompts.write_text(text)
    with pytest.raises(InputError, match=words):
        read_prompts(prompts)


def test_answers_keep_the_order_and_appear_whole(tmp_path):
    out = tmp_path / "deep/answers.jsonl"
    answers = Answers(out, ROWS)
    answers.add(["first\nline"])
    assert not out.exists()
    with open(answers.part, "a") as file:
        file.write('{"prompt"')  # a kill in the middle of a write
    again = Answers(out, ROWS)
    assert again.left == ROWS[1:]
    again.add(["zweitens ü"])
    assert again.hand_over() == f"{out}: 2 answers"
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == [
        "first\nline",
        "zweitens ü",
    ]
    assert Answers(out, ROWS).left == [], "the same command has nothing left to do"


def test_answers_to_other_prompts_are_left_alone(tmp_path):
    out = tmp_path / "answers.jsonl"
    Answers(out, ROWS).add(["x"])
    with pytest.raises(
        InputError, match=r"answers.jsonl.part: has no answers, or those to other prompts"
    ):
        Answers(out, [{"prompt": "other"}])
    for text in ("a note\n", "[1]\n", "1\n"):
        out.write_text(text)
        with pytest.raises(InputError, match=r"answers.jsonl: has no answers"):
            Answers(out, ROWS)
        assert out.read_text() == text
    out.write_text(json.dumps({**ROWS[0], "answer": "x"}) + "\n")
    with pytest.raises(InputError, match="is there, with 1 of 2 answers"):
        Answers(out, ROWS)
