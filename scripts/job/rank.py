"""One rank of a stage: what it tells its parent, and how the ranks of a stage leave together."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scripts.job.progress import tell
from scripts.job.stage import Stage
from scripts.run import attempts, files
from scripts.run.errors import InputError
from scripts.run.processes import die_with_parent


class Left(Exception):
    """The rank has saved and leaves, because the stage was asked to stop."""


class Rank(Stage):
    """A stage as one of its ranks sees it."""

    _agreement = None

    def report(self, **numbers: float) -> None:
        """Tell the parent: step, total, loss, tokens_per_second. Rank 0 alone speaks. The first report of a step
        says that from here on asked_to_stop is looked at."""
        if os.environ["RANK"] == "0":
            tell(**numbers)

    def checkpoint(self) -> int | None:
        """The step to go on from, None for a fresh start (checkpoints.newest_whole). Says so to whoever expects another."""
        from scripts.tools.checkpoints import newest_whole

        newest = newest_whole(self.directory / "checkpoints", self.say)
        if newest is not None:
            self.say(f"goes on from its checkpoint of step {newest}")
        elif self.attempt_number > 1:
            self.say("nothing had been saved yet: starts at step 0")
        return newest

    def say(self, sentence: str) -> None:
        """Show the user a sentence; it stays in the log, too."""
        print(sentence, flush=True)
        tell(say=sentence)

    def asked_to_stop(self) -> bool:
        """Whether to save and leave now. Call it on every rank between the same two steps: rank 0 looks, a
        broadcast makes all agree; over gloo, so that nobody waits for a GPU."""
        if os.environ["RANK"] == "0":
            self.refuse_a_second_writer()
        asked = os.environ["RANK"] == "0" and self.stop_file.exists()
        if os.environ["WORLD_SIZE"] == "1":
            return asked
        import torch
        import torch.distributed as dist

        self._agreement = self._agreement or dist.new_group(backend="gloo")
        answer = torch.tensor(int(asked))
        dist.broadcast(answer, 0, group=self._agreement)
        return bool(answer)


def run_rank(directory: Path, work: Callable[[Rank], None]) -> None:
    """Do a rank's work; leave its error where the parent looks."""
    die_with_parent()
    rank, number = Rank(directory), os.environ["RANK"]
    attempt = files.read_json(rank.directory / "attempts" / f"{rank.attempt_number}.json")
    if attempt["host"] == socket.gethostname() and not attempts.alive(attempt):
        sys.exit("the stage script died while this rank was started")  # before it could ask for the signal
    try:
        work(rank)
    except Left:
        return
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            return
        content = {
            "rank": number,
            "time": time.time(),
            "error": f"{type(error).__name__}: {error}",
            "problems": error.problems if isinstance(error, InputError) else [],
        }
        path = rank.directory / "logs" / f"error-{rank.attempt_number}-{number}.json"
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            files.write_atomic(path, json.dumps(content))
        raise
