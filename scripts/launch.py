"""The front door behind make: checks what the user asked for, writes the submission, hands it to a cluster.

    python3 -m scripts.launch <verb>        verbs: the stages, pipeline, status, logs, stop, cancel, clean, …

Every option comes by environment variable (see `make help`), so quotes and spaces survive make. Standard library
only, Python 3.9 or newer: this runs on a login node with nothing installed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator

from scripts.launcher import report
from scripts.launcher.submission import CLUSTERS, Request, Submission, differences, folder_names, plan, prepared_data, read_request
from scripts.run import attempts, files, layout
from scripts.run.errors import DONE, WRONG_INPUT, InputError
from scripts.run.layout import STAGES, TRAINED, record, relative, stage_dir


def launch(request: Request, stage: str) -> int:
    """Start one stage, or say that it is done. Returns an exit code."""
    cluster, jobs = CLUSTERS[request.cluster], look(request.run)
    plan(request, stage, pending=("data", *_ahead(request, stage, jobs)))  # before data begins
    data_first = stage == request.verb and stages_of(request) != [stage]  # a pipeline has run its data stage already
    if data_first and "data" not in _ahead(request, stage, jobs):
        code = launch(request, "data")
        if code:
            return code
        jobs = look(request.run)
    ahead = _ahead(request, stage, jobs)
    submission = plan(request, stage, pending=("data", *ahead))
    refuse_other_settings(submission)
    if record(submission.directory):
        print(f"{stage}: done already; {report.one_line(submission.directory)}")
        return DONE
    job, state = jobs.get(stage), "running" if attempts.running(submission.directory) else ""
    if stage == "deploy":
        state = report.service_state(submission.directory)
    if job and job.active and state not in ("serving", "silent"):
        again = f"wait for it, or stop it: make stop RUN={request.run} STAGE={stage}"
        raise InputError(f"{stage}: submitted already: {job.note}; {again}")
    while state == "loading":
        time.sleep(0.5)  # another launch of it, whose launcher may be gone
        state = report.service_state(submission.directory)
    if state == "serving":
        print(f"deploy: serving already; {report.one_line(submission.directory)}")
        return DONE
    if state == "silent":
        print("deploy: the service does not answer any more; starting it anew", flush=True)
        _cluster_of(stage, jobs).stop(submission.directory, save=False)
    elif state:
        raise InputError(attempts.already_running(submission.directory, attempts.running(submission.directory)))
    with claimed(request.run, stage):
        (submission.directory / "job.json").unlink(missing_ok=True)  # an earlier job's, which is over
        after = list(ahead.values())[-1:]  # which has the others ahead of itself
        write(submission, cluster.command_line(submission, *after))
        return cluster.submit(submission, *after)


def refuse_other_settings(submission: Submission) -> None:
    """Raises InputError if the stage has something to lose that was made or serves with other settings; where it has not, a
    mended ARGS may simply try again."""
    directory, run, stage = submission.directory, submission.directory.parent.name, submission.stage
    kept = record(directory) or (directory / "checkpoints").exists() or (stage == "deploy" and attempts.running(directory))
    changed = differences(submission) if kept else []
    if changed:
        mend = "end it: make undeploy" if stage == "deploy" else "remove this stage and what it made: make clean STAGE=" + stage
        raise InputError(
            f"{relative(directory)} exists with other settings: {'; '.join(changed)}. Choose another RUN, or {mend} RUN={run}"
        )


@contextlib.contextmanager
def claimed(run: str, stage: str) -> Iterator[None]:
    """Keep every other launcher from this stage until it is submitted. Raises InputError if one was quicker."""
    directory = stage_dir(run, stage)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w", encoding="utf-8") as lock:
        free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel's: it goes with this process, however that ends
        except BlockingIOError:
            free = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise  # these say: a filesystem without locks; there a second job of the stage is refused when it begins
        job = look(run).get(stage)
        if not free or attempts.running(directory) or (job and job.active):
            raise InputError(f"{stage}: another make began it a moment ago; make status RUN={run}")
        yield


def look(run: str) -> dict[str, layout.Job]:
    """What the schedulers say of a run's stages. Raises InputError if one that has a job of it does not answer."""
    return {stage: job for cluster in CLUSTERS.values() for stage, job in cluster.look(run).items()}


def _ahead(request: Request, stage: str, jobs: dict[str, layout.Job]) -> dict[str, str]:
    """{stage: job} of what is under way before this stage on the same cluster."""
    before = STAGES[: STAGES.index(stage)]
    return {s: jobs[s].id for s in before if s in jobs and jobs[s].active and jobs[s].cluster == request.cluster}


def write(submission: Submission, submitted: str) -> None:
    """Write the submission, and the line that starts it by hand."""
    for name, text in {**submission.files, "submitted.txt": submitted + "\n"}.items():
        path = submission.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, text)


def stages_of(request: Request) -> list[str]:
    """The stages that a verb runs, in order: data, too, where a stage needs it first."""
    if request.verb == "pipeline":
        return [s for s in STAGES if not (s == "data" and prepared_data(request))]
    unprepared = request.verb in (*TRAINED, "evaluate") and not prepared_data(request)
    data_first = unprepared and (request.data or not record(stage_dir(request.run, "data")))
    return ["data", request.verb] if data_first else [request.verb]


