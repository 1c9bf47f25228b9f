"""One row of any common shape, and what it trains: a text, a conversation or a pair of answers.

The shapes are those of TRL, axolotl, LlamaFactory, torchtune, litgpt and torchtitan, by the names
of their columns (docs/data.md lists them). Standard library alone: the launcher looks at the first
rows before a job is queued.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from scripts.corpus.turns import Unknown, Unusable, dialogue, say, teachable, truth, turns
from scripts.run.errors import nearest

TEXT, CHAT, PAIR, JUDGED = "text", "chat", "pair", "judged"
FOLDERS = {TEXT: "text", CHAT: "sft", PAIR: "preference"}  # of sets/, by what they hold
NAMES = {
    TEXT: ("text", "texts"),
    CHAT: ("conversation", "conversations"),
    PAIR: ("pair of answers", "pairs of answers"),
    JUDGED: ("judged answer", "judged answers"),
}

MESSAGES = ("messages", "conversations", "conversation")
INSTRUCTION = ("instruction", "prompt", "question", "query")
ANSWER = ("output", "completion", "response", "answer", "generation")
CHOSEN = ("chosen", "chosen_response", "preferred_output")
REJECTED = ("rejected", "rejected_response", "non_preferred_output")
LABEL = ("label", "kto_tag")
NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio")
# What a row may hold beside its shape without a word about it.
ASIDE = {"id", "idx", "index", "source", "url", "meta", "metadata", "lang", "language"}
KNOWN = {  # for a row of no shape: the nearest one is named
    "text": ("text",),
    "conversations": ("messages",),
    "questions": ("instruction", "input", "output"),
    "questions with answers": ("question", "answer"),
    "completions": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "judged answers": ("prompt", "completion", "label"),
    "multiple choice": ("question", "choices", "answer"),
}


OURS = (  # names that COLUMNS may give to columns
    *("text", "content", "input", "context", "system", "system_prompt", "history"),
    *("choices", "options", "answerKey", "target"),
    *(*MESSAGES, *INSTRUCTION, *ANSWER, *CHOSEN, *REJECTED, *LABEL),
)


class Row(NamedTuple):
    """Hold what one row trains.

    `content` by kind: text {"text"}; chat {"messages"}, and {"choices", "answer"} (the right one's
    number) for a multiple choice; pair {"chosen", "rejected"}, two conversations; judged
    {"messages", "good"}. A turn is {"role", "content", "weight"}; weight 0: read, not learned.
    """

    kind: str
    content: dict[str, Any]
    unused: tuple[str, ...] = ()  # columns that were not looked at


def read_row(row: object, columns: Optional[Mapping[str, str]] = None) -> Row:
    """Recognise one row by its columns; `columns` maps our names to the file's own.

    Raises Unknown or Unusable.
    """
    if not isinstance(row, dict):
        raise Unknown("not an object of columns")
    for ours, theirs in (columns or {}).items():
        if theirs in row:
            row = {ours: row[theirs], **{k: v for k, v in row.items() if k not in (ours, theirs)}}
    left = {k: v for k, v in row.items() if v is not None and v not in ("", [], {})}
    if not left:
        raise Unusable("an empty row")
    if "input_ids" in left:
        raise Unknown("tokens (input_ids): give the text they were made of")
    for name in NOT_TEXT:
        if name in left:
            raise Unknown(f"column {name!r}: text alone can be trained on")
    if left.get("tools"):
        raise Unknown("column 'tools': tool use is not supported")
    return _Reader(row, left).read()


def columns_from(text: str) -> dict[str, str]:
    """Parse COLUMNS, "prompt=question,chosen=best", into our names and the file's."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def columns_problems(columns: Mapping[str, str]) -> list[str]:
    """List the names on our side of COLUMNS that no shape has."""
    found = []
    for ours, theirs in columns.items():
        if ours not in OURS:
            mend = f"turn it round: {theirs}={ours}" if theirs in OURS else nearest(ours, OURS)
            found.append(f"COLUMNS: {ours}={theirs}: {ours} is no name of ours; {mend}")
    return found


