"""CLUSTER=slurm: sbatch, squeue, scontrol and scancel around slurm/. The jobs' own part is slurm/run.sh.

Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import time
from pathlib import Path

from scripts.clusters.slurm_site import SITE, ask, image_problems, read_site, secret_problems, site_problems, time_problems
from scripts.run import attempts, layout
from scripts.run.errors import DONE, InputError
from scripts.run.files import dump_json, read_json, write_atomic
from scripts.run.layout import STAGES, TRAINED, Job, relative, stage_dir

UNREACHABLE = "Slurm does not answer: {}; scontrol ping shows its controller"

# squeue's reasons (man squeue, JOB REASON CODES) as people say it; others are shown as they are
REASONS = {
    "Resources": "waits for {nodes}",
    "Priority": "waits behind other jobs",
    "None": "waits for the scheduler to look at it",
    "Dependency": "waits for {after}",
    "DependencyNeverSatisfied": "never starts: a stage before it failed",
    "BeginTime": "starts again at {start}",
    "JobHeldUser": "held; scontrol release {id}",
    "JobHeldAdmin": "held by an administrator",
    "JobLaunchFailure": "held: its start failed; scontrol release {id}",
    "PartitionTimeLimit": "never starts: --time is more than the partition allows",
    "PartitionNodeLimit": "never starts: {nodes} are more than the partition allows",
    "ReqNodeNotAvail": "waits for nodes that are down or reserved",
    "PartitionDown": "waits: the partition is down",
}


BIND = "0.0.0.0"  # noqa: S104  others reach a service by its node's address; its key is made for the run


# --- before submission -----------------------------------------------------------------------------------------------


def problems(submission) -> list[str]:
    """What keeps this stage out of the queue, asked of site.env, the stage's sbatch file and Slurm itself."""
    found = site_problems()
    if found:
        return found
    site = read_site()
    found = time_problems(submission.stage, site)
    if found or os.environ.get("DRY_RUN"):  # a dry run needs no cluster
        return found
    found = image_problems(site) + secret_problems(site)
    if not shutil.which("sbatch"):
        found.append("sbatch: not on PATH; CLUSTER=slurm needs a login node of the cluster")
    return found or _ask_slurm(submission, site)


def _ask_slurm(submission, site: dict[str, str]) -> list[str]:
    """Slurm's own opinion: sbatch --test-only, 20 ms."""
    tried = ask("bash", "-c", command_line(submission).replace("--parsable", "--test-only"), timeout=30)
    if tried.returncode == 0:
        return []
    words = " ".join(line.replace("sbatch: error: ", "").strip() for line in tried.stderr.splitlines())
    if re.search(r"contact slurm controller|Connection|DNS|timed out|configuration source|Socket", words, re.I):
        return [UNREACHABLE.format(words)]
    file = f"slurm/{submission.stage}.sbatch"
    asked = f"{submission.nodes} nodes" + (f" with {submission.gpus} GPUs each" if submission.stage in TRAINED else "")
    mend = {
        "account": f"SBATCH_ACCOUNT={site.get('SBATCH_ACCOUNT', '')} of {SITE} or your shell",
        "partition": f"SBATCH_PARTITION={site.get('SBATCH_PARTITION', '')} of {SITE} or your shell; sinfo -s lists them",
        "qos": f"SBATCH_QOS={site.get('SBATCH_QOS', '')} of {SITE} or your shell",
        "configuration|node count": f"{asked} and what {file} asks for; sinfo -o '%P %D %c %m %G' shows what there is",
    }
    hint = next((text for pattern, text in mend.items() if re.search(pattern, words, re.I)), f"{file}, {SITE}")
    return [f"Slurm refuses {submission.stage}: {words} ({hint})"]


# --- submission ------------------------------------------------------------------------------------------------------


def command_line(submission, after: str = "") -> str:
    """The line that submits the stage, pasted into a shell in the repository. `after`: a job that must have
    succeeded."""
    run, folder = submission.directory.parent.name, relative(submission.directory)
    words = [f"--job-name={run}-{submission.stage}", f"--output={folder.replace('%', '%%')}/logs/slurm-%j.log"]
    words += [f"--nodes={submission.nodes}"]
    words += [f"--gpus-per-node={submission.gpus}"] if submission.stage in TRAINED else []
    line = shlex.join(words)
    if after:
        line += f" --dependency=afterok:{after} --kill-on-invalid-dep=yes"
    script = shlex.join([f"slurm/{submission.stage}.sbatch", folder])
    return f'(set -a; . {SITE} >&2; sbatch --parsable --chdir="$PWD" {line} {script})'


