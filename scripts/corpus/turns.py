"""Turns of a conversation, in the forms that people have them.

A turn is {"role", "content", "weight"}; weight 0: read, not learned. Standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Optional

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
TOOL_ROLES = ("tool", "function", "observation", "function_call", "function_response", "ipython")


class Unknown(ValueError):
    """Say why a row cannot be understood: it is refused."""


class Unusable(ValueError):
    """Say why a row that is understood teaches nothing: it is dropped and counted."""


def turns(value: object) -> list[dict[str, Any]]:
    """Read a list of turns (or one), role/content or from/value. Raises Unknown."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", '{"'):
        try:
            value = json.loads(value)  # a csv holds them as text
        except ValueError:
            raise Unknown("turns that are not JSON") from None
    if isinstance(value, dict):
        value = value.get("messages", [value])
    if not isinstance(value, list) or not value:
        raise Unknown(f"turns must be a list, not {type(value).__name__}")
    return [_turn(turn) for turn in value]


def _turn(turn: object) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise Unknown(f"a turn is an object with role and content, not {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise Unknown(f"a turn of a tool (role {role!r}): tool use is not supported")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Unknown(f"role {role!r}; known: {', '.join(ROLES)}")
    if isinstance(content, list):
        parts = [
            part if isinstance(part, dict) else {"type": "text", "text": part} for part in content
        ]
        other = next((p.get("type") for p in parts if p.get("type", "text") != "text"), None)
        if other:
            raise Unknown(f"a turn with a part of type {other!r}: text alone can be trained on")
        content = "".join(str(part.get("text") or "") for part in parts)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise Unknown(f"a turn's content is text, not {type(content).__name__}")
    return say(ROLES[role.lower()], content, _weight(turn))


def _weight(turn: Mapping[str, Any]) -> int:
    """Return 0 for a turn not to be learned, as OpenAI (weight) and axolotl (train) mark it."""
    for name in ("weight", "train", "training"):
        value = turn.get(name)
        if value is not None and truth(value) is False:
            return 0
    return 1


def truth(value: object) -> Optional[bool]:
    """Read a label: true, false, 1, 0, "yes", "no"; None for anything else."""
    word = str(value).strip().lower()
    if word in ("true", "1", "1.0", "yes"):
        return True
    return False if word in ("false", "0", "0.0", "no") else None


def say(role: str, content: str, weight: int = 1) -> dict[str, Any]:
    return {"role": role, "content": content, "weight": weight}


def teachable(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation that has an answer to learn. Raises Unusable."""
    answers = [turn for turn in messages if turn["role"] == "assistant" and turn["weight"]]
    if not answers:
        raise Unusable("a conversation without an answer to learn")
    if any(not turn["content"].strip() for turn in answers):
        raise Unusable("an empty answer")
    return messages


def dialogue(side: str) -> list[dict[str, Any]]:
    r"""Read one side of a pair: an answer, or a dialogue in Anthropic's hh-rlhf form
    ("\n\nHuman: …\n\nAssistant: …")."""
    if not side.startswith("\n\nHuman:"):
        return [say("assistant", side)]
    found = []
    for part in side.split("\n\nHuman:")[1:]:
        asked, *answers = part.split("\n\nAssistant:")
        found.append(say("user", asked.strip()))
        found += [say("assistant", answer.strip()) for answer in answers]
    return found
