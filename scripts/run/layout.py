"""Where the parts of a run lie, runs/<run>/<stage>/, and how facts and messages name paths.

submission  stage.env args.json config.* submitted.txt job.json    written by the launcher
result      attempts/ logs/ checkpoints/ metrics/ model/           written by the job
            stage.json, last: it exists only for a finished stage
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.run.files import read_json

ROOT = Path(__file__).resolve().parents[2]  # the repository


@dataclass(frozen=True)
class Run:
    """Name one run: its folder below the folder of all runs."""

    root: Path  # the folder of all runs: RUNS, or runs/ of the repository
    name: str

    @property
    def directory(self) -> Path:
        """Return runs/<run>."""
        return self.root / self.name

    def stage(self, name: str) -> Path:
        """Return runs/<run>/<stage>."""
        return self.directory / name


def run_of(directory: Path) -> Run:
    """Return the run that a stage's directory belongs to."""
    return Run(directory.parent.parent, directory.parent.name)


def check_run_name(name: str) -> list[str]:
    """List what is wrong with a run's name: it becomes a job name and a DNS label (RFC 1123)."""
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name):
        return []
    return [
        f"RUN={name!r}: use 1 to 40 of a-z, 0-9 and -, first and last no -; for example RUN=my-run"
    ]


def finished(directory: Path) -> Any:
    """Return stage.json of a finished stage, None for any other."""
    return read_json(directory / "stage.json")


def as_fact(path: Path, runs: Path) -> str:
    """Write a path as facts and records hold it: "runs/…" for one among the runs, relative for
    one in the repository, so that a run survives a move of either; absolute for any other.

    A folder of the repository that is called runs/ while the runs lie elsewhere stays absolute:
    relative it would be read as one among the runs.
    """
    path, runs = path.resolve(), runs.resolve()
    if runs in path.parents:
        return f"runs/{path.relative_to(runs).as_posix()}"
    fact = relative(path)
    return str(path) if fact.startswith("runs/") else fact


def from_fact(fact: str, runs: Path) -> Path:
    """Return the path that a fact or record names, as as_fact wrote it: "runs/…" is below `runs`,
    any other relative path below the repository. It may not exist."""
    return runs / fact[len("runs/") :] if fact.startswith("runs/") else ROOT / fact


def relative(path: Path) -> str:
    """Write a path as people read it: relative to the repository where it lies inside."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if ROOT in path.parents else str(path)
