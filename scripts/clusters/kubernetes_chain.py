"""The stages of a run that wait on the cluster for the one before them, and the conductor, a Job
that creates each when its time has come, and looks after those that run (scripts/conductor.py)."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from scripts.clusters.kubectl import Kubectl, in_words
from scripts.clusters.kubernetes_pods import Pods
from scripts.clusters.kubernetes_text import VOLUME
from scripts.run.errors import InputError
from scripts.run.files import write_atomic
from scripts.run.layout import ROOT, Run, relative
from scripts.run.submission import Submission

FOLDER = "waits"  # of a stage's folder here: what waits, as kubectl takes it
CONDUCTOR = "conductor"  # of a run's folder here


def ended(job: dict[str, Any]) -> str:
    """Return why a Job has ended, "" while it has not."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition.get("message") or condition["type"])
    return ""


def last_words(items: list[dict[str, Any]]) -> str:
    """Return why a run's conductor has given up, by its pods among these objects; "" if it has
    not."""
    of = {"app.kubernetes.io/component": CONDUCTOR, "torch-relay/stage": None}
    pods = [
        item
        for item in items
        if item["kind"] == "Pod"
        and all(item["metadata"]["labels"].get(key) == value for key, value in of.items())
    ]
    return Pods(pods).last_words.removeprefix("error: ")


def _waits(submission: Submission, after: str) -> str:
    """Format what waits: a ConfigMap that holds the stage's objects, to be created after a job."""
    run, stage = submission.run.name, submission.row.name
    # A dry run names the job as Slurm's would be, by a variable of the shell.
    before = after[1:].replace("_", "-") if after[:1] == "$" else after[len(run) + 1 :]
    labels = f"torch-relay/run: '{run}', torch-relay/stage: {stage}, torch-relay/waits: 'true'"
    up = os.path.relpath(ROOT / "kubernetes", (submission.directory / FOLDER).resolve())
    return f"""\
configMapGenerator:
  - name: {run}-{stage}-waits
    files: [stage.yaml]
    options:
      disableNameSuffixHash: true
      labels: {{{labels}}}
      annotations: {{torch-relay/after: {before}}}
components: [{up}/site]
"""


def _conductor(run: Run) -> str:
    """Format the kustomization of a run's conductor."""
    up = os.path.relpath(ROOT / "kubernetes", (run.directory / CONDUCTOR).resolve())
    label = "labels/torch-relay~1run"
    return f"""\
resources: [{up}/conductor]
patches:
  - target: {{kind: Job}}
    patch: |-
      - {{op: replace, path: /metadata/name, value: {run.name}-conductor}}
      - {{op: replace, path: /metadata/{label}, value: '{run.name}'}}
      - {{op: replace, path: /spec/template/metadata/{label}, value: '{run.name}'}}
      - op: replace
        path: /spec/template/spec/containers/0/args/0
        value: {VOLUME}/{run.name}
components: [{up}/site]
"""


def create(directory: Path) -> str:
    """Format the command that creates a stage's objects."""
    return f"kubectl create -k {shlex.quote(relative(directory))}"


def lines(submission: Submission, after: str) -> str:
    """Format the commands that create a stage, or make it wait for a job, and start the run's
    conductor, for a shell in the repository."""
    stage = shlex.quote(relative(submission.directory))
    folder = shlex.quote(relative(submission.directory / FOLDER))
    conductor = shlex.quote(relative(submission.run.directory / CONDUCTOR))
    waits = f"""\
mkdir -p {folder}
cat > {folder}/kustomization.yaml << 'EOF'
{_waits(submission, after)}EOF
kubectl kustomize {stage} > {folder}/stage.yaml
kubectl create -k {folder}"""
    return f"""\
{waits if after else create(submission.directory)}
mkdir -p {conductor}
cat > {conductor}/kustomization.yaml << 'EOF'
{_conductor(submission.run)}EOF
kubectl create -k {conductor} || : # one conducts the run already"""


class Chain:
    """Add stages to those of a run that wait, and take them away."""

    def __init__(self, kubectl: Kubectl):
        self.kubectl = kubectl

    def add(self, submission: Submission, after: str) -> None:
        """Make a stage wait for a job. Raises InputError if it waits already, or is refused."""
        folder = submission.directory / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        stage = self.kubectl.must("kustomize", relative(submission.directory))
        write_atomic(folder / "stage.yaml", stage)
        write_atomic(folder / "kustomization.yaml", _waits(submission, after))
        if not self._at_work(submission.run):  # left by a client, or a conductor, that was killed
            self.take(submission.run, submission.row.name)
        self._create(folder, f"{submission.run.name}-{submission.row.name}")
        self.conduct(submission.run)

    def conduct(self, run: Run) -> None:
        """Start a run's conductor, unless one is at work; that one cannot leave unasked any more:
        it deletes its Job as it has read it, and this changes it."""
        folder, name = run.directory / CONDUCTOR, f"{run.name}-{CONDUCTOR}"
        asked = f"torch-relay/asked={time.time_ns()}"
        done = self.kubectl.call("annotate", "job", name, asked, "--overwrite", "-o", "json")
        if done.returncode and "not found" not in done.stderr.lower():
            raise InputError(f"job {name}: {in_words(done.stderr)}")
        there = json.loads(done.stdout) if not done.returncode else {}
        if there and not ended(there) and "deletionTimestamp" not in there["metadata"]:
            return
        words = ("delete", "job", name, "--cascade=foreground", "--ignore-not-found")
        self.kubectl.must(*words)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "kustomization.yaml", _conductor(run))
        done = self.kubectl.call("create", "-k", relative(folder), timeout=60)
        if done.returncode and "already exists" not in done.stderr:  # made by another client
            raise InputError(f"the API server refuses {name}: {in_words(done.stderr)}")

    def _at_work(self, run: Run) -> bool:
        there = self.kubectl.get("job", f"{run.name}-{CONDUCTOR}")
        return bool(there and not ended(there))

    def _create(self, folder: Path, name: str) -> None:
        done = self.kubectl.call("create", "-k", relative(folder), timeout=60)
        if done.returncode and "already exists" in done.stderr:
            raise InputError(f"{name}: submitted already, by another client; make status")
        if done.returncode:
            raise InputError(f"the API server refuses {name}: {in_words(done.stderr)}")

    def take(self, run: Run, stage: str) -> None:
        """Take a stage away from those that wait, if it is among them."""
        name = f"{run.name}-{stage}-waits"
        self.kubectl.must("delete", "configmap", name, "--ignore-not-found")
