"""Where runs are and what they say of themselves: the tests' one way to scripts.run.

RUNS in the environment names the folder of all runs, as for the launcher; nothing else of the tests
reads it.
"""

import os
from pathlib import Path

from scripts.run import attempts, files, layout, processes, stages
from scripts.run.digests import Digests

ROOT = layout.ROOT
STAGES, TRAINED = stages.line(), stages.trained()
BEFORE = {
    "finetune": "pretrain",
    "align": "finetune",
    "evaluate": "align",
}  # whose model a stage starts from
read_json, read_env, write_atomic = files.read_json, files.read_env, files.write_atomic
process_start = processes.process_start


def runs_root() -> Path:
    """Return the folder of all runs."""
    return Path(os.environ.get("RUNS") or ROOT / "runs")


def stage_dir(run: str, stage: str) -> Path:
    """Return the directory of one stage of a run."""
    return runs_root() / run / stage


def finished(directory: Path) -> dict | None:
    """Return the record of a finished stage, or None."""
    return layout.finished(directory)


def history(directory: Path) -> list[dict]:
    """Return every attempt of a stage, oldest first."""
    return attempts.history(directory)


def running(directory: Path) -> dict | None:
    """Return the attempt that is running now, or None."""
    return attempts.running(directory)


def status(directory: Path) -> str:
    """Return one word for a stage: done, running, stopped, refused, failed, lost."""
    return attempts.status(directory)


def digest_tree(path: Path) -> str:
    """Return the digest of a file or directory as it is now."""
    return Digests(layout.Run(runs_root(), "none"), remember=False).of_tree(path)
