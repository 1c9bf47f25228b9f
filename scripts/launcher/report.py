"""What a run has to say: its table, logs, lineage, and whether its scores let a model be served.

Standard library only; reads run directories, nothing else.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from scripts.run import attempts, digests, files, layout
from scripts.run.errors import DONE, InputError
from scripts.run.files import read_json
from scripts.run.layout import STAGES, TRAINED, record, stage_dir


def result(directory: Path) -> str:
    """A stage's outcome in a few words."""
    summary = (record(directory) or {}).get("summary", {})
    if directory.name == "data" and summary:
        return f"{sum(summary['rows'].values()):,} rows from {summary['source']}"
    if directory.name == "evaluate" and summary:
        return ", ".join(f"{name} {value:.3f}" for name, value in summary["scores"].items())
    if directory.name == "deploy":
        server = read_json(directory / "server.json")
        return f"http://{server['host']}:{server['port']}/v1" if server and attempts.running(directory) else ""
    if not summary and directory.exists():
        summary = read_json(directory / "progress.json") or {}
        if summary.get("attempt") != len(attempts.history(directory)) or "step" not in summary:
            return ""  # the newest attempt has not begun to train
        loss = f", loss {summary['loss']:.3f}" if "loss" in summary else ""
        return f"step {summary['step']} of {summary['total']}{loss}"
    return f"loss {summary['loss']:.3f}" if "loss" in summary else ""


def speed(directory: Path) -> str:
    """Tokens per second of a training stage, "" for any other."""
    value = ((record(directory) or {}).get("summary") or {}).get("tokens_per_second")
    return f"{value:,.0f}" if value else ""


def seconds(directory: Path) -> str:
    """How long the stage took, over all its attempts; until it served, for deploy."""
    if directory.name == "deploy":
        server = read_json(directory / "server.json")
        return f"{server['ready_seconds']:.0f}" if server else ""
    history = attempts.history(directory) if directory.exists() else []
    total = sum(a.get("seconds", 0) for a in history)
    return f"{total:.0f}" if total else ""


def one_line(directory: Path) -> str:
    """What stands behind a finished stage's name on the terminal."""
    parts = [f"{seconds(directory)} s", f"{speed(directory)} tokens/s" if speed(directory) else "", result(directory)]
    return ", ".join(p for p in parts if p)


def check_exists(run: str) -> None:
    """Raises InputError naming the runs that there are."""
    if not (layout.runs_root() / run).is_dir():
        known = sorted(p.name for p in layout.runs_root().glob("*") if p.is_dir())
        raise InputError(f"RUN={run}: no such run under {layout.runs_root()}; there are: {', '.join(known) or 'none'}")


def service_state(directory: Path) -> str:
    """Of a deploy: "" where none runs, "loading", "serving", or "silent": it was ready once and /health does not answer."""
    if not attempts.running(directory):
        return ""
    server = read_json(directory / "server.json")
    if not server:
        return "loading"
    try:
        with urllib.request.urlopen(f"http://{server['host']}:{server['port']}/health", timeout=5):
            return "serving"
    except OSError:
        return "silent"


