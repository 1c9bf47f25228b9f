"""The user's own data through the whole line: a text, and conversations."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.launching import make

SHORT = {
    "PRETRAIN_ARGS": "--training.steps 150",
    "FINETUNE_ARGS": "max_steps_per_epoch=40",
    "ALIGN_ARGS": "max_steps_per_epoch=20",
}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("folder")]


def test_a_users_own_text_goes_through_the_line(tmp_path):
    """A megabyte of English: the descriptions of the packages installed here."""
    files = sorted(Path(sys.prefix).glob("lib/python3*/site-packages/*/METADATA"))
    prose = [file.read_text(errors="replace").split("\n\n", 1)[-1] for file in files]
    book = tmp_path / "my book.txt"
    book.write_text("\n\n".join(prose)[:1_000_000])
    out = make("pipeline", RUN="book", DATA=str(book), PORT="8019", FORCE="1", **SHORT).stdout
    make("undeploy", RUN="book")
    assert "serving" in out, f"the model is not served:\n{out}"
    assert re.search(r"answered \S", out), f"the served model gave no answer:\n{out}"


def test_a_users_own_conversations_go_through_the_line(tmp_path):

    def row(a: int, b: int) -> str:
        asked = {"role": "user", "content": f"What is {a} times {b}?"}
        answered = {"role": "assistant", "content": f"{a} times {b} is exactly {a * b}."}
        return json.dumps({"messages": [asked, answered]})

    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(row(a, b) for a in range(2, 62) for b in range(2, 52)))
    out = make("pipeline", RUN="chats", DATA=str(chats), PORT="8020", FORCE="1", **SHORT).stdout
    make("undeploy", RUN="chats")
    assert re.search(r"answered \S", out), f"the served model gave no answer:\n{out}"