def pipeline(request: Request) -> int:
    """All stages in order, going on from the first that is not done; the table at the end."""
    stages = stages_of(request)
    for stage in stages:
        plan(request, stage, pending=tuple(stages[: stages.index(stage)]))  # every problem before the first minute
    for stage in stages:
        print(f"\n== {stage}", flush=True)
        job = look(request.run).get(stage)
        if job and job.active and job.cluster == request.cluster:
            print(f"{stage}: {job.note}")
            continue
        code = launch(request, stage)
        if code:
            return code
    jobs = look(request.run)
    print("\n" + report.table(request.run, jobs))
    if any(job.active for job in jobs.values()):
        print(f"\nThe queue does the rest; make status RUN={request.run}")
        return DONE
    return report.sample(request.run)


def status(request: Request) -> int:
    """The table; what is recorded, where a scheduler does not answer."""
    try:
        jobs = look(request.run)
    except InputError:
        print(report.table(request.run))
        raise
    print(report.table(request.run, jobs))
    return DONE


def show_dry_run(request: Request) -> None:
    """Print what would be written and started, for a shell in the repository to do the same; touch nothing."""
    stages, jobs = stages_of(request), look(request.run)  # which asks no scheduler about a run without jobs
    ahead = _ahead(request, stages[0], jobs)
    submissions = [plan(request, stage, pending=(*ahead, *stages[:number])) for number, stage in enumerate(stages)]
    for submission in submissions:
        refuse_other_settings(submission)
    print("# what make would do, for a shell in the repository; all of it: … | bash -e\n")
    after = list(ahead.values())[-1:]
    for submission in submissions:
        stage, job = submission.stage, jobs.get(submission.stage)
        if record(submission.directory):
            print(f"# {stage}: done already\n")
        elif job and job.active:
            print(f"# {stage}: {job.note}\n")
            after = [job.id]
        else:
            print(submission.as_shell())
            print(CLUSTERS[request.cluster].show(submission, *after) + "\n")
            after = [f"${stage}"]


def stop(request: Request) -> int:
    """Stop whatever of the run is running: state is saved where the stage can, but for cancel; the same command goes on.
    What waits in a queue for a stopped stage goes with it."""
    report.check_exists(request.run)
    jobs = look(request.run)
    stages = [s for s in _under_way(request.run, jobs) if request.stage in ("", s)]
    if not stages:
        print(f"nothing of run {request.run}{' stage ' + request.stage if request.stage else ''} is running")
        return DONE
    waiting = [s for s, job in jobs.items() if job.word == "queued" and STAGES.index(s) > STAGES.index(stages[0])]
    for stage in [*reversed(waiting), *(s for s in stages if s not in waiting)]:  # the last first: none may start meanwhile
        _cluster_of(stage, jobs).stop(stage_dir(request.run, stage), save=request.verb != "cancel")
        queued = stage in jobs and jobs[stage].word == "queued"
        ended = "cancelled" if request.verb == "cancel" else "stopped"
        print(f"{stage}: {'taken from the queue' if queued else ended}", flush=True)
    if waiting:
        print("the same make pipeline goes on, and submits the others again")
    return DONE


def _under_way(run: str, jobs: dict[str, layout.Job]) -> list[str]:
    return [s for s in STAGES if attempts.running(stage_dir(run, s)) or (s in jobs and jobs[s].active)]


def _cluster_of(stage: str, jobs: dict[str, layout.Job]):
    return CLUSTERS[jobs[stage].cluster if stage in jobs and jobs[stage].active else "local"]


def clean(request: Request) -> int:
    """Remove a run, or one stage of it; refuses while it runs."""
    target = stage_dir(request.run, request.stage) if request.stage else layout.runs_root() / request.run
    if not target.exists():
        raise InputError(f"{target}: nothing there; runs: {', '.join(sorted(folder_names(layout.runs_root()))) or 'none'}")
    busy = [s for s in _under_way(request.run, look(request.run)) if request.stage in ("", s)]
    if busy:
        raise InputError(f"run {request.run} is running or queued ({', '.join(busy)}); first make stop RUN={request.run}")
    shutil.rmtree(target)
    print(f"removed {relative(target)}")
    return DONE


def main(arguments: list[str]) -> int:
    """Run one verb. Returns its exit code."""
    verbs = {
        **{stage: lambda request: launch(request, request.verb) for stage in STAGES},
        "pipeline": pipeline,
        "status": status,
        "logs": lambda request: report.logs(request.run, request.stage),
        "lineage": lambda request: report.lineage(request.run),
        "stop": stop,
        "cancel": stop,
        "undeploy": lambda request: stop(Request(**{**vars(request), "stage": "deploy"})),
        "clean": clean,
    }
    verb = arguments[0] if len(arguments) == 1 else ""
    try:
        if verb not in verbs:
            raise InputError(f"{' '.join(arguments) or 'no verb'}: unknown; known: {', '.join(verbs)}")
        request = read_request(verb, dict(os.environ))
        if request.dry_run and verb in (*STAGES, "pipeline"):
            show_dry_run(request)
            return DONE
        if request.dry_run and verb in ("stop", "cancel", "undeploy", "clean"):
            raise InputError(f"DRY_RUN=1: {verb} has no dry run; make status RUN={request.run} shows what there is")
        return verbs[verb](request)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # its reader has seen enough: make … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except InputError as error:
        found = error.problems
    except OSError as error:  # no permission, a read-only or a full disk, a file in the way
        if error.filename is None:
            raise
        found = [f"{error.filename}: {error.strerror}; runs go under {layout.runs_root()}, choose another place with RUNS="]
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
