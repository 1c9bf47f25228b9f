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

from scripts.job import nodes, versions
from scripts.job.environment import JobEnvironment
from scripts.job.follower import follow
from scripts.job.parent import Parent
from scripts.job.rank import Rank, run_rank
from scripts.job.stage import RankFailed, Stopped
from scripts.run import attempts, files, retry
from scripts.run.errors import DONE, GIVEN_UP, SAVED, WRONG_INPUT, InputError
from scripts.run.layout import finished

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
Work = Callable[[Parent], dict[str, Any]]


def run(main: Work, rank: Optional[Callable[[Rank], object]] = None) -> None:
    """Run `python -m scripts.<stage> runs/<run>/<stage>`. Exits, never returns.

    `main` returns what the stage adds to stage.json: {"inputs", "outputs", "summary"}.
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
    try:
        if finished(directory):
            # A second job of it, or one that was requeued after its end, on any node.
            print(f"{name}: done already")
            return DONE
        parent = Parent(directory, environment)
        if environment.node:
            return follow(parent)
        parent.begin()
    except (InputError, OSError) as problem:
        said = str(problem)
        if isinstance(problem, OSError):
            said = f"cannot write {directory.resolve()}: {problem.strerror}; mend its permissions"
        print(f"{name}: {said}", file=sys.stderr)
        with contextlib.suppress(OSError):
            nodes.call(directory, environment, nodes.ENDED, 0)
        return WRONG_INPUT
    code, error = _attempt(parent, main)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    parent.shown.end()
    # A full disk must not keep the script from its end: without its process it counts as gone.
    with contextlib.suppress(OSError):
        parent.end(code, error)
        if code == 1 and environment.job and parent.leave_word() == retry.DOWN:
            code = GIVEN_UP
    with contextlib.suppress(OSError):
        nodes.call(parent.directory, environment, nodes.ENDED, parent.attempt_number)
    with contextlib.suppress(OSError):
        if error:
            print(f"\n{name}: {error}", file=sys.stderr)
    return code


def _attempt(parent: Parent, main: Work) -> tuple[int, str]:
    """Do the stage's work; return its exit code and what to say of it."""
    try:
        for number in STOPS:
            signal.signal(number, parent.stop)
        _finish(parent, main(parent))
    except InputError as problem:
        return WRONG_INPUT, str(problem)
    except Stopped:
        return SAVED, "stopped; the same command continues"
    except RankFailed as fault:
        return 1, str(fault)
    except Exception:
        return 1, parent.full_disk().strip() or traceback.format_exc()
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
