"""The stage script on every node but node 0: it starts this node's ranks when node 0 calls, and
leaves when node 0 has ended (nodes.py)."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

from scripts.job import faults
from scripts.job.environment import JobEnvironment
from scripts.job.nodes import ENDED, START, Meeting
from scripts.job.parent import Parent
from scripts.job.stage import RankFailed, Stopped
from scripts.run import files
from scripts.run.errors import DONE, SAVED, InputError

POLL_SECONDS = 0.5


def follow(directory: Path, environment: JobEnvironment, meeting: Meeting) -> int:
    """Do what node 0 calls; return the exit code of this node's script. Node 0 has the stage's, so
    it is 0, but where a node is replaced alone: there 0 is never asked to come back, and stands
    for a stage that is done."""

    def leave(*_: object) -> None:
        meeting.leaving = True  # node 0 hears of it, and asks all ranks to save

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, leave)
    served = 0
    while not meeting.replaced:
        order = meeting.order()
        if order and order.state == ENDED:
            return SAVED if environment.pods and order.code != DONE else DONE
        if order and order.state == START and order.attempt > served and not meeting.leaving:
            served = order.attempt
            _serve(Parent(directory, environment, meeting), served)
        # When one script of a job's step has ended, srun --wait ends the others a minute later,
        # and node 0 may still be handing over: there, it is waited for.
        elif meeting.leaving and environment.pods:
            return SAVED
        else:
            time.sleep(POLL_SECONDS)
    return SAVED


def _serve(parent: Parent, attempt: int) -> None:
    """Run this node's ranks of an attempt to their end."""
    parent.attempt = {"attempt": attempt}
    with contextlib.suppress(InputError, OSError):
        found = files.read_json(parent.directory / "attempts" / f"{attempt}.json")
        parent.attempt = found or parent.attempt
    parent.watch()
    try:
        parent.ranks()
    except Stopped:
        pass
    except (RankFailed, InputError) as fault:
        if not parent.meeting.over(attempt):
            _tell_node_0(parent, str(fault))
    finally:
        parent.over.set()


def _tell_node_0(parent: Parent, fault: str) -> None:
    """Leave an error file for node 0, unless one of the ranks has left its own."""
    if not faults.errors(parent.directory, parent.attempt_number):
        node, attempt = parent.environment.node, parent.attempt_number
        said = {"rank": f"on node {node}", "time": time.time(), "error": fault, "problems": []}
        with contextlib.suppress(OSError):
            files.write_json(parent.directory / "logs" / f"error-{attempt}-node{node}.json", said)
    parent.meeting.failed = parent.attempt_number
