"""The table of a run, one line a stage, and the end of its newest log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from scripts.clusters.interface import Cluster, Job
from scripts.launcher.options import Options, folder_names
from scripts.run import attempts, stages
from scripts.run.errors import DONE, InputError
from scripts.run.files import read_json
from scripts.run.layout import Run, finished
from scripts.run.stages import row

LOGS = ("attempt-*.log", "slurm-*.log")


def check_exists(run: Run) -> None:
    """Raise InputError naming the runs that there are, if this one is not among them."""
    if not run.directory.is_dir():
        known = ", ".join(sorted(folder_names(run.root))) or "none"
        raise InputError(
            f"RUN={run.name}: no such run under {run.root}; there are: {known}; say which: RUN=…"
        )


def made_model(run: Run, stage: str = "") -> Path:
    """Return the directory of the stage that made a run's newest model, or of `stage`. Raises
    InputError if it has made none."""
    check_exists(run)
    made = [name for name in stages.makers() if finished(run.stage(name))]
    if stage and stage not in made:
        there = ", ".join(made) or "none"
        raise InputError(f"STAGE={stage}: has no finished model in run {run.name}; have: {there}")
    if not made:
        status = f"make status RUN={run.name}"
        raise InputError(f"run {run.name}: no stage has finished a model here; {status}")
    return run.stage(stage or made[-1])


def result(directory: Path, cluster: Cluster) -> str:
    """Say in a few words what a stage has made, or how far it is."""
    makes = row(directory.name).makes
    if makes == "service":
        url = cluster.address(directory)
        return f"{url}/v1" if url else ""
    summary = (finished(directory) or {}).get("summary", {})
    if not summary:
        return _progress(directory) if directory.exists() else ""
    if makes == "sets":
        # The choices are some of the held-out conversations once more.
        rows = sum(n for name, n in summary["rows"].items() if name != "heldout_choice")
        return f"{rows:,} rows from {summary['source']}"
    if "result" in summary:
        return str(summary["result"])
    if makes == "verdict":
        return ", ".join(f"{name} {value:.3f}" for name, value in summary["scores"].items())
    return attempts.learned(summary)


def _progress(directory: Path) -> str:
    """Say how far the newest attempt is; "" before it has begun to work."""
    told: dict[str, Any] = read_json(directory / "progress.json") or {}
    newest, phase = len(attempts.history(directory)), told.get("phase") or {}
    if phase.get("attempt") == newest and attempts.running(directory):
        return f"{phase['name']}, {time.time() - phase['since']:.0f} s"
    if told.get("attempt") != newest or "step" not in told:
        return ""
    learned = attempts.learned(told)
    return f"step {told['step']} of {told['total']}" + (f", {learned}" if learned else "")


def speed(directory: Path) -> str:
    """Return the tokens per second of a training stage, "" for any other."""
    value = ((finished(directory) or {}).get("summary") or {}).get("tokens_per_second")
    return f"{value:,.0f}" if value else ""


def seconds(directory: Path) -> str:
    """Return how long a stage took over all its attempts; a service: until it was ready."""
    if row(directory.name).serves:
        server = read_json(directory / "server.json")
        return f"{server['ready_seconds']:.0f}" if server else ""
    past = attempts.history(directory) if directory.exists() else []
    total = sum(a.get("seconds", 0) for a in past)
    return f"{total:.0f}" if total else ""


def one_line(directory: Path, cluster: Cluster) -> str:
    """Say what stands behind a finished stage's name on the terminal."""
    fast = f"{speed(directory)} tokens/s" if speed(directory) else ""
    parts = [f"{seconds(directory)} s", fast, result(directory, cluster)]
    return ", ".join(p for p in parts if p)


def table(
    run: Run, clusters: Mapping[str, Cluster], jobs: Optional[Mapping[str, Job]] = None
) -> str:
    """Format one line a stage: status, seconds, tokens/s; loss, score or address, and what its job
    waits for or why it failed. Without `jobs` what is recorded is all there is."""
    check_exists(run)
    rows = [("stage", "status", "seconds", "tokens/s", "result")]
    rows += [_line(run.stage(name), clusters, (jobs or {}).get(name)) for name in _shown(run)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for cells in rows:
        padded = [
            c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths))
        ]
        lines.append(f"{'  '.join(padded)}  {cells[4]}".rstrip())
    return f"run {run.name}\n" + "\n".join(lines)


def _shown(run: Run) -> list[str]:
    """Name the stages of a run's table: the line, and what else was run; a run that has nothing of
    the line shows none of it."""
    there = [name for name in stages.names() if run.stage(name).is_dir()]
    line = [] if there and not set(there) & set(stages.line()) else stages.line()
    return [name for name in stages.names() if name in (*line, *there)]


def _line(
    directory: Path, clusters: Mapping[str, Cluster], job: Optional[Job]
) -> tuple[str, str, str, str, str]:
    cluster = clusters[job.cluster if job else "local"]
    state = attempts.status(directory)
    if row(directory.name).serves:
        state = cluster.service_state(directory) or state
    queue_says = bool(job and state != "done" and job.word not in ("", "running"))
    if job and queue_says:
        state = job.word
    alive = ("done", "running", "serving", "loading", "silent")
    if job and job.word == "running" and state not in alive:
        state = "starting"
    note = job.note if job and state != "done" else ""
    said = [result(directory, cluster), note, "" if queue_says else _fault(directory, state)]
    words = "; ".join(s for s in said if s)
    return directory.name, state, seconds(directory), speed(directory), words


def _fault(directory: Path, state: str) -> str:
    """Return the first line of what a stage ended with."""
    if state not in ("failed", "refused", "lost"):
        return ""
    said = attempts.history(directory)[-1].get("error", "").strip()
    return said.splitlines()[0][:160] if said else ""


def logs(options: Options) -> int:
    """Print the end of the newest log of a stage, or of the stage that was active last."""
    run, stage = options.run, options.stage
    check_exists(run)
    wanted = [stage] if stage else stages.names()
    found = [p for s in wanted for kind in LOGS for p in run.stage(s).glob(f"logs/{kind}")]
    if not found:
        which = f"run {run.name}" + (f" stage {stage}" if stage else "")
        raise InputError(f"{which}: no logs yet; make status RUN={run.name}")
    newest = max(found, key=lambda p: p.stat().st_mtime)
    print(f"== {newest}")
    print("\n".join(newest.read_text(encoding="utf-8", errors="replace").splitlines()[-60:]))
    return DONE