def show(submission, after: str = "") -> str:
    """The line, its job's id in a variable for the stages after it; in comments what site.env and the shell add to it,
    and what slurm/run.sh will start on each node."""
    line = command_line(submission, after)
    told = [f"{k}={shlex.quote(v)}" for k, v in sorted(read_site().items()) if v and re.match("(SBATCH|RELAY|NCCL|GLOO|FI)_", k)]
    started = ask("bash", "slurm/run.sh", relative(submission.directory), env={**os.environ, "DRY_RUN": "1"})
    # So that make finds the job while it waits; ":?": a script ends where sbatch refused.
    content, file = '{"cluster": "slurm", "job": "%s", "submitted": %s}\\n', relative(submission.directory / "job.json")
    job = f"""printf '{content}' "${{{submission.stage}:?}}" "$(date +%s)" > {shlex.quote(file)}"""
    return f"{submission.stage}=${line}\n{job}\n# with {' '.join(told)}\n# on each node: {started.stdout.strip()}"


def submit(submission, after: str = "") -> int:
    """Queue the stage and return. Raises InputError if Slurm refuses."""
    (submission.directory / "logs").mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("ARGS", "DRY_RUN", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = ask("bash", "-c", command_line(submission, after), env=environment, timeout=60)
    if done.returncode:
        raise InputError(f"sbatch refuses {submission.stage}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    if not job.isdigit():
        raise InputError(f"sbatch says {done.stdout.strip()!r}, which is no job's id; look with squeue")
    write_atomic(
        submission.directory / "job.json",
        dump_json({"cluster": "slurm", "name": cluster_name(), "job": job, "submitted": time.time()}),
    )
    waits = f", after job {after}" if after else ""
    print(f"{submission.stage}: job {job}{waits}; make status RUN={submission.directory.parent.name}", flush=True)
    return DONE


# --- what the queue says ---------------------------------------------------------------------------------------------


def look(run: str) -> dict[str, Job]:
    """The run's stages that have a job, and what the queue says of each. An attempt whose job has left the
    queue, or waits in it again, is recorded as ended: squeue forgets, the run directory does not.

    Needs no accounting database. Raises InputError if Slurm does not answer.
    """
    known = {s: j for s in STAGES if (j := _job_of(stage_dir(run, s)))}
    if not known:
        return {}
    before = {s: attempts.running(stage_dir(run, s)) for s in known}  # an attempt that begins after squeue was asked is alive
    try:
        queue, name = _queue(*(job for _, job in known.values())), cluster_name()
    except InputError:
        if all(layout.record(stage_dir(run, s)) for s in known):
            return {}  # there is nothing that only the queue knows
        raise
    found = {}
    for stage, (cluster, job) in known.items():
        directory, cluster = stage_dir(run, stage), cluster or name
        if cluster != name:
            found[stage] = Job("slurm", job, "", f"job {job} of cluster {cluster}, this is {name}")
            continue
        row = queue.get(job)
        attempt = attempts.running(directory)
        if attempt and attempt == before[stage] and attempt["job"] == f"{cluster}:{job}" and (not row or row["state"] == "PENDING"):
            why = "waits in the queue again" if row else "has left the queue: cancelled, out of time or memory"
            attempts.bury(directory, attempt, f"job {job} {why}")
        if row:
            stages = {id_: s for s, (_, id_) in known.items()}
            waits = [stages.get(id_, f"job {id_}") for id_ in re.findall(r"\d+", row["after"])]
            found[stage] = _in_queue(job, {**row, "after": ", ".join(waits)})
        elif layout.record(directory) or attempts_of(directory, f"{cluster}:{job}"):
            found[stage] = Job("slurm", job, "", "")
        else:
            found[stage] = Job("slurm", job, *_why_gone(directory, job))
    return found


def attempts_of(directory: Path, job: str) -> list[dict]:
    """A job's attempts of a stage."""
    return [a for a in attempts.history(directory) if a.get("job") == job]


def _job_of(directory: Path) -> tuple[str, str] | None:
    """(cluster, job) of a stage: as submitted here ("" for the cluster where a dry run was pasted), or as the job itself
    wrote it where sbatch was called by hand."""
    written = read_json(directory / "job.json") or {}
    last = (attempts.history(directory) or [{}])[-1]
    if last.get("job", "").count(":") == 1 and last["started"] > written.get("submitted", 0):
        cluster, job = last["job"].split(":")
        return cluster, job
    return (written.get("name", ""), written["job"]) if written.get("cluster") == "slurm" else None


def _queue(*jobs: str) -> dict[str, dict]:
    """What squeue knows of these jobs, by id."""
    listed = ask("squeue", f"--jobs={','.join(jobs)}", "--noheader", "--format=%i|%T|%r|%D|%S|%E|%N")
    if listed.returncode and "Invalid job id" not in listed.stderr:  # said where it knows none of them
        raise InputError(UNREACHABLE.format(listed.stderr.strip()))
    names = ("id", "state", "reason", "nodes", "start", "after", "where")
    return {row["id"]: row for line in listed.stdout.splitlines() if (row := dict(zip(names, line.split("|"))))}


def _in_queue(job: str, row: dict[str, str]) -> Job:
    state = row["state"]
    if state == "PENDING":
        nodes = f"{row['nodes']} node" + ("s" if row["nodes"] != "1" else "")
        words = {**row, "nodes": nodes, "start": row["start"].replace("T", " ")}
        reason = row["reason"].split(",")[0].strip("()")
        if row["after"] and not reason.startswith("Dependency"):
            reason = "Dependency"  # until the scheduler has looked at it, a job says that it waits for resources
        return Job("slurm", job, "queued", f"job {job} " + REASONS.get(reason, f"waits: {reason}").format(**words))
    return Job("slurm", job, "running", f"job {job} on {row['where']}" + ("" if state == "RUNNING" else f", {state.lower()}"))


def _why_gone(directory: Path, job: str) -> tuple[str, str]:
    """(word, note) of a job that left the queue without an attempt. Slurm remembers it for a few minutes (MinJobAge)."""
    shown = ask("scontrol", "--oneliner", "show", "job", job).stdout
    state = (re.search(r"JobState=(\w+)", shown) or ["", ""])[1]
    logs = directory / "logs"
    if re.search(r"ExitCode=0:53", shown):  # slurmd's way to say that it could not open --output
        return "failed", f"job {job}: its node could not write {logs}; the run must be on a filesystem that all nodes share: RUNS="
    if re.search(r"ExitCode=(?!0:0)", shown) and (logs / f"slurm-{job}.log").exists():
        return state.lower(), f"job {job} ended before its stage began: {_last_words(logs / f'slurm-{job}.log')}"
    why = {"CANCELLED": "cancelled"}.get(state, f"cancelled, or a stage before it failed; or its node could not write {logs}")
    return "cancelled", f"job {job} left the queue before it began: {why}"


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error:")]  # srun's may come before it, and say less
    others = [line for line in lines if not re.match("srun: error: .* tasks? ", line)]
    said = ours or [line for line in others if re.search("error|FATAL|unrecognized option|not found", line)] or lines[-1:]
    return said[0] if said else str(log)


# --- the end ---------------------------------------------------------------------------------------------------------


def stop(directory: Path, save: bool) -> None:
    """Take the stage's job from the queue; if it runs, ask it to save and leave, or end it, and wait until it has gone."""
    cluster, job = _job_of(directory)
    name = f"{cluster or cluster_name()}:{job}"
    row = _queue(job).get(job)
    if row is None:
        return
    if save and row["state"] == "RUNNING" and attempts_of(directory, name):
        _must("scontrol", "update", f"JobId={job}", "Requeue=0")  # slurm/run.sh looks: 75 is then the end
        _must("scancel", "--signal=USR1", job)
    else:
        _must("scancel", job)
    while (row := _queue(job).get(job)) is not None:
        if row["state"] == "PENDING":  # it had been requeued a moment before
            _must("scancel", job)
        time.sleep(0.5)


def cluster_name() -> str:
    """ClusterName of slurm.conf: two clusters of one home directory count their jobs alike."""
    shown = ask("scontrol", "show", "config")
    found = re.search(r"^ClusterName\s*=\s*(\S+)", shown.stdout, re.M)
    if not found:
        raise InputError(UNREACHABLE.format(shown.stderr.strip() or socket.gethostname()))
    return found[1]


def _must(*words: str) -> None:
    done = ask(*words)
    if done.returncode and "already completed" not in done.stderr + done.stdout:
        raise InputError(f"{' '.join(words)}: {done.stderr.strip()}")
