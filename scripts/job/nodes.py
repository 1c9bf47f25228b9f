"""How the nodes of a stage meet: in one file of the run directory, attempts/<start>.call.

Node 0's stage script is the stage. It alone begins the attempt, checks the input, hands over and
has the exit code. It writes the call; the scripts of the other nodes (follower.py) obey it:

absent                                  not yet: wait
{"state": "start", "attempt": n}        start this node's ranks of attempt n
{"state": "ended", "attempt": n}        node 0 has ended: leave (n is 0 if no attempt had begun)

Which node torchrun gives rank 0 is not known before, and nothing depends on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

from scripts.job.environment import JobEnvironment
from scripts.run import files
from scripts.run.errors import InputError

START, ENDED = "start", "ended"


class Call(NamedTuple):
    """Say what the other nodes are to do, and in which attempt."""

    state: str
    attempt: int


def _file(directory: Path, start: str) -> Path:
    return directory / "attempts" / f"{start}.call"


def call(directory: Path, environment: JobEnvironment, state: str, attempt: int) -> None:
    """Call the other nodes, as node 0; nothing to do on a single node. Raises OSError."""
    if environment.nodes > 1:
        file = _file(directory, environment.start)
        files.write_json(file, Call(state, attempt)._asdict())


def called(directory: Path, environment: JobEnvironment) -> Optional[Call]:
    """Return what node 0 has called, None while it has not. A file that is empty or not whole
    counts as absent: a shared filesystem may show one for a moment, and it is no order."""
    try:
        said = files.read_json(_file(directory, environment.start))
    except (InputError, OSError):
        return None
    if not isinstance(said, dict) or said.get("state") not in (START, ENDED):
        return None
    number = said.get("attempt")
    return Call(said["state"], number) if isinstance(number, int) else None
