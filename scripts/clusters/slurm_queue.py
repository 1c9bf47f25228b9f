"""What Slurm's queue says of jobs, and what that means in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from scripts.clusters.commands import ask
from scripts.clusters.interface import Job
from scripts.run.errors import InputError

UNREACHABLE = "Slurm does not answer: {}; scontrol ping shows its controller"

# squeue's reasons (man squeue, JOB REASON CODES) in words; any other is shown as it is
REASONS = {
    "Resources": "waits for {nodes}",
    "Priority": "waits behind other jobs",
    "None": "waits for the scheduler to look at it",
    "Dependency": "waits for {after}",
    "DependencyNeverSatisfied": "never starts: a stage before it failed",
    "BeginTime": "starts again at {start}",
    "JobHeldUser": "held; scontrol release {id}",
    "JobHeldAdmin": "held by an administrator",
    # what slurmctld writes in place of a code where a node's prolog or slurmstepd failed
    "launch failed requeued held": "held: its node could not start it; scontrol release {id}",
    "PartitionTimeLimit": "never starts: --time is more than the partition allows",
    "PartitionNodeLimit": "never starts: {nodes} are more than the partition allows",
    "ReqNodeNotAvail": "waits for nodes that are down or reserved",
    "PartitionDown": "waits: the partition is down",
}
COLUMNS = ("id", "state", "reason", "nodes", "start", "after", "where")
FORMAT = "%i|%T|%r|%D|%S|%E|%N"  # squeue's names of these


def queue(*jobs: str, environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Ask squeue what it knows of these jobs: {id: row}, a row with COLUMNS as keys.

    Raises InputError if Slurm does not answer.
    """
    words = ("squeue", f"--jobs={','.join(jobs)}", "--noheader", f"--format={FORMAT}")
    listed = ask(*words, environment=environment)
    if listed.returncode and "Invalid job id" not in listed.stderr:  # where it knows none of them
        raise InputError(UNREACHABLE.format(listed.stderr.strip()))
    rows = (dict(zip(COLUMNS, line.split("|"))) for line in listed.stdout.splitlines() if line)
    return {row["id"]: row for row in rows}


def in_queue(job: str, row: Mapping[str, str]) -> Job:
    """Say in words what a row of squeue means."""
    state = row["state"]
    if state != "PENDING":
        more = "" if state == "RUNNING" else f", {state.lower()}"
        return Job("slurm", job, "running", f"job {job} on {row['where']}{more}")
    nodes = f"{row['nodes']} node" + ("s" if row["nodes"] != "1" else "")
    words = {**row, "nodes": nodes, "start": row["start"].replace("T", " ")}
    reason = row["reason"].split(",")[0].strip("()")
    if row["after"] and not reason.startswith("Dependency"):
        reason = "Dependency"  # a job that is not looked at yet says that it waits for resources
    sentence = REASONS.get(reason, f"waits: {reason}").format(**words)
    return Job("slurm", job, "queued", f"job {job} {sentence}")


def why_gone(directory: Path, job: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return (word, note) of a job that left the queue without an attempt. Slurm remembers it for
    a few minutes (MinJobAge)."""
    shown = ask("scontrol", "--oneliner", "show", "job", job, environment=environment).stdout
    found = re.search(r"JobState=(\w+)", shown)
    state, log = found[1] if found else "", directory / f"logs/slurm-{job}.log"
    unwritten = f"its node could not write {log.parent}"
    if re.search(r"ExitCode=0:53", shown):  # slurmd's way to say that it could not open --output
        mend = "the run must be on a filesystem that all nodes share: RUNS="
        return "failed", f"job {job}: {unwritten}; {mend}"
    if re.search(r"ExitCode=(?!0:0)", shown) and log.exists():
        return state.lower(), f"job {job} ended before its stage began: {_first_error(log)}"
    why = f"cancelled, or a stage before it failed; or {unwritten}"
    if state == "CANCELLED":
        why = "cancelled"
    return "cancelled", f"job {job} left the queue before it began: {why}"


def _first_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    ours = [line for line in lines if line.startswith("error:")]  # srun's come first, and say less
    others = [line for line in lines if not re.match("srun: error: .* tasks? ", line)]
    bad = re.compile("error|FATAL|unrecognized option|not found")
    said = ours or [line for line in others if bad.search(line)] or lines[-1:]
    return said[0] if said else str(log)
