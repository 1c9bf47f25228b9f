"""The stage script on every node but node 0: it starts this node's ranks when node 0 calls, and
leaves when node 0 has ended (nodes.py)."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

from scripts.job.nodes import ENDED, Call, called
from scripts.job.parent import Parent
from scripts.job.stage import RankFailed, Stopped
from scripts.run import files
from scripts.run.errors import DONE, InputError

POLL_SECONDS = 0.5


def follow(parent: Parent) -> int:
    """Do what node 0 calls; return the exit code of this node's script, which is always 0: node 0
    has the stage's."""

    def flag(*_: object) -> None:
        parent.stop_requested = True  # node 0 gets the signal, too, and asks the ranks to save

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, flag)
    order = _wait(parent)
    if order.state != ENDED:
        parent.attempt = {"attempt": order.attempt}
        attempt = parent.directory / "attempts" / f"{order.attempt}.json"
        with contextlib.suppress(InputError, OSError):
            parent.attempt = files.read_json(attempt) or parent.attempt
        threading.Thread(target=_leave_with_node_0, args=(parent,), daemon=True).start()
        try:
            parent.ranks()
        except Stopped:
            pass
        except (RankFailed, InputError) as fault:
            _tell_node_0(parent, str(fault))
        # When one script of a job's step has ended, srun --wait ends the others a minute later,
        # and node 0 may still be handing over.
        _wait(parent, ENDED)
    return DONE


def _wait(parent: Parent, state: str = "") -> Call:
    """Wait for node 0's call, or for its call of this state."""
    while True:
        order = called(parent.directory, parent.environment)
        if order and state in ("", order.state):
            return order
        time.sleep(POLL_SECONDS)


def _leave_with_node_0(parent: Parent) -> None:
    _wait(parent, ENDED)
    parent.kill()


def _tell_node_0(parent: Parent, fault: str) -> None:
    """Leave an error file for node 0, unless one of the ranks has left its own."""
    if not parent.errors():
        node, attempt = parent.environment.node, parent.attempt_number
        said = {"rank": f"on node {node}", "time": time.time(), "error": fault, "problems": []}
        with contextlib.suppress(OSError):
            files.write_json(parent.directory / "logs" / f"error-{attempt}-node{node}.json", said)
