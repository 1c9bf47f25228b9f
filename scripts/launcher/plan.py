"""What a command will do, decided once: for each stage whether it is done, queued, running or to be
started, and after what. A dry run prints the plan, start.py carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from scripts.clusters.interface import Cluster, Job
from scripts.launcher import sources
from scripts.launcher.options import PIPELINE, Options, with_recipe
from scripts.launcher.prepare import prepare
from scripts.run import attempts, stages
from scripts.run.errors import InputError
from scripts.run.layout import Run, finished, relative
from scripts.run.stages import StageRow
from scripts.run.submission import Submission


@dataclass
class Step:
    """Hold one stage of a plan."""

    submission: Submission
    state: str  # done, queued, running; loading, serving, silent (a service); "": to be started
    job: Optional[Job]  # what a queue says of it
    mark: str  # of what was there when the plan was made, to see that another launcher was quicker

    @property
    def row(self) -> StageRow:
        """Return the stage's row of the stage table."""
        return self.submission.row


@dataclass
class Plan:
    """Hold the steps of a command in order, and {stage: job} of what is under way on the same
    cluster, which the steps wait for."""

    steps: list[Step]
    under_way: dict[str, str]
    left_out: list[str]  # sentences about the stages that DATA has nothing for

    def after(self, step: Step) -> str:
        """Return the job that a step waits for: the last one before it, which has the others
        before itself. "" if there is none."""
        before = stages.before(step.row.name)
        jobs = [self.under_way[name] for name in before if name in self.under_way]
        return jobs[-1] if jobs else ""


def plan(options: Options) -> Plan:
    """Decide what a command does. Raises InputError with every problem that can be seen before
    anything starts."""
    jobs = jobs_of(options.run, options.clusters)
    if options.verb != PIPELINE and stages.quantizer().name in _with_before(options.verb):
        options = sources.of_base(options)
    rows, left_out = _rows(options)
    under_way = {
        name: job.id for name, job in jobs.items() if job.active and job.cluster == options.cluster
    }
    steps, found = [], []
    for number, row in enumerate(rows):
        earlier = [r.name for r in rows[:number]]
        before = [name for name in stages.before(row.name) if name in under_way or name in earlier]
        submission, problems = prepare(options, row, tuple(before))
        job = jobs.get(row.name)
        if finished(submission.directory):
            problems = []  # it needs no more disk and no input, but must be what is asked for
        found += problems or _other_settings(submission, options.dry_run)
        state, problems = _state(options, submission, job)
        found += problems
        steps.append(Step(submission, state, job, mark(submission.directory)))
    found += _cluster_problems(options, steps) if not found else []
    if found:
        raise InputError(dict.fromkeys([*found, *left_out]))
    return Plan(steps, under_way, left_out)


def jobs_of(run: Run, clusters: Mapping[str, Cluster]) -> dict[str, Job]:
    """Ask the schedulers about a run's stages, and record the end of attempts that died without a
    word. Raises InputError if a scheduler that has a job of the run does not answer."""
    found: dict[str, Job] = {}
    for cluster in clusters.values():
        cluster.fetch(run)
        jobs = cluster.jobs(run)
        for stage, attempt, why in cluster.lost(jobs):
            attempts.record_lost(run.stage(stage), attempt, why)
        found.update(jobs)
    return found


def mark(directory: Path) -> str:
    """Describe who has taken a stage: its job, and how many attempts there are."""
    job = directory / "job.json"
    text = job.read_text(encoding="utf-8") if job.exists() else ""
    return f"{text}{len(attempts.history(directory))}"


def _rows(options: Options) -> tuple[list[StageRow], list[str]]:
    """Return the stages of a command, in order: the one that prepares data, too, where it is
    needed first; of a pipeline those that DATA has rows for, and sentences about the others.

    Raises InputError.
    """
    data, prepared = stages.maker("sets"), sources.prepared(options)
    if options.verb == PIPELINE:
        rows = [r for r in stages.TABLE if r.in_line and not (r == data and prepared)]
        rows = [with_recipe(r, options.recipes.get(r.name, "")) for r in rows]
        kinds = sources.kinds(options)
        if kinds is None:
            raise InputError(sources.unseen(options))
        out = [r for r in rows if r.trains_on and r.trains_on not in kinds]
        said = [f"{r.name}: left out; {sources.lacks(options, r, kinds)}" for r in out]
        return [r for r in rows if r not in out], said
    rows = [with_recipe(stages.row(options.verb), options.recipes.get(options.verb, ""))]
    small = stages.quantizer()
    if options.several:
        wanted = [r for r in stages.TABLE if r.name in _with_before(options.verb)]
        rows = [r for r in wanted[wanted.index(small) :] if r.in_line or r == small]
    needs = "sets" in rows[0].reads and not prepared and not sources.suite(options, rows[0])
    if needs and (options.data or not finished(options.run.stage(data.name))):
        return [data, *rows], []
    return rows, []


def _with_before(name: str) -> list[str]:
    """Name a stage and those that stand before it."""
    return [*stages.before(name), name]


def _state(options: Options, submission: Submission, job: Optional[Job]) -> tuple[str, list[str]]:
    """Return a stage's state (Step.state), and the problems that keep it from being started."""
    directory, name = submission.directory, submission.row.name
    if finished(directory):
        return "done", []
    state = ""
    if submission.row.serves:
        state = options.here.service_state(directory)
    if job and job.active and state not in ("serving", "silent"):
        # The stage that the command names would be submitted twice; one before it is waited for.
        if name != options.verb and job.cluster == options.cluster:
            return "queued", []
        again = f"wait for it, or stop it: make stop RUN={options.run.name} STAGE={name}"
        return "queued", [f"{name}: submitted already: {job.note}; {again}"]
    running = attempts.running(directory)
    if running and not state:
        return "running", [attempts.already_running(directory, running)]
    return state, []


def _other_settings(submission: Submission, dry_run: bool) -> list[str]:
    """List how a stage that has results, or serves, was submitted otherwise. A stage that has saved
    nothing yet may be tried again with other settings."""
    directory, row = submission.directory, submission.row
    record = finished(directory)
    has_results = record or (directory / "checkpoints").exists()
    if not has_results and not (row.serves and attempts.running(directory)):
        return []
    changed = submission.differences()
    if record and "corpus" in row.reads and not changed:
        changed = sources.changed(submission.run, record, dry_run)
    if not changed:
        return []
    run = submission.run.name
    mend = f"remove this stage and what it made: make clean STAGE={row.name} RUN={run}"
    if row.serves:
        mend = f"end it: make un{row.name} RUN={run}"
    exists = f"{relative(directory)} exists with other settings: {'; '.join(changed)}"
    return [f"{exists}. Choose another RUN, or {mend}"]


def _cluster_problems(options: Options, steps: list[Step]) -> list[str]:
    """Ask the cluster about every step that is to be started, until it names a problem: of the next
    stage it would say the same."""
    for step in steps:
        if step.state in ("", "silent"):
            found = options.here.problems(step.submission, options.dry_run)
            if found:
                return found
    return []