def table(run: str, jobs: Mapping[str, layout.Job] | None = None) -> str:
    """One line a stage: status, time, tokens/s; loss, score or address, and what its job waits for or why it failed."""
    check_exists(run)
    rows = [("stage", "status", "seconds", "tokens/s", "result")]
    for stage in STAGES:
        directory = stage_dir(run, stage)
        state = attempts.status(directory)
        if stage == "deploy" and state == "running":
            state = service_state(directory)
        job = (jobs or {}).get(stage)
        queue_says = bool(job and state != "done" and job.word not in ("", "running"))
        state = job.word if queue_says else state
        if job and job.word == "running" and state not in ("done", "running", "serving", "loading", "silent"):
            state = "starting"
        said = [result(directory), job.note if job and state != "done" else "", "" if queue_says else _fault(directory, state)]
        rows.append((stage, state, seconds(directory), speed(directory), "; ".join(s for s in said if s)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(cell.rjust(w) if i in (2, 3) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) + f"  {row[4]}"
        for row in rows
    ]
    return f"run {run}\n" + "\n".join(line.rstrip() for line in lines)


def _fault(directory: Path, state: str) -> str:
    """The first line of what a stage ended with."""
    if state not in ("failed", "refused", "lost"):
        return ""
    said = attempts.history(directory)[-1].get("error", "").strip()
    return said.splitlines()[0][:160] if said else ""


def sample(run: str) -> int:
    """Ask the served model the sample question of its data and print its answer. Returns an exit code."""
    from scripts.launcher import chat

    facts = files.read_env(stage_dir(run, "evaluate") / "stage.env")
    question = read_json(layout.from_fact(facts["DATA"]) / "data.json")["sample"]
    print(f"\nasked    {question}\nanswered ", end="")
    return chat.ask(chat.Server(stage_dir(run, "deploy")), [{"role": "user", "content": question}])[0]


def logs(run: str, stage: str) -> int:
    """Print the end of the newest log of a stage, or of the stage that was active last."""
    check_exists(run)
    kinds = ("attempt-*.log", "slurm-*.log")
    candidates = [p for s in STAGES if stage in ("", s) for kind in kinds for p in stage_dir(run, s).glob(f"logs/{kind}")]
    if not candidates:
        raise InputError(f"run {run}{' stage ' + stage if stage else ''}: no logs yet; make status RUN={run}")
    newest = max(candidates, key=lambda p: p.stat().st_mtime)
    print(f"== {newest}")
    print("\n".join(newest.read_text(encoding="utf-8", errors="replace").splitlines()[-60:]))
    return DONE


# --- the gate --------------------------------------------------------------------------------------------------


def read_scores(results: Path) -> dict[str, float]:
    """{"task/metric": value} of an lm-eval results file, standard errors left out."""
    return {
        f"{task}/{metric.split(',')[0]}": value
        for task, metrics in read_json(results)["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    }


def judge(results: Path, floors: Path) -> dict:
    """Hold an lm-eval results file against floors ({"task/metric": {"min" or "max": value}}).

    Returns {"passed", "floors": each bound with its value, "scores"}. A metric that was not measured fails: a
    renamed task must not open the gate.
    """
    scores, rows = read_scores(results), []
    for name, bound in read_json(floors).items():
        value = scores.get(name)
        passed = value is not None and value >= bound.get("min", value) and value <= bound.get("max", value)
        rows.append({"metric": name, "value": value, **bound, "passed": passed})
    return {"passed": all(row["passed"] for row in rows), "floors": rows, "scores": scores}


def gate_problems(evaluation: Path, model: Path) -> list[str]:
    """Why this model may not be served: no verdict, one for other weights, or a score beyond its bound."""
    run = evaluation.parent.name
    force = "or FORCE=1 to serve it all the same (it is recorded)"
    verdict = read_json(evaluation / "verdict.json")
    if verdict is None or not record(evaluation):
        return [f"no verdict for this model: {evaluation}/verdict.json is missing; make evaluate RUN={run}, {force}"]
    digest = digests.describe(model)["digest"]
    if verdict["model"]["digest"] != digest:
        return [
            f"the verdict is for {verdict['model']['path']} ({verdict['model']['digest'][:19]}…), not for "
            f"{layout.relative(model)} ({digest[:19]}…); make clean RUN={run} STAGE=evaluate, make evaluate RUN={run}, {force}"
        ]
    found = []
    for row in verdict["floors"]:
        if not row["passed"]:
            bound = f"at least {row['min']}" if "min" in row else f"at most {row['max']}"
            value = "was not measured" if row["value"] is None else f"is {row['value']:.4f}"
            floors = layout.relative(evaluation / "floors.json")
            found.append(f"{row['metric']} {value}, {bound} is needed ({floors}); train better, {force}")
    return found


# --- lineage ---------------------------------------------------------------------------------------------------


def lineage(run: str) -> int:
    """Walk from the newest model of a run back to its corpus; every input's digest must be the output's that it names."""
    check_exists(run)
    stage = next((s for s in ("deploy", "evaluate", *reversed(TRAINED)) if _inputs(stage_dir(run, s))), None)
    if stage is None:
        raise InputError(f"run {run}: nothing to trace yet; make status RUN={run}")
    problems = _walk(stage_dir(run, stage), 0, set())
    for problem in problems:
        print(f"error: {problem}")
    return 1 if problems else DONE


def _inputs(directory: Path) -> dict:
    if directory.name == "deploy":
        server = read_json(directory / "server.json")
        return {"model": server["model"]} if server else {}
    return (record(directory) or {}).get("inputs", {})


def _walk(directory: Path, depth: int, seen: set) -> list[str]:
    problems = []
    content = record(directory) or {}
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(content["ended"])) if content else "now"
    print(f"{'  ' * depth}{directory.parent.name}/{directory.name}  {when}  {content.get('git_commit', '')[:12]}")
    seen.add(directory)
    for name, item in sorted(_inputs(directory).items()):
        path, digest = Path(item["path"]), item["digest"]
        print(f"{'  ' * depth}  {name} {digest[:23]}…  {path}")
        maker = layout.from_fact(item["path"]).parent
        output = (record(maker) or {}).get("outputs", {}).get(path.name)
        if output and output["digest"] != digest:
            problems.append(f"{path} has been made anew since: {directory} used {digest[:23]}…, it now is {output['digest'][:23]}…")
        if output and maker not in seen:
            problems += _walk(maker, depth + 2, seen)
    if directory.name == "data" and content:
        print(f"{'  ' * depth}  corpus {content['summary']['corpus'][:23]}…  {content['summary']['source']}")
    return problems
