"""Whether a scheduler starts a job again: <stage>/retry, one line that begins with the word `again`
or `down` and goes on with why, for slurm/run.sh to read when the stage script has ended, however
it ended. No file means that no attempt began.

The word stands from the beginning of an attempt, as if it would die without progress; a new
highest step rewrites it. So a script that was killed has left the right word, too. Exit codes 0
and 64 need no word: they are never retried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.run.attempts import highest_step, history
from scripts.run.errors import SAVED
from scripts.run.files import write_atomic

AGAIN, DOWN = "again", "down"
# Simulated over 30 days: three faults of any kind end every run on 256 nodes, at a median of 4.6
# days; five without a new highest step end none.
MAX_FAULTS = 5
MAX_ATTEMPTS = 200  # without a new highest step, those that saved and left among them


def counts(attempts: list[dict[str, Any]], highest: int, job: str) -> tuple[int, int]:
    """Count faults, and attempts, of `job` since it made progress last.

    `highest` is the highest step reached up to now. An attempt makes progress if it reached a
    new highest step, or served: what came before it then counts no more. An attempt counts as a
    fault unless it saved and left when it was asked to.
    """
    reached = [a.get("highest_before", 0) for a in attempts[1:]] + [highest]
    faults = tried = 0
    for attempt, after in zip(attempts, reached):
        if attempt.get("job", "") != job:
            continue
        if after > attempt.get("highest_before", 0) or attempt.get("served"):
            faults = tried = 0
        tried += 1
        faults += attempt.get("exit") != SAVED
    return faults, tried


def word(attempts: list[dict[str, Any]], highest: int, job: str) -> str:
    """Return AGAIN or DOWN for the newest of `attempts`, of which those of `job` count."""
    faults, tried = counts(attempts, highest, job)
    return DOWN if faults >= MAX_FAULTS or tried >= MAX_ATTEMPTS else AGAIN


def leave_word(directory: Path, job: str) -> str:
    """Write the word that holds now, and why; return the word. Raises OSError."""
    past, highest = history(directory), highest_step(directory)
    said = word(past, highest, job)
    faults, tried = counts(past, highest, job)
    why = f"{faults} faults in {tried} attempts without a new highest step"
    write_atomic(directory / "retry", f"{said} {why}\n")
    return said
