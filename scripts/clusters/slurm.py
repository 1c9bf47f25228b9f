"""CLUSTER=slurm: sbatch, squeue, scontrol and scancel around the files of slurm/. What happens
inside the job is slurm/run.sh."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any, Optional

from scripts.clusters.commands import ask
from scripts.clusters.interface import (
    Cluster,
    Job,
    Started,
    child_environment,
    say_what_is_left_out,
)
from scripts.clusters.slurm_queue import UNREACHABLE, in_queue, queue, why_gone
from scripts.clusters.slurm_site import SITE, Site
from scripts.run import attempts, stages
from scripts.run.errors import InputError
from scripts.run.files import read_json, write_json
from scripts.run.layout import Run, finished, relative
from scripts.run.submission import Submission

# Seconds until a job that was asked to save is cancelled, and until a cancelled one is given up:
# Slurm itself kills its processes after KillWait, but not those of a node that does not answer.
SAVE_GRACE, CANCEL_GRACE = 600, 180


class Slurm(Cluster):
    """Queue stages on a Slurm cluster. Needs no accounting database."""

    name = "slurm"
    listens = "0.0.0.0"  # noqa: S104  reached by its node's address, with a key made for the run

    # --- before submission ---

    @functools.cached_property
    def site(self) -> Site:
        """Read site.env once."""
        return Site(self.environment)

    @functools.cached_property
    def cluster_name(self) -> str:
        """Return ClusterName of slurm.conf: two clusters of one home directory number their jobs
        alike. Raises InputError if Slurm does not answer."""
        shown = self._ask("scontrol", "show", "config")
        found = re.search(r"^ClusterName\s*=\s*(\S+)", shown.stdout, re.M)
        if not found:
            raise InputError(UNREACHABLE.format(shown.stderr.strip() or "scontrol says nothing"))
        return found[1]

    def problems(self, submission: Submission, dry_run: bool) -> list[str]:
        """List what keeps a stage out of the queue: site.env, its sbatch file, Slurm's opinion."""
        if self.site.problems:
            return self.site.problems
        found = self.site.time_problems(submission.row.name)
        if found or dry_run:
            return found
        found = self.site.image_problems() + self.site.secret_problems()
        if not shutil.which("sbatch", path=self.environment.get("PATH")):
            found.append("sbatch: not on PATH; CLUSTER=slurm needs a login node of the cluster")
        return found or self._refusal(submission)

    def _refusal(self, submission: Submission) -> list[str]:
        """Ask Slurm what it would say, by sbatch --test-only (20 ms)."""
        test = self._line(submission).replace("--parsable", "--test-only")
        tried = self._ask("bash", "-c", test)
        if tried.returncode == 0:
            return []
        lines = (line.replace("sbatch: error: ", "").strip() for line in tried.stderr.splitlines())
        words = " ".join(lines)
        lost = "contact slurm controller|Connection|DNS|timed out|configuration source|Socket"
        if re.search(lost, words, re.I):
            return [UNREACHABLE.format(words)]
        stage, file = submission.row.name, f"slurm/{submission.row.name}.sbatch"
        gpus = f" with {submission.gpus} GPUs each" if submission.row.ranks else ""
        shape = f"{submission.nodes} nodes{gpus} and what {file} asks for"
        mends = {
            "configuration|node count": f"{shape}; sinfo -o '%P %D %c %m %G' shows what there is"
        }
        for key in ("account", "partition", "qos"):
            variable = f"SBATCH_{key.upper()}"
            mends[key] = f"{variable}={self.site.get(variable)} of {SITE} or your shell"
        mends["partition"] += "; sinfo -s lists them"
        order = ("account", "partition", "qos", "configuration|node count")
        hint = next((mends[key] for key in order if re.search(key, words, re.I)), f"{file}, {SITE}")
        return [f"Slurm refuses {stage}: {words} ({hint})"]

    # --- submission ---

    def _line(self, submission: Submission, after: str = "") -> str:
        """Format the line that submits a stage, to be run by a shell in the repository."""
        name, folder = submission.row.name, relative(submission.directory)
        output = f"{folder.replace('%', '%%')}/logs/slurm-%j.log"
        words = [f"--job-name={submission.run.name}-{name}", f"--output={output}"]
        words += [f"--nodes={submission.nodes}"]
        words += [f"--gpus-per-node={submission.gpus}"] if submission.row.ranks else []
        options = shlex.join(words)
        if after:
            options += f" --dependency=afterok:{after} --kill-on-invalid-dep=yes"
        script = shlex.join([f"slurm/{name}.sbatch", folder])
        sbatch = f'sbatch --parsable --chdir="$PWD" {options} {script}'
        return f"(set -a; . {SITE} >&2; {sbatch})"

    def render(self, submission: Submission, after: str = "") -> str:
        """Format the line, the job's id in a variable for the stages after it; in comments what
        site.env and the shell add to it, and what slurm/run.sh will start on each node."""
        name = submission.row.module  # a shell's variable may have no -
        file = shlex.quote(relative(submission.directory / "job.json"))
        # So that make finds the job while it waits; ":?" ends a script where sbatch refused.
        content = '{"cluster": "slurm", "job": "%s", "submitted": %s}\\n'
        job = f"""printf '{content}' "${{{name}:?}}" "$(date +%s)" > {file}"""
        dry = {**self.environment, "DRY_RUN": "1"}
        words = ("bash", "slurm/run.sh", relative(submission.directory))
        started = ask(*words, environment=dry).stdout.strip()
        line = self._line(submission, after)
        return f"{name}=${line}\n{job}\n# with {self.site.told()}\n# on each node: {started}"

    def submit(self, submission: Submission, after: str = "") -> Started:
        """Queue the stage and return its job. Raises InputError if Slurm refuses."""
        line = self._line(submission, after)
        submission.write(line)
        say_what_is_left_out(self.environment)
        (submission.directory / "logs").mkdir(exist_ok=True)
        done = self._ask("bash", "-c", line, timeout=60)
        if done.returncode:
            raise InputError(f"sbatch refuses {submission.row.name}: {done.stderr.strip()}")
        job = done.stdout.strip().split(";")[0]
        if not job.isdigit():
            said = f"{done.stdout.strip()!r}, which is no job's id"
            raise InputError(f"sbatch says {said}; look with squeue")
        content = {"cluster": "slurm", "name": self.cluster_name, "job": job}
        write_json(submission.directory / "job.json", {**content, "submitted": time.time()})
        waits = f", after job {after}" if after else ""
        see = f"make status RUN={submission.run.name}"
        print(f"{submission.row.name}: job {job}{waits}; {see}", flush=True)
        return Started(0, job)

    # --- afterwards ---

    def jobs(self, run: Run) -> dict[str, Job]:
        """Ask squeue once for all jobs of the run."""
        known = {s: j for s in stages.names() if (j := _job_of(run.stage(s)))}
        if not known:
            return {}
        # Read before squeue is asked: an attempt that begins after that is alive.
        running = {stage: attempts.running(run.stage(stage)) for stage in known}
        try:
            rows, name = self._queue(*(job for _, job in known.values())), self.cluster_name
        except InputError:
            if all(finished(run.stage(stage)) for stage in known):
                return {}  # there is nothing that only the queue knows
            raise
        of = {job: stage for stage, (_, job) in known.items()}
        found = {}
        for stage, (cluster, job) in known.items():
            cluster = cluster or name
            if cluster != name:
                note = f"job {job} of cluster {cluster}, this is {name}"
                found[stage] = Job("slurm", job, "", note)
            else:
                row = rows.get(job)
                found[stage] = self._job(run.stage(stage), job, row, of)
                found[stage] = _with_lost(found[stage], running[stage], f"{name}:{job}", row)
        return found

    def _job(
        self, directory: Path, job: str, row: Optional[dict[str, str]], of: dict[str, str]
    ) -> Job:
        if row:
            waits = [of.get(id_, f"job {id_}") for id_ in re.findall(r"\d+", row["after"])]
            return in_queue(job, {**row, "after": ", ".join(waits)})
        if finished(directory) or _attempts_of(directory, f"{self.cluster_name}:{job}"):
            return Job("slurm", job, "", "")
        return Job("slurm", job, *why_gone(directory, job, self.environment))

    def stop(self, directory: Path, save: bool) -> None:
        """Take the stage's job from the queue; if it runs, ask it to save and leave, or cancel it.
        What does not leave in time is cancelled."""
        found = _job_of(directory)
        if found is None:
            return
        cluster, job = found
        row = self._queue(job).get(job)
        if row is None:
            return
        began = bool(_attempts_of(directory, f"{cluster or self.cluster_name}:{job}"))
        if save and row["state"] == "RUNNING" and began:
            # slurm/run.sh looks at it: exit code 75 is then the end.
            self._must("scontrol", "update", f"JobId={job}", "Requeue=0")
            self._must("scancel", "--signal=USR1", job)
            if self._wait_until_gone(job, SAVE_GRACE):
                return
            print(f"{directory.name}: did not leave in {SAVE_GRACE} s: cancelled", flush=True)
        self._must("scancel", job)
        if not self._wait_until_gone(job, CANCEL_GRACE):
            see = f"scontrol show job {job} names its nodes"
            raise InputError(f"job {job} is cancelled, but has not left the queue; {see}")

    def _wait_until_gone(self, job: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (row := self._queue(job).get(job)) is not None:
            if row["state"] == "PENDING":  # it had been requeued a moment before
                self._must("scancel", job)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def _queue(self, *jobs: str) -> dict[str, dict[str, str]]:
        return queue(*jobs, environment=self.environment)

    def _ask(self, *words: str, timeout: float = 30) -> Any:
        return ask(*words, environment=child_environment(self.environment), timeout=timeout)

    def _must(self, *words: str) -> None:
        done = self._ask(*words)
        if done.returncode and "already completed" not in done.stderr + done.stdout:
            raise InputError(f"{' '.join(words)}: {done.stderr.strip()}")


def _job_of(directory: Path) -> Optional[tuple[str, str]]:
    """Return (cluster, job) of a stage: as it was submitted ("" for the cluster where a dry run was
    pasted), or as the job itself wrote it where sbatch was called by hand."""
    written = read_json(directory / "job.json") or {}
    last = (attempts.history(directory) or [{}])[-1]
    ours = re.fullmatch(r"[^:]+:\d+", last.get("job", ""))  # Kubernetes' are no numbers
    if ours and last["started"] > written.get("submitted", 0):
        cluster, _, job = last["job"].partition(":")
        return cluster, job
    return (written.get("name", ""), written["job"]) if written.get("cluster") == "slurm" else None


def _attempts_of(directory: Path, job: str) -> list[dict[str, Any]]:
    return [a for a in attempts.history(directory) if a.get("job") == job]


def _with_lost(
    found: Job, attempt: Optional[dict[str, Any]], job: str, row: Optional[dict[str, str]]
) -> Job:
    """Mark the attempt that ran before squeue was asked as lost, if its job is gone or waits."""
    if not attempt or attempt["job"] != job or (row and row["state"] != "PENDING"):
        return found
    why = (
        "waits in the queue again"
        if row
        else "has left the queue: cancelled, out of time or memory"
    )
    return found._replace(lost=attempt, why=f"job {found.id} {why}")
