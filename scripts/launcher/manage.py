"""Look at what is under way, stop it, remove it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from scripts.clusters.interface import Cluster, Job
from scripts.launcher import report
from scripts.launcher.options import Options, folder_names
from scripts.launcher.plan import jobs_of
from scripts.run import attempts, stages
from scripts.run.errors import DONE, InputError
from scripts.run.layout import Run, relative
from scripts.run.submission import Submission


def status(options: Options) -> int:
    """Print the table of a run; what is recorded of it, where a scheduler does not answer."""
    try:
        jobs = jobs_of(options.run, options.clusters)
    except InputError:
        print(report.table(options.run, options.clusters))
        raise
    print(report.table(options.run, options.clusters, jobs))
    return DONE


def stop(options: Options) -> int:
    """Stop what runs of a run, or of one stage; its state is saved where the stage can, but for
    cancel. What waits in a queue for a stopped stage leaves the queue, too."""
    run, stage = options.run, options.stage
    report.check_exists(run)
    jobs = jobs_of(run, options.clusters)
    active = [s for s in _under_way(run, jobs) if stage in ("", s)]
    if not active:
        print(f"nothing of run {run.name}{f' stage {stage}' if stage else ''} is running")
        return DONE
    waiting = [
        name
        for name, job in jobs.items()
        if job.word == "queued" and active[0] in stages.before(name)
    ]
    # The last first: none may start because the one before it has left.
    for name in [*reversed(waiting), *(s for s in active if s not in waiting)]:
        cluster = _cluster_of(name, jobs, options.clusters)
        cluster.stop(run.stage(name), save=options.verb != "cancel")
        queued = name in jobs and jobs[name].word == "queued"
        ended = "cancelled" if options.verb == "cancel" else "stopped"
        print(f"{name}: {'taken from the queue' if queued else ended}", flush=True)
    if waiting:
        print("the same make pipeline goes on, and submits the others again")
    return DONE


def rollback(options: Options) -> int:
    """Serve again what a service had before: the run's own frozen submission, checked as ever.
    Returns an exit code. Raises InputError."""
    run = Run(options.run.root, options.here.earlier(options.service or options.run.name))
    jobs_of(run, options.clusters)
    submission = Submission.read(run.stage(stages.maker("service").name))
    print(f"back to run {run.name}", flush=True)
    return options.here.submit(submission).code


def clean(options: Options) -> int:
    """Remove a run, or one stage of it. Raises InputError while it runs."""
    run, stage = options.run, options.stage
    target = run.stage(stage) if stage else run.directory
    if not target.exists():
        known = ", ".join(sorted(folder_names(run.root))) or "none"
        raise InputError(f"{target}: nothing there; runs: {known}")
    active = _under_way(run, jobs_of(run, options.clusters))
    busy = ", ".join(s for s in active if stage in ("", s))
    if busy:
        first = f"first make stop RUN={run.name}"
        raise InputError(f"run {run.name} is running or queued ({busy}); {first}")
    for cluster in options.clusters.values():
        cluster.remove(target, run)
    shutil.rmtree(target)
    print(f"removed {relative(target)}")
    return DONE


def _under_way(run: Run, jobs: Mapping[str, Job]) -> list[str]:
    queued = [s for s, job in jobs.items() if job.active]
    return [s for s in stages.names() if s in queued or attempts.running(run.stage(s))]


def _cluster_of(stage: str, jobs: Mapping[str, Job], clusters: Mapping[str, Cluster]) -> Cluster:
    job = jobs.get(stage)
    return clusters[job.cluster if job and job.active else "local"]
