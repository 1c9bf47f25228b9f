"""Carry a plan out, or print it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator

from scripts.launcher import chat, report
from scripts.launcher.options import Options
from scripts.launcher.plan import Plan, Step, jobs_of, mark, plan
from scripts.run.errors import DONE, InputError
from scripts.run.stages import maker


def start(options: Options) -> int:
    """Start what a verb needs, stage by stage, going on from the first that is not done. Returns an
    exit code, the first that is not 0. Raises InputError before anything is started."""
    todo = plan(options)
    for sentence in todo.left_out:
        print(sentence, flush=True)
    if options.base:
        print(f"run {options.run.name}: what is quantised is a run of its own", flush=True)
    for step in todo.steps:
        if options.several:
            print(f"\n== {step.row.name}", flush=True)
        code = _start(options, todo, step)
        if code:
            return code
    return _end(options) if options.several else DONE


def _start(options: Options, todo: Plan, step: Step) -> int:
    name, directory = step.row.name, step.submission.directory
    if step.state == "done":
        print(f"{name}: done already; {report.one_line(directory, options.here)}")
        return DONE
    if step.state == "queued" and step.job:
        print(f"{name}: {step.job.note}")
        return DONE
    while step.state == "loading":  # another launch of it, whose launcher may be gone
        time.sleep(0.5)
        step.state = options.here.service_state(directory)
    if step.state == "serving":
        print(f"{name}: serving already; {report.one_line(directory, options.here)}")
        return DONE
    if step.state == "silent":
        print(f"{name}: the service does not answer any more; starting it anew", flush=True)
        cluster = step.job.cluster if step.job and step.job.active else "local"
        options.clusters[cluster].stop(directory, save=False)
    with submit_lock(step):
        (directory / "job.json").unlink(missing_ok=True)  # an earlier job's, which is over
        started = options.here.submit(step.submission, todo.after(step))
    if started.job:
        todo.under_way[name] = started.job
    elif started.code == DONE:
        print(f"{name}: {report.one_line(directory, options.here)}", flush=True)
    return started.code


@contextlib.contextmanager
def submit_lock(step: Step) -> Iterator[None]:
    """Keep every other launcher from a stage while it is submitted. Raises InputError if one was
    quicker since the plan was made."""
    directory = step.submission.directory
    directory.mkdir(parents=True, exist_ok=True)
    # A link that somebody put there is not followed, and a pipe does not block.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with os.fdopen(os.open(directory / ".lock", flags, 0o644), "w") as lock:
        free = True
        try:
            # The kernel's lock: it goes with this process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError as error:
            # These say that the filesystem has no locks. There a second job of the stage is
            # refused when it begins.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        if not free or mark(directory) != step.mark:
            see = f"make status RUN={step.submission.run.name}"
            raise InputError(f"{step.row.name}: another make began it a moment ago; {see}")
        yield


def _end(options: Options) -> int:
    """Close a pipeline: the table, and an answer of the served model."""
    jobs = jobs_of(options.run, options.clusters)
    print("\n" + report.table(options.run, options.clusters, jobs))
    if any(job.active for job in jobs.values()):
        print(f"\nThe queue does the rest; make status RUN={options.run.name}")
    if not options.here.reach(options.run.stage(maker("service").name)):
        return DONE
    code = chat.sample(options.run, options.here)
    name, row = options.run.name, maker("service")
    print(f"\nIt stays served: make chat RUN={name}; make un{row.name} RUN={name} ends it")
    return code


def show(options: Options) -> int:
    """Print a plan as a shell script for the repository that carries it out; touch nothing."""
    todo = plan(options)
    print("# what make would do, for a shell in the repository; all of it: … | bash -e\n")
    for sentence in todo.left_out:
        print(f"# {sentence}\n")
    for step in todo.steps:
        name = step.row.name
        if step.state == "done":
            print(f"# {name}: done already\n")
        elif step.state == "queued" and step.job:
            print(f"# {name}: {step.job.note}\n")
        else:
            print(step.submission.as_shell())
            print(options.here.render(step.submission, todo.after(step)) + "\n")
            todo.under_way[name] = f"${step.row.module}"
    return DONE
