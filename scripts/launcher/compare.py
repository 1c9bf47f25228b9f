"""make compare RUN=a,b: the scores of runs side by side, with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scripts.launcher.report import check_exists
from scripts.run import stages
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.run.gate import ERRORS, VERDICT
from scripts.run.layout import Run, finished


def table(runs: Sequence[Run]) -> str:
    """Format one line for each score that all runs have; * marks a difference from the first run's
    of more than ERRORS standard errors. Raises InputError."""
    verdicts = [_verdict(run) for run in runs]
    shared = [name for name in verdicts[0]["scores"] if all(name in v["scores"] for v in verdicts)]
    if not shared:
        raise InputError(f"{', '.join(run.name for run in runs)}: have no score in common")
    rows = [["score", *(run.name for run in runs)]]
    for name in shared:
        rows.append([name, *(_cell(name, verdict, verdicts[0]) for verdict in verdicts)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    if len({verdict["asked"] for verdict in verdicts}) > 1:
        lines.append("their held-out data differ: the scores do not say which is better")
    lines.append(f"* differs from {runs[0].name} by more than {ERRORS} standard errors")
    return "\n".join(lines)


def _verdict(run: Run) -> dict[str, Any]:
    """Return what a run's evaluation found, and what it was asked: the digests of its other inputs
    than the model. Raises InputError."""
    check_exists(run)
    directory = run.stage(stages.maker("verdict").name)
    verdict, record = read_json(directory / VERDICT), finished(directory)
    if verdict is None or record is None:
        mend = f"make {directory.name} RUN={run.name}"
        raise InputError(f"RUN={run.name}: has no scores yet; {mend}")
    inputs = {name: made["digest"] for name, made in record["inputs"].items() if name != "model"}
    return {**verdict, "asked": tuple(inputs.items())}


def _cell(name: str, verdict: dict[str, Any], first: dict[str, Any]) -> str:
    value, error = verdict["scores"][name], verdict["errors"].get(name, 0.0)
    off = abs(value - first["scores"][name])
    both = math.hypot(error, first["errors"].get(name, 0.0))
    mark = "*" if both and off > ERRORS * both else ""
    return f"{value:.3f} ± {error:.3f}{mark}" if error else f"{value:.3f}{mark}"
