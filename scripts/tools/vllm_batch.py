"""Many prompts at once with vLLM's offline engine, some of them at a time: what a kill costs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from scripts.run.errors import InputError
from scripts.tools import patches
from scripts.tools.config_check import refusals
from scripts.tools.vllm import environment, without_pattern

# Tokens of an answer; --override-generation-config '{"max_new_tokens": 64}' in ARGS says otherwise.
LONGEST = 512
AT_A_TIME = 256  # prompts between two writes; vLLM schedules within them


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read prompts: {"prompt": text} or {"messages": […]} a line, or lines of text in a .txt file.

    Raises InputError with the lines that are neither.
    """
    if not path.is_file():
        raise InputError(f"DATA={path}: no such file; give one prompt a line, as .jsonl or .txt")
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".txt":
        return [{"prompt": line} for line in lines if line.strip()]
    rows, found = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages(row)
            rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError):
            found.append(f"{path}:{number}: neither a prompt nor messages: {line[:60]}")
    if found or not rows:
        raise InputError(found[:10] or f"{path}: holds no prompt")
    return rows


def messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row as a conversation. Raises KeyError, TypeError or ValueError for no such row."""
    if "messages" not in row:
        if not isinstance(row["prompt"], str):
            raise TypeError
        return [{"role": "user", "content": row["prompt"]}]
    found = [{"role": m["role"], "content": str(m["content"])} for m in row["messages"]]
    if not found or found[-1]["role"] == "assistant":
        raise ValueError
    return found


class Answers:
    """Keep a file of answers: each row as it was asked, with "answer"; OUT.part until all are."""

    def __init__(self, out: Path, rows: list[dict[str, Any]]):
        """Take up what has been answered. Raises InputError where that is of other prompts."""
        self.out, self.rows = out, rows
        self.part = out.with_name(out.name + ".part")
        source = out if out.exists() else self.part
        whole = source.read_bytes().split(b"\n")[:-1] if source.exists() else []
        try:
            done = [json.loads(line) for line in whole]
            same = [_asked(row) for row in done] == [_asked(row) for row in rows[: len(done)]]
        except (ValueError, AttributeError):  # no answers of ours at all
            same = False
        if not same:
            raise InputError(
                f"{source}: has no answers, or those to other prompts; give another OUT, or move it"
            )
        if source == out and len(done) != len(rows):
            raise InputError(f"{out}: is there, with {len(done)} of {len(rows)} answers; move it")
        self.done = len(done)
        if source == self.part and source.exists():  # a kill may have torn the last line
            os.truncate(self.part, sum(len(line) + 1 for line in whole))

    @property
    def left(self) -> list[dict[str, Any]]:
        """Return the rows without an answer yet."""
        return self.rows[self.done :]

    def add(self, texts: list[str]) -> None:
        """Append answers to the rows that come next; they are on the disk when this returns."""
        lines = [
            json.dumps({**row, "answer": text}, ensure_ascii=False) + "\n"
            for row, text in zip(self.left, texts)
        ]
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with open(self.part, "a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.done += len(texts)
        print(f"  {self.done} of {len(self.rows)} answered", flush=True)

    def hand_over(self) -> str:
        """Make the file appear under its name; return what to say of it."""
        if self.part.exists():
            os.replace(self.part, self.out)
        return f"{self.out}: {len(self.rows)} answers"


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "answer"}


def answer(model: Path, answers: Answers, words: list[str]) -> None:
    """Answer what is left with vLLM, whose arguments `words` are. Raises InputError for those that
    it refuses."""
    os.environ.update(environment())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # a page on what it is, at each start
    from vllm import LLM, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    patches.vllm_engine_by_fork()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    with refusals("vLLM"):
        given = parser.parse_args(["--model", str(without_pattern(model)), *words])
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(given))
    how = llm.get_default_sampling_params()
    if how.max_tokens in (None, 16):  # vLLM's default, where the model says nothing
        how.max_tokens = LONGEST
    while left := answers.left[:AT_A_TIME]:
        found = llm.chat([messages(row) for row in left], how, use_tqdm=False)
        answers.add([one.outputs[0].text for one in found])
