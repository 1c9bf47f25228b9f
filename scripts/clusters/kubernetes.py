"""CLUSTER=k8s: kubectl around the files of kubernetes/. A stage is one Job, `<run>-<stage>`; its
name is the lock. The runs are on a volume that this machine need not see: RUNS here holds what was
submitted and a copy of the run's small files, which a pod of the site, the desk, reads."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from scripts.clusters.interface import Cluster, Job, Started
from scripts.clusters.kubectl import Kubectl, in_words
from scripts.clusters.kubernetes_pods import Pods
from scripts.run import attempts, stages
from scripts.run.errors import InputError
from scripts.run.files import read_json, write_atomic, write_json
from scripts.run.layout import ROOT, Run, finished, relative
from scripts.run.submission import Submission, as_key

VOLUME = "/runs"  # where pods see the runs
COPY = "k8s.json"  # in a run's folder here: it is a copy, of which namespace
OURS = ("job.json", "kustomization.yaml", ".lock")  # of a stage's folder here, not on the volume
OTHER = "choose another RUN, or another RUNS"
MOST_BYTES = 1 << 20  # of a ConfigMap (1 MiB, API server)
SAVE_GRACE, CANCEL_GRACE = 600, 60  # seconds


class Kubernetes(Cluster):
    """Create stages as Jobs in a namespace. Needs kubectl, a context, and kubernetes/site."""

    name = "k8s"
    listens = "0.0.0.0"  # noqa: S104  in its pod; a NetworkPolicy and a key stand before it
    sees_runs = False

    def __init__(self, environment: Mapping[str, str]):
        super().__init__(environment)
        self._asked: list[str] = []  # stages, of this command

    @functools.cached_property
    def kubectl(self) -> Kubectl:
        """Call kubectl in the site's namespace."""
        return Kubectl(self.environment)

    def problems(self, submission: Submission, dry_run: bool) -> list[str]:
        """List what keeps a stage out of the cluster: what is not built yet, the submission's size,
        and, asked of the API server in one dry run, whatever it refuses."""
        row, found = submission.row, []
        if row.serves or row.alone:
            found.append(f"{row.name}: not yet with CLUSTER={self.name}; local and slurm have it")
        if submission.nodes > 1:
            found.append(f"NODES={submission.nodes}: CLUSTER={self.name} has one node for now")
        others = [name for name in self._asked if name != row.name]
        self._asked.append(row.name)
        if others:
            first = f"make {others[0]} CLUSTER={self.name} RUN={submission.run.name}"
            found.append(f"{row.name}: one stage a command for now; first {first}")
        for fact in ("DATA", "FROM"):
            path = submission.facts.get(fact, "")
            if path.startswith("/") and not path.startswith(f"{VOLUME}/"):
                found.append(f"{fact}={path}: pods see {VOLUME} alone; put it on that volume")
        size = sum(len(text.encode()) for text in submission.files.values())
        if size > MOST_BYTES:
            found.append(f"{row.name}: the submission has {size:,} bytes, {MOST_BYTES:,} may be")
        if found or dry_run:
            self.kubectl.namespace  # noqa: B018  what the site's file lacks is said in a dry run, too
            return found
        if not shutil.which("kubectl", path=self.environment.get("PATH")):
            return ["kubectl: not on PATH; https://kubernetes.io/docs/tasks/tools/ installs it"]
        return self._refusal(submission)

    def _refusal(self, submission: Submission) -> list[str]:
        """Ask the API server what it would say: a field, a quota, a right that lacks."""
        with tempfile.TemporaryDirectory() as folder:
            for name, text in submission.files.items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
            asked = self._kustomization(submission, Path(folder))
            Path(folder, "kustomization.yaml").write_text(asked, encoding="utf-8")
            done = self.kubectl.call("create", "--dry-run=server", "-k", folder)
        lines = [line for line in done.stderr.splitlines() if "already exists" not in line]
        said = in_words("\n".join(lines)) if done.returncode else ""
        return [f"the API server refuses {submission.row.name}: {said}"] if said else []

    # --- submission ---

    def _folder(self, submission: Submission) -> str:
        return relative(submission.directory)

    def _kustomization(self, submission: Submission, folder: Optional[Path] = None) -> str:
        """Format what is submitted, to lie in a folder (default: the stage's): the stage's files,
        and what the run says of it."""
        row = submission.row
        up = os.path.relpath(ROOT / "kubernetes", (folder or submission.directory).resolve())
        job = f"{submission.run.name}-{row.name}"
        facts = {
            "JOB": job,
            "RUN": submission.run.name,
            "DIRECTORY": f"{VOLUME}/{submission.run.name}/{row.name}",
            "NODES": submission.nodes,
            "GPUS": submission.gpus,
        }
        keys = [(as_key(name), name) for name in submission.files]
        lines = [
            f"# kubectl create -k {self._folder(submission)}",
            f"resources: [{up}/{row.name}]",
            "configMapGenerator:",
            "  - name: facts # for kustomize alone: not sent",
            "    options: {annotations: {config.kubernetes.io/local-config: 'true'}}",
            "    literals:",
            *(f"      - {key}={value}" for key, value in facts.items()),
            f"  - name: {job}",
            "    files:",
            *(f"      - {key if key == name else f'{key}={name}'}" for key, name in keys),
            f"components: [{up}/base/facts, {up}/site]",
        ]
        return "\n".join(lines) + "\n"

    def render(self, submission: Submission, after: str = "") -> str:
        """Format the kustomization that is written beside the stage's files, and the command."""
        file = shlex.quote(relative(submission.directory / "kustomization.yaml"))
        written = f"cat > {file} << 'EOF'\n{self._kustomization(submission)}EOF"
        return f"{written}\n{self._line(submission)}"

    def _line(self, submission: Submission) -> str:
        return f"kubectl create -k {shlex.quote(self._folder(submission))}"

    def submit(self, submission: Submission, after: str = "") -> Started:
        """Create the Job. Raises InputError if the API server refuses it, or has one of its name
        that has not ended."""
        directory, job = submission.directory, f"{submission.run.name}-{submission.row.name}"
        old = self.kubectl.get("job", job)
        if old and not _ended(old):
            raise InputError(f"job {job}: submitted already; make status RUN={submission.run.name}")
        if old:
            self.kubectl.must("delete", "job", job, "--cascade=foreground", "--wait=true")
        self._mark_as_copy(submission.run)
        submission.write(self._line(submission))
        write_atomic(directory / "kustomization.yaml", self._kustomization(submission))
        done = self.kubectl.call("create", "-k", self._folder(submission), timeout=60)
        made = self.kubectl.get("job", job)
        wrong = [line for line in done.stderr.splitlines() if not _is_repeated_map(line)]
        if made is None or (done.returncode and wrong):
            said = in_words("\n".join(wrong)) or "no job of that name was made"
            raise InputError(f"the API server refuses {job}: {said}")
        self._own_maps(job, made)
        content = {"cluster": self.name, "job": job, "uid": made["metadata"]["uid"]}
        write_json(directory / "job.json", {**content, "submitted": time.time()})
        see = f"make status RUN={submission.run.name}"
        print(f"{submission.row.name}: job {job}; {see}", flush=True)
        return Started(0, job)

    def _own_maps(self, job: str, made: dict[str, Any]) -> None:
        """Let the submission go with its Job."""
        spec = made["spec"]["template"]["spec"]
        maps = [v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job}
        owner["uid"] = made["metadata"]["uid"]
        patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
        for name in maps:
            self.kubectl.must("patch", "configmap", name, "--patch", patch)

    # --- afterwards ---

    def jobs(self, run: Run) -> dict[str, Job]:
        """Ask once for the run's Jobs and pods."""
        if not self._concerns(run):
            return {}
        shown = self.kubectl.must(
            "get", "jobs,pods", "-l", f"torch-relay/run={run.name}", "-o", "json"
        )
        items = json.loads(shown)["items"]
        found = {}
        for stage in stages.names():
            job = f"{run.name}-{stage}"
            of = [i for i in items if i["metadata"]["labels"].get("torch-relay/stage") == stage]
            there = next((i for i in of if i["kind"] == "Job"), None)
            attempt = attempts.running(run.stage(stage))
            if there:
                pods = Pods([i for i in of if i["kind"] == "Pod"])
                found[stage] = self._job(run.stage(stage), job, there, pods)
                if attempt and _ended(there):
                    why = f"job {job} has ended"
                    found[stage] = found[stage]._replace(lost=attempt, why=why)
            elif (read_json(run.stage(stage) / "job.json") or {}).get("cluster") == self.name:
                why, began = f"job {job} is gone: deleted", attempts.history(run.stage(stage))
                found[stage] = Job(self.name, job, "" if began else "cancelled", why)
                if began:
                    found[stage] = found[stage]._replace(note="", lost=attempt, why=why)
        return found

    def _job(self, directory: Path, job: str, made: dict[str, Any], pods: Pods) -> Job:
        ended = _ended(made)
        if finished(directory) or (ended and attempts.history(directory)):
            return Job(self.name, job, "", "")
        if ended:
            return Job(self.name, job, "failed", f"job {job}: {pods.last_words or ended}")
        if made["spec"].get("suspend"):
            return Job(self.name, job, "queued", f"job {job} is suspended: a queue admits it")
        if pods.running:
            return Job(self.name, job, "running", f"job {job} on {', '.join(pods.nodes)}")
        return Job(self.name, job, "queued", f"job {job}: {pods.waiting or 'waits for its pods'}")

    def _concerns(self, run: Run) -> bool:
        """Whether a run has anything here: as it was submitted, or as CLUSTER says. A dry run asks
        no cluster."""
        if self.environment.get("DRY_RUN", "0") not in ("", "0"):
            return False
        if self.environment.get("CLUSTER") == self.name:
            return bool(shutil.which("kubectl", path=self.environment.get("PATH")))
        return (run.directory / COPY).exists()

    def _mark_as_copy(self, run: Run) -> None:
        """Say that the run's folder here is a copy of this namespace's. Raises InputError if it is
        not: a copy replaces what is there, and models that were trained here would be lost."""
        known = read_json(run.directory / COPY)
        if known is None and any(attempts.history(run.stage(name)) for name in stages.names()):
            raise InputError(f"RUN={run.name}: ran on another cluster, in {run.directory}: {OTHER}")
        if known is not None and known["namespace"] != self.kubectl.namespace:
            said = f"is a copy of the one in namespace {known['namespace']}, this is"
            raise InputError(f"RUN={run.name}: {said} {self.kubectl.namespace}: {OTHER}")
        if known is None:
            run.directory.mkdir(parents=True, exist_ok=True)
            write_json(run.directory / COPY, {"namespace": self.kubectl.namespace})

    def fetch(self, run: Run) -> None:
        """Copy the run's small files from the volume, by the desk."""
        if not self._concerns(run):
            return
        told = json.loads(self.kubectl.volume("read", f"{VOLUME}/{run.name}"))
        if not told and not run.directory.exists():
            return
        self._mark_as_copy(run)
        for stage in stages.names():
            directory = run.stage(stage)
            if stage not in told and not attempts.history(directory):
                continue  # submitted, and not there yet
            for path in list(directory.iterdir()) if directory.is_dir() else []:
                if path.name not in OURS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            for name, text in told.get(stage, {}).items():
                path = directory / name
                if directory.resolve() not in path.resolve().parents:
                    raise InputError(f"{run.name}/{stage}: the volume names {name!r}")
                (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
                if not name.endswith("/"):
                    path.write_text(text, encoding="utf-8")

    def beside(self, run: Run, verb: str) -> Optional[tuple[int, str]]:
        """Run the image's own launcher in the desk."""
        if not self._concerns(run):
            return None
        variables = ("env", f"RUNS={VOLUME}", f"RUN={run.name}", "CLUSTER=local")
        done = self.kubectl.desk(*variables, "python3", "-m", "scripts.launch", verb)
        return done.returncode, done.stdout

    def remove(self, path: Path, run: Run) -> None:
        """Remove a run or a stage on the volume, and its Jobs, which have ended."""
        if not self._concerns(run):
            return
        self.kubectl.volume("remove", f"{VOLUME}/{path.resolve().relative_to(run.root.resolve())}")
        one = "" if path == run.directory else f",torch-relay/stage={path.name}"
        label = f"torch-relay/run={run.name}{one}"
        self.kubectl.must("delete", "jobs", "-l", label, "--wait=true")

    def stop(self, directory: Path, save: bool) -> None:
        """Delete the stage's Job: its pods get SIGTERM and save within their grace."""
        job = f"{directory.parent.name}-{directory.name}"
        named = f"batch.kubernetes.io/job-name={job}"
        if self.kubectl.get("job", job) is None:
            return
        self.kubectl.must("delete", "job", job, "--cascade=foreground", "--wait=false")
        if not save:
            self.kubectl.must("delete", "pods", "-l", named, "--grace-period=1", "--wait=false")
        deadline = time.monotonic() + (SAVE_GRACE if save else CANCEL_GRACE)
        while self.kubectl.get("job", job) is not None:
            if time.monotonic() > deadline:
                see = f"kubectl -n {self.kubectl.namespace} get pods -l {named}"
                raise InputError(f"job {job} is deleted, but its pods have not gone; {see}")
            time.sleep(0.5)


def _ended(job: dict[str, Any]) -> str:
    """Return why a Job has ended, "" while it has not."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition.get("message") or condition["type"])
    return ""


def _is_repeated_map(line: str) -> bool:
    """Whether kubectl says that the submission's ConfigMap is there: its name holds its digest."""
    return "configmaps" in line and "already exists" in line
