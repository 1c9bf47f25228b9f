"""The entry point of every stage script, and the owner of its exit code.

A stage script is one file with two roles. A cluster starts it as a parent, and `main` runs;
torchrun starts it again with RANK in the environment, and `rank` runs. It ends with

    0 done    64 wrong input, never retried    75 saved and left, run it again    1 a fault
    70 a fault in a scheduler's job that makes no progress: not tried again (retry.py)
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from scripts.job import faults, nodes, versions
from scripts.job.environment import JobEnvironment
from scripts.job.follower import follow
from scripts.job.parent import Parent
from scripts.job.rank import Rank, run_rank
from scripts.job.stage import RankFailed, Stopped
from scripts.run import attempts, files, retry
from scripts.run.errors import DONE, FAULT, GIVEN_UP, SAVED, WRONG_INPUT, InputError
from scripts.run.layout import finished

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
Work = Callable[[Parent], Optional[dict[str, Any]]]


def run(main: Work, rank: Optional[Callable[[Rank], object]] = None) -> None:
    """Run `python -m scripts.<stage> runs/<run>/<stage>`. Exits, never returns.

    `main` returns what the stage adds to stage.json: {"inputs", "outputs", "summary"}; None for one
    that has nothing to be done only once.
    """
    if len(sys.argv) != 2 or not Path(sys.argv[1], "stage.env").exists():
        usage = "usage: python -m scripts.<stage> runs/<run>/<stage> (with its stage.env)"
        print(f"{usage}; got {sys.argv[1:]}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    directory = Path(sys.argv[1])
    try:
        environment = JobEnvironment.read()
    except InputError as problem:
        print(f"{directory.resolve().name}: {problem}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    if environment.rank is not None and rank is not None:
        run_rank(directory, environment, rank)
    else:
        sys.exit(run_parent(directory, environment, main))


def run_parent(directory: Path, environment: JobEnvironment, main: Work) -> int:
    """Run a stage script as the parent of its ranks; return its exit code."""
    name = directory.resolve().name
    meeting = nodes.Meeting(directory.resolve(), environment)
    try:
        if finished(directory):
            # A second job of it, or one that was requeued after its end, on any node.
            print(f"{name}: done already")
            return DONE
        meeting.open()
        if environment.node:
            return follow(directory, environment, meeting)
        while True:
            parent = Parent(directory, environment, meeting)
            parent.begin()
            code, stays = _attempt(parent, main)
            if not stays:
                return code
    except (InputError, OSError) as problem:
        said = str(problem)
        if isinstance(problem, OSError):
            said = f"cannot write {directory.resolve()}: {problem.strerror}; mend its permissions"
        print(f"{name}: {said}", file=sys.stderr)
        with contextlib.suppress(OSError):
            meeting.refuse()
        return WRONG_INPUT


def _attempt(parent: Parent, main: Work) -> tuple[int, bool]:
    """Make an attempt; return its exit code, and whether another follows in this script."""
    meeting, stays = parent.meeting, False
    code, error = _work(parent, main)

    def leave(*_: object) -> None:
        meeting.leaving = True

    for number in STOPS:
        signal.signal(number, leave)
    parent.over.set()
    parent.shown.end()
    faults.remove_unasked(parent.directory, parent.attempt_number)
    # A full disk must not keep the script from its end: without its process it counts as gone.
    with contextlib.suppress(OSError):
        parent.end(code, error)
        if code == FAULT and parent.environment.job and parent.leave_word() == retry.DOWN:
            code = GIVEN_UP
    with contextlib.suppress(OSError):
        stays = parent.stays(code)
        # Where this node is replaced alone, the others wait for that.
        waits = stays or (parent.environment.pods and code == SAVED)
        meeting.call(nodes.OVER if waits else nodes.ENDED, parent.attempt_number, code)
    with contextlib.suppress(OSError):
        if error:
            print(f"\n{parent.name}: {error}", file=sys.stderr)
    return code, stays


def _work(parent: Parent, main: Work) -> tuple[int, str]:
    """Do the stage's work; return its exit code and what to say of it."""
    try:
        for number in STOPS:
            signal.signal(number, parent.stop)
        if parent.meeting.leaving:  # asked between two attempts
            raise Stopped
        result = main(parent)
        if result is not None:
            _finish(parent, result)
    except InputError as problem:
        return WRONG_INPUT, str(problem)
    except Stopped:
        return SAVED, "stopped; the same command continues"
    except RankFailed as fault:
        return FAULT, str(fault)
    except Exception:
        return FAULT, faults.full_disk(parent.directory).strip() or traceback.format_exc()
    return DONE, ""


def _finish(parent: Parent, result: dict[str, Any]) -> None:
    """Write stage.json: from here on the stage is done."""
    parent.refuse_a_second_writer()
    history = attempts.history(parent.directory)
    content = {
        "stage": parent.name,
        "run": parent.run.name,
        "status": "done",
        "facts": parent.facts,
        "arguments": parent.arguments,
        "attempts": len(history),
        "started": history[0]["started"],
        "ended": time.time(),
        "seconds": attempts.seconds_since(parent.attempt),
        "versions": versions.versions(),
        "git_commit": versions.git_commit(),
        **result,
    }
    files.write_json(parent.directory / "stage.json", content)
