"""Exit codes of every command and job, and the exception that carries a user's mistakes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

DONE = 0
FAULT = 1  # anything else: a scheduler tries again
WRONG_INPUT = 64  # EX_USAGE of sysexits.h: told before work starts; never retried
GIVEN_UP = 70  # EX_SOFTWARE of sysexits.h: a fault like those before it; trying again is no use
SAVED = 75  # EX_TEMPFAIL of sysexits.h: state is saved, run the same command again


class InputError(Exception):
    """Carry what the user must mend before anything can run: every problem at once, each with
    its mend."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def nearest(name: object, known: Iterable[str]) -> str:
    """Say which of the known names is meant by one that is none of them."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(str(name), names, 1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