class _Reader:
    """Take columns off one row until its shape is read; what is left was not used."""

    def __init__(self, row: Mapping[str, Any], left: dict[str, Any]):
        self.row, self.left = row, left

    def take(self, *names: str) -> Any:
        """Remove and return the first column of these that is there, else None."""
        for name in names:
            if name in self.left:
                return self.left.pop(name)
        return None

    def has(self, *names: str) -> bool:
        """Tell whether a column of one of these names is there."""
        return any(name in self.left for name in names)

    def read(self) -> Row:
        """Return the row by the first shape that fits. Raises Unknown or Unusable."""
        if self.has(*CHOSEN) or self.has(*REJECTED):
            return self.done(PAIR, self.pair())
        if self.has("choices", "options") and self.has("question", "prompt", "query"):
            return self.done(CHAT, self.multiple_choice())
        asked = self.has(*INSTRUCTION, "input")
        blank = asked and any(name in self.row for name in ANSWER)  # an answer column, but empty
        if self.has(*MESSAGES) or (asked and self.has(*ANSWER)) or blank:
            return self.chat()
        text = self.take("text", "content")
        if isinstance(text, str):
            if not text.strip():
                raise Unusable("an empty text")
            return self.done(TEXT, {"text": text})
        raise Unknown(self.nearest())

    def done(self, kind: str, content: dict[str, Any]) -> Row:
        """Make the row; name the columns that were not used."""
        return Row(kind, content, tuple(sorted(set(self.left) - ASIDE)))

    def before(self) -> list[dict[str, Any]]:
        """Read the system prompt and the earlier turns that stand in columns of their own."""
        system, history = self.take("system", "system_prompt"), self.take("history")
        found = [say("system", system)] if isinstance(system, str) and system.strip() else []
        for exchange in history if isinstance(history, list) else []:
            if not isinstance(exchange, list) or len(exchange) != 2:
                raise Unknown("history must be a list of [question, answer]")
            found += [say("user", str(exchange[0])), say("assistant", str(exchange[1]))]
        return found

    def question(self) -> list[dict[str, Any]]:
        """Read what is asked: turns, or a text with an input below it."""
        asked = self.take(*INSTRUCTION)
        if asked is None:
            asked = self.take("input")
        elif isinstance(asked, str):
            more = self.take("input", "context")
            if isinstance(more, str) and more.strip():
                asked = f"{asked}\n\n{more}"
        if asked is None:
            return []
        return [say("user", asked)] if isinstance(asked, str) else turns(asked)

    def chat(self) -> Row:
        """Read a conversation, or one that a label judges."""
        before = self.before()
        if self.has(*MESSAGES):
            said = turns(self.take(*MESSAGES))
            if before and said[0]["role"] == "system":
                if before[0] != said[0]:
                    raise Unknown("a system column beside another system turn: which one counts?")
                before = before[1:]
        else:
            said, answer = self.question(), self.take(*ANSWER)
            if isinstance(answer, (list, dict)):
                said += turns(answer)
            else:
                said.append(say("assistant", "" if answer is None else str(answer)))
        messages = teachable(before + said)
        name = next((n for n in LABEL if n in self.left), "")
        good = truth(self.left.get(name))
        if good is None:
            return self.done(CHAT, {"messages": messages})
        del self.left[name]
        return self.done(JUDGED, {"messages": messages, "good": good})

    def pair(self) -> dict[str, Any]:
        """Read two answers to one prompt."""
        chosen, rejected = self.take(*CHOSEN), self.take(*REJECTED)
        if chosen is None or rejected is None:
            raise Unusable("a pair with one answer alone")
        before, sides = self.before(), []
        for side in (chosen, rejected):
            sides.append(dialogue(side) if isinstance(side, str) else turns(side))
        if any(said[0]["role"] != "assistant" for said in sides):  # whole conversations
            if before and all(said[0]["role"] == "system" for said in sides):
                before = before[1:]
            asked: list[dict[str, Any]] = []
            self.take("prompt")
        elif self.has(*INSTRUCTION, "input"):
            asked = self.question()
        else:
            asked = turns(self.take(*MESSAGES)) if self.has(*MESSAGES) else []
            if not asked:
                raise Unknown("chosen and rejected without a prompt")
        whole = [before + asked + said for said in sides]
        for said in whole:
            if said[-1]["role"] != "assistant" or not said[-1]["content"].strip():
                raise Unusable("a pair without an answer on each side")
        if [(t["role"], t["content"].strip()) for t in whole[0]] == [
            (t["role"], t["content"].strip()) for t in whole[1]
        ]:
            raise Unusable("a pair of equal answers")
        return dict(zip(("chosen", "rejected"), whole))

    def multiple_choice(self) -> dict[str, Any]:
        """Read a question with its choices and the number, letter or text of the right one."""
        asked, choices = self.take("question", "prompt", "query"), self.take("choices", "options")
        if isinstance(choices, dict):
            choices = choices.get("text")
        answer = self.take("answer", "label", "answerKey", "target")
        if not isinstance(choices, list) or len(choices) < 2:
            raise Unknown("choices must be a list of two or more")
        choices, word = [str(choice) for choice in choices], str(answer).strip()
        if word in choices:
            right = choices.index(word)
        elif word.isdecimal():
            right = int(word)
        else:
            right = "ABCDEFGHIJ".find(word.upper()) if len(word) == 1 else -1
        if not 0 <= right < len(choices):
            raise Unknown(f"answer {word!r} is none of {len(choices)} choices")
        messages = teachable(
            [*self.before(), say("user", str(asked)), say("assistant", choices[right])]
        )
        return {"messages": messages, "choices": choices, "answer": right}

    def nearest(self) -> str:
        """Name the row's columns and the shape that is nearest to them."""
        columns = sorted(map(str, self.row))

        def likeness(name: str, column: str) -> float:
            return difflib.SequenceMatcher(None, name, column.lower()).ratio()

        def fit(names: tuple[str, ...]) -> float:
            return sum(max(likeness(name, c) for c in columns) for name in names) / len(names)

        best = max(KNOWN, key=lambda kind: fit(KNOWN[kind]))
        free, named = list(columns), []
        wanted = sorted(KNOWN[best], key=lambda ours: ours not in columns)  # those first
        for ours in wanted[: len(columns)]:
            theirs = max(free, key=lambda column: likeness(ours, column))
            free.remove(theirs)
            named += [f"{ours}={theirs}"] if ours != theirs else []
        mend = f'name yours: COLUMNS="{",".join(named)}"'
        if not named:
            mend = f"{' and '.join(wanted[len(columns) :])} is missing"
        shown = ", ".join(columns[:12]) + (", …" if len(columns) > 12 else "")
        near = f"{best} ({', '.join(KNOWN[best])})"
        return f"columns {shown} fit no shape; the nearest is {near}; {mend}"
