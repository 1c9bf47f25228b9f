"""The gate: whether a model's own evaluation lets it be served.

A *floor* is a bound that a score must keep (at least, or at most). A *verdict* is the scores of
one model, by its digest, held against the floors. deploy serves no model without one that passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from scripts.run.digests import Digests
from scripts.run.files import read_json
from scripts.run.layout import finished, relative
from scripts.run.stages import maker, trained

VERDICT, FLOORS = "verdict.json", "floors.json"
PARENT = "parent"  # what the model is called that a run began with
# What a model must not lose against the one that its run began with, and which way is better.
WATCHED = {
    "relay_text/document_bits_per_byte": "less",
    "relay_answers/loss": "less",
    "relay_preference/prefers_chosen": "more",
    "relay_choice/acc": "more",
}
ERRORS = 2  # standard errors of a difference that may be chance


def before_fact(name: str) -> str:
    """Return the fact that names the model of an earlier stage, or of PARENT."""
    return f"AFTER_{name.upper()}" if name != PARENT else "PARENT"


def before(facts: Mapping[str, str]) -> list[str]:
    """Name what the facts say was there before the model that is judged: PARENT, and stages."""
    return [name for name in (PARENT, *trained()) if before_fact(name) in facts]


def read_scores(results: Path) -> dict[str, float]:
    """Read {"task/metric": value} from an lm-eval results file, without standard errors."""
    return {
        _name(task, metric): value
        for task, metrics in read_json(results)["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    }


def _name(task: str, metric: str) -> str:
    """Name a score. lm-eval writes "metric,filter": a task that reads an answer in two ways has two
    scores of one metric."""
    metric, _, kept = metric.replace("_stderr", "").partition(",")
    return f"{task}/{metric}" + (f",{kept}" if kept not in ("", "none") else "")


def directions(results: Path, names: Optional[Iterable[str]] = None) -> dict[str, str]:
    """Return which way is better, "more" or "less", of the scores in `names`; without them, of all
    that have a standard error. Those that were not measured are left out."""
    known, scores = read_json(results)["higher_is_better"], read_scores(results)
    found = {}
    for name in read_errors(results) if names is None else names:
        task, _, metric = name.partition("/")
        metric = metric.partition(",")[0]
        # lm-eval leaves out a group of groups, as mmlu: there the word of all tasks holds.
        rows = [known[task]] if task in known else known.values()
        words = {row[metric] for row in rows if row.get(metric) is not None}
        if len(words) == 1 and name in scores:
            found[name] = "more" if words.pop() else "less"
    return found


def read_errors(results: Path) -> dict[str, float]:
    """Read {"task/metric": standard error} from an lm-eval results file, where it has one."""
    return {
        _name(task, metric): value
        for task, metrics in read_json(results)["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" in metric
    }


def not_worse(
    parent: Path, results: Path, watched: Mapping[str, str] = WATCHED
) -> dict[str, dict[str, float]]:
    """Return floors that say: not worse than the parent by more than ERRORS standard errors of the
    difference. For the scores of `watched` that both lm-eval results files have."""
    before, now = read_scores(parent), read_scores(results)
    errors = read_errors(parent), read_errors(results)
    found = {}
    for name, better in watched.items():
        if name in before and name in now:
            leeway = ERRORS * math.hypot(*(error.get(name, 0.0) for error in errors))
            if better == "less":
                found[name] = {"max": before[name] + leeway}
            else:
                found[name] = {"min": before[name] - leeway}
    return found


def conclude(
    results: Path,
    before: Path,
    floors: dict[str, dict[str, float]],
    empty: list[str],
    suite: Optional[Mapping[str, Any]] = None,
) -> dict[str, Any]:
    """Judge what lm-eval wrote below `results`, by the floors of tasks that are not `empty` (the
    data has no rows for them), and by what it wrote below before/<PARENT>, if it did. What it wrote
    below before/<stage> is told beside it. Of a `suite` its own scores are watched."""
    now = _newest(results)
    if now is None:
        raise FileNotFoundError(f"{results}: no results_*.json")
    floors = {name: bound for name, bound in floors.items() if name.split("/")[0] not in empty}
    earlier = {name: _newest(before / name) for name in (PARENT, *trained())}
    written = {name: path for name, path in earlier.items() if path}
    watched = WATCHED if suite is None else directions(now, suite.get("scores"))
    if PARENT in written:
        floors = {**not_worse(written[PARENT], now, watched), **floors}
    return {
        "watched": list(watched),
        "without_data": empty,
        "errors": read_errors(now),
        "before": {
            name: {"scores": read_scores(path), "errors": read_errors(path)}
            for name, path in written.items()
        },
        **judge(read_scores(now), floors),
    }


def _newest(folder: Path) -> Optional[Path]:
    return max(folder.rglob("results_*.json"), default=None)


def told_of(verdict: Mapping[str, Any]) -> list[str]:
    """Name the scores that count: those that are watched, and those that have a floor."""
    bounds = [row["metric"] for row in verdict["floors"]]
    return list(dict.fromkeys([*verdict.get("watched", WATCHED), *bounds]))


def summary(verdict: Mapping[str, Any]) -> dict[str, float]:
    """Return what stands in the table of a run: the scores that have a bound, else the watched."""
    scores, bound = verdict["scores"], [row["metric"] for row in verdict["floors"]]
    return {name: scores[name] for name in bound or told_of(verdict) if name in scores}


def changes(verdict: Mapping[str, Any], name: str) -> list[str]:
    """Format one line for each score that is watched or has a floor: what it was after each stage,
    and of the model that is judged, made by the stage `name`."""
    models = {**verdict["before"], name: verdict}
    found = []
    for metric in told_of(verdict):
        told = []
        for model, said in models.items():
            if metric in said["scores"]:
                error = said["errors"].get(metric)
                more = f" ± {error:.3f}" if error else ""
                told.append(f"{model} {said['scores'][metric]:.3f}{more}")
        if told:
            found.append(f"{metric}: {', '.join(told)}")
    return found


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
    rows = {row["metric"]: row for row in verdict["floors"]}
    empty = verdict.get("without_data", [])  # tasks that DATA has no rows for
    floors = {name: bound for name, bound in floors.items() if name.split("/")[0] not in empty}
    if not floors and not rows:
        return [f"{file} names no floor and there is no parent to compare with: nothing was judged"]
    scores = {name: row["value"] for name, row in rows.items()}
    missed = {name: _miss(scores.get(name), bound) for name, bound in floors.items()}
    for name, row in rows.items():  # a floor that was there when it was judged, and is no more
        bound = {key: row[key] for key in ("min", "max") if key in row}
        missed[name] = missed.get(name) or _miss(row["value"], bound)
    return [f"{name} {how} ({file})" for name, how in missed.items() if how]
