"""One rank of a stage: what it tells its parent, and how it leaves."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scripts.job import faults
from scripts.job.environment import JobEnvironment
from scripts.job.progress import tell
from scripts.job.stage import Stage
from scripts.run import attempts, files
from scripts.run.errors import InputError
from scripts.run.processes import die_with_parent


class Left(Exception):
    """Say that the rank has saved and leaves, because the stage was asked to stop."""


class Rank(Stage):
    """A stage as one of its ranks sees it."""

    @property
    def number(self) -> int:
        """Return this rank's number, from 0, over all nodes."""
        return int(self.environment.rank or 0)

    @property
    def first(self) -> bool:
        """Tell whether this is rank 0, which alone speaks, looks for stops and loads."""
        return self.number == 0

    def report(self, **numbers: float) -> None:
        """Tell the parent step and total, and if known loss and tokens_per_second.

        From the first report on, a stop is a request to save: the caller then asks
        tools.agreement between its steps.
        """
        if self.first:
            tell(**numbers)

    def phase(self, name: str, detail: str = "") -> None:
        """Tell the parent what begins, for example "loads the model"; it is shown with a clock. The
        same again tells how far it is: `detail`."""
        if self.first:
            tell(phase=name, detail=detail)

    def say(self, sentence: str) -> None:
        """Print a sentence to the user and to the log, from whichever rank calls it."""
        print(sentence, flush=True)
        tell(say=sentence)

    def sees_stop(self) -> bool:
        """Tell whether this rank sees that the stage is asked to save and leave: rank 0 alone
        looks. Raises RankFailed if a later attempt has begun."""
        if not self.first:
            return False
        self.refuse_a_second_writer()
        return self.stop_file.exists()


def run_rank(directory: Path, environment: JobEnvironment, work: Callable[[Rank], object]) -> None:
    """Do a rank's work; leave its error in logs/error-<attempt>-<rank>.json for the parent."""
    die_with_parent()
    rank = Rank(directory, environment)
    number = rank.attempt_number
    attempt = files.read_json(rank.directory / "attempts" / f"{number}.json")
    if attempt["host"] == socket.gethostname() and not attempts.alive(attempt):
        # It died before this process could ask for the signal of its death.
        sys.exit("the stage script died while this rank was started")
    with contextlib.suppress(OSError):  # a full disk is named where it matters
        faults.answer_with_stacks(rank.directory, number, rank.number)
        tell(pid=os.getpid())
    try:
        work(rank)
    except Left:
        return
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            return
        content = {
            "rank": str(rank.number),
            "time": time.time(),
            "error": f"{type(error).__name__}: {error}",
            "problems": error.problems if isinstance(error, InputError) else [],
        }
        path = rank.directory / "logs" / f"error-{number}-{rank.number}.json"
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            files.write_json(path, content)
        raise
