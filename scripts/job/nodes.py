"""A stage on several nodes. Node 0's stage script is the stage: it alone takes the attempt, checks the input, hands over
and has the exit code. The scripts of the other nodes start their ranks when it calls, and end when it has ended.

They meet in one file of the run directory, attempts/<start>.call: the attempt whose ranks are to start, empty
once node 0 has ended. Which node torchrun gives rank 0 to is not known before, and nothing here depends on it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from scripts.run import attempts, files
from scripts.run.errors import DONE, InputError


def rank() -> int:
    """This node's number: torchrun's own variable, or Slurm's, so that srun needs no shell around the script."""
    if int(os.environ.get("PET_NNODES", "1")) == 1:
        return 0
    return int(os.environ.get("PET_NODE_RANK") or os.environ.get("SLURM_NODEID") or 0)


def _call_file(directory: Path) -> Path:
    return directory / "attempts" / f"{attempts.this_start()}.call"


def call(directory: Path, attempt: int | None) -> None:
    """Node 0: start the ranks of this attempt everywhere; None: leave. Nothing to do on one node."""
    if int(os.environ.get("PET_NNODES", "1")) > 1:
        files.write_atomic(_call_file(directory), "" if attempt is None else str(attempt))


def follow(stage) -> None:
    """Any other node: this node's ranks, from node 0's call to node 0's end. Exits, never returns."""
    from scripts.job.stage import RankFailed, Stopped

    def asked(*_: object) -> None:
        stage.stop_requested = True  # node 0 hears it, too, and does what there is to do

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, asked)
    file = _call_file(stage.directory)
    while not file.exists():
        time.sleep(0.5)
    called = file.read_text()
    if called:
        stage.attempt = {"attempt": int(called)}
        threading.Thread(target=_leave_with_node_0, args=(stage, file), daemon=True).start()
        try:
            stage.ranks()
        except Stopped:
            pass
        except (RankFailed, InputError) as fault:
            _note(stage, str(fault))
        while file.read_text():  # an end before node 0's would end the job's step a minute later, hand-over or not
            time.sleep(0.5)
    sys.exit(DONE)


def _leave_with_node_0(stage, file: Path) -> None:
    while file.read_text():
        time.sleep(0.5)
    stage.kill()


def _note(stage, fault: str) -> None:
    """Tell node 0 how this node's ranks ended, unless one of them has said it itself."""
    if not stage.errors():
        content = {"rank": f"on node {rank()}", "time": time.time(), "error": fault, "problems": []}
        path = stage.directory / "logs" / f"error-{stage.attempt_number}-node{rank()}.json"
        files.write_atomic(path, json.dumps(content))
