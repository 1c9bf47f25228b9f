"""One stage of one run, as both its parent and its ranks see it: facts, config, paths."""

from __future__ import annotations

import shutil
from pathlib import Path

from scripts.job import nodes
from scripts.job.environment import JobEnvironment
from scripts.run import files, layout
from scripts.run.digests import Digests
from scripts.run.errors import InputError


class RankFailed(Exception):
    """Carry the fault that ended the stage's ranks: the first failing rank's error."""


class Stopped(Exception):
    """Say that the stage was asked to stop, and that its ranks have left."""


class Stage:
    """Hold what was submitted, and name the places in runs/<run>/<stage>."""

    def __init__(self, directory: Path, environment: JobEnvironment):
        self.directory = directory.resolve()
        self.environment = environment
        self.name = self.directory.name
        self.run = layout.run_of(self.directory)
        self.facts = files.read_env(self.directory / "stage.env")
        self.arguments: list[str] = files.read_json(self.directory / "args.json") or []
        self.digests = Digests(self.run)

    def path(self, fact: str) -> Path:
        """Return the path that a fact names. Raises InputError if it is gone since the launch."""
        path = layout.from_fact(self.facts[fact], self.run.root).resolve()
        if not path.exists():
            again = f"make clean RUN={self.run.name} STAGE={self.name}"
            mend = f"put it back, or start the stage anew: {again}"
            raise InputError(f"{fact}={path}: not there; {mend}")
        return path

    @property
    def config(self) -> Path:
        """Return the frozen copy of the upstream config that runs."""
        return next(p for p in sorted(self.directory.glob("config.*")))

    @property
    def attempt_number(self) -> int:
        """Return this attempt's number, from 1."""
        return self.environment.attempt

    @property
    def log(self) -> Path:
        """Return the log of this attempt on this node."""
        node = f".node{self.environment.node}" if self.environment.node else ""
        return self.directory / "logs" / f"attempt-{self.attempt_number}{node}.log"

    @property
    def stop_file(self) -> Path:
        """Return the file that exists while this attempt's ranks are asked to save and leave."""
        return self.directory / "attempts" / f"{self.attempt_number}.stop"

    def scratch(self, name: str) -> Path:
        """Remove what lies under this name in the stage's directory; return its path."""
        path = self.directory / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def refuse_a_second_writer(self) -> None:
        """Raise RankFailed if a later attempt has begun: a scheduler that lost sight of this node
        has started the stage elsewhere, and two would write the same checkpoints."""
        call = nodes.called(self.directory / "attempts")
        if call and call.attempt > self.attempt_number:
            raise RankFailed(f"attempt {call.attempt} has taken this stage over")
