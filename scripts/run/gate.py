"""The gate: whether a model's own evaluation lets it be served.

A *floor* is a bound that a score must keep (at least, or at most). A *verdict* is the scores of
one model, by its digest, held against the floors. deploy serves no model without one that passes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.run.digests import Digests
from scripts.run.files import read_json
from scripts.run.layout import finished, relative
from scripts.run.stages import maker

VERDICT, FLOORS = "verdict.json", "floors.json"


def read_scores(results: Path) -> dict[str, float]:
    """Read {"task/metric": value} from an lm-eval results file, without standard errors."""
    return {
        f"{task}/{metric.split(',')[0]}": value
        for task, metrics in read_json(results)["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    }


def judge(scores: dict[str, float], floors: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Hold {"task/metric": value} against floors, {"task/metric": {"min" or "max": bound}}.

    Returns {"passed", "floors": each bound with its value, "scores"}. A metric that was not
    measured fails: a renamed task must not open the gate. Without floors nothing passes.
    """
    rows = []
    for name, bound in floors.items():
        value = scores.get(name)
        rows.append({"metric": name, "value": value, **bound, "passed": not _miss(value, bound)})
    return {
        "passed": bool(rows) and all(row["passed"] for row in rows),
        "floors": rows,
        "scores": scores,
    }


def _miss(value: Any, bound: dict[str, float]) -> str:
    """Say how a value misses its bound, "" if it keeps it."""
    needed = " and ".join(
        f"{word} {bound[key]}"
        for key, word in (("min", "at least"), ("max", "at most"))
        if key in bound
    )
    if not needed:
        return f"has neither min nor max: {bound}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"was not measured, {needed} is needed"
    kept = bound.get("min", value) <= value <= bound.get("max", value)
    return "" if kept else f"is {value:.4f}, {needed} is needed"


def problems(evaluation: Path, model: Path, digests: Digests) -> list[str]:
    """List why this model may not be served: no verdict, one for other bytes, a missed floor.

    The verdict is judged again, by its scores and by the floors beside it: what it says of itself
    ("passed") could have been edited. The model's digest is of the files that are there now, so an
    edited, a missing and an added file are all seen.
    """
    run, judging = evaluation.parent.name, maker("verdict").name
    force = "or FORCE=1 to serve it all the same (it is recorded)"
    verdict = read_json(evaluation / VERDICT)
    if verdict is None or not finished(evaluation):
        missing = f"{evaluation}/{VERDICT} is missing"
        return [f"no verdict for this model: {missing}; make {judging} RUN={run}, {force}"]
    digest = digests.of_tree(model)
    if verdict["model"]["digest"] != digest:
        judged = f"{verdict['model']['path']} ({verdict['model']['digest'][:19]}…)"
        again = f"make clean RUN={run} STAGE={judging}, make {judging} RUN={run}"
        return [
            f"the verdict is for {judged}, not for {relative(model)} as it is now "
            f"({digest[:19]}…); {again}, {force}"
        ]
    return [f"{problem}; train better, {force}" for problem in _missed(evaluation, verdict)]


def _missed(evaluation: Path, verdict: dict[str, Any]) -> list[str]:
    floors, file = read_json(evaluation / FLOORS) or {}, relative(evaluation / FLOORS)
    if not floors:
        return [f"{file} names no floor, so nothing was judged"]
    rows = {row["metric"]: row for row in verdict["floors"]}
    scores = {name: row["value"] for name, row in rows.items()}
    missed = {name: _miss(scores.get(name), bound) for name, bound in floors.items()}
    for name, row in rows.items():  # a floor that was there when it was judged, and is no more
        bound = {key: row[key] for key in ("min", "max") if key in row}
        missed[name] = missed.get(name) or _miss(row["value"], bound)
    return [f"{name} {how} ({file})" for name, how in missed.items() if how]
