"""Where things of a run lie: runs/<run>/<stage>/, and how facts name paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from scripts.run.files import read_json

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("data", "pretrain", "finetune", "align", "evaluate", "deploy")
TRAINED = ("pretrain", "finetune", "align")  # the stages that hand on a model, in order


def runs_root() -> Path:
    """The folder of all runs: RUNS, or runs/ in the repository."""
    return Path(os.environ.get("RUNS") or ROOT / "runs")


def stage_dir(run: str, stage: str) -> Path:
    """runs/<run>/<stage>."""
    return runs_root() / run / stage


def check_run_name(run: str) -> list[str]:
    """What is wrong with a run's name. It becomes a job name and a DNS label, so both rules hold (RFC 1123)."""
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", run):
        return []
    return [f"RUN={run!r}: use 1 to 40 of a-z, 0-9 and -, first and last no -; for example RUN=my-run"]


def as_fact(path: Path) -> str:
    """A path as facts and records hold it: below "runs/" where it lies among the runs, else relative to the repository
    where it lies inside. So a run survives a move of either."""
    path, runs = path.resolve(), runs_root().resolve()
    return f"runs/{path.relative_to(runs).as_posix()}" if runs in path.parents else relative(path)


def from_fact(fact: str) -> Path:
    """Inverse of as_fact."""
    return runs_root() / fact[len("runs/") :] if fact.startswith("runs/") else ROOT / fact


def relative(path: Path) -> str:
    """A path as people read it: relative to the repository where it lies inside."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if ROOT in path.parents else str(path)


def record(directory: Path) -> dict | None:
    """stage.json of a finished stage, or None."""
    return read_json(directory / "stage.json")


class Job(NamedTuple):
    """What a scheduler says of a stage's job."""

    cluster: str
    id: str
    word: str  # queued, running; cancelled, failed: its stage never began; "" if the run directory tells the rest
    note: str

    @property
    def active(self) -> bool:
        return self.word in ("queued", "running")
