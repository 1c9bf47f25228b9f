"""A served model on Kubernetes: its objects as kustomize takes them, its key, its state, and a way
to it from this machine. The deploy stage's Job applies the objects (scripts/rollout.py)."""

from __future__ import annotations

import atexit
import base64
import os
import re
import secrets
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any, Optional

from scripts.clusters.kubectl import Kubectl, in_words
from scripts.clusters.kubernetes_text import VOLUME
from scripts.run.errors import InputError
from scripts.run.files import read_env
from scripts.run.layout import ROOT, from_fact, relative
from scripts.run.submission import SERVED, Submission

FOLDER = "serve"  # of the stage's folder here
TUNNEL_SECONDS = 15.0


def objects(submission: Submission, folder: Optional[Path] = None) -> str:
    """Format the kustomization of the service's objects, to lie in a folder below the stage's."""
    facts, run = submission.facts, submission.run.name
    up = os.path.relpath(ROOT / "kubernetes", (folder or submission.directory / FOLDER).resolve())
    told = {
        "SERVICE": facts["SERVICE"],
        "KEY": f"{facts['SERVICE']}-key",
        "RUN": run,
        "DIRECTORY": f"{VOLUME}/{run}/{submission.row.name}",
        "PORT": facts["PORT"],
    }
    literals = "".join(f"      - {key}={value}\n" for key, value in told.items())
    return f"""\
resources: [{up}/serve]
configMapGenerator:
  - name: facts
    options: {{annotations: {{config.kubernetes.io/local-config: 'true'}}}}
    literals:
{literals}components: [{up}/base/service-facts, {up}/site]
"""


def lines(submission: Submission, namespace: str) -> str:
    """Format the commands that make the objects and their key, for a shell in the repository."""
    folder = shlex.quote(relative(submission.directory / FOLDER))
    served = shlex.quote(relative(submission.directory / SERVED))
    key = f"{submission.facts['SERVICE']}-key"
    return f"""\
mkdir -p {folder}
cat > {folder}/kustomization.yaml << 'EOF'
{objects(submission)}EOF
kubectl kustomize {folder} > {served}
kubectl -n {namespace} get secret {key} > /dev/null 2>&1 || openssl rand -hex 24 |
  kubectl -n {namespace} create secret generic {key} --from-file=key=/dev/stdin"""


def problems(submission: Submission) -> list[str]:
    """List what can be seen without a cluster."""
    name = submission.facts["SERVICE"]
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", name) or name == "relay":
        rule = "a-z first, then a-z, 0-9 and -, 50 at most, not relay"
        return [f"SERVICE={name}: a Service's name has {rule}; for example SERVICE=chat"]
    return []


class Services:
    """Ask and change what serves in the namespace."""

    def __init__(self, kubectl: Kubectl):
        self.kubectl = kubectl
        self._tunnels: dict[str, str] = {}  # service: URL

    def refusal(self, submission: Submission, folder: Path, downtime: bool) -> list[str]:
        """Render the objects into a folder's serve.yaml, and say what keeps them out."""
        text, name = self.write(submission, folder), submission.facts["SERVICE"]
        found = []
        config = "".join(t for n, t in submission.files.items() if n.startswith("config."))
        timeout = re.search(r"^shutdown-timeout: *(\d+)", config, re.M)
        grace = re.search(r"terminationGracePeriodSeconds: *(\d+)", text)
        sleep = re.search(r"- sleep\n\s*- \"(\d+)\"", text)  # preStop
        if timeout and grace and sleep and int(timeout[1]) + int(sleep[1]) >= int(grace[1]):
            found.append(
                f"shutdown-timeout {timeout[1]} and preStop {sleep[1]} are not less than the grace"
                f" of {grace[1]} s: streams would be cut; kubernetes/serve/kustomization.yaml"
            )
        there = self.kubectl.get("deployment", name)
        if there and there["metadata"].get("labels", {}).get("torch-relay/service") != name:
            found.append(f"SERVICE={name}: a deployment of that name is not ours; choose another")
        alone = re.search(r"^  replicas: 1$", text, re.M) and re.search(r"maxSurge: 0$", text, re.M)
        if there and alone and not downtime:
            found.append(
                f"{name}: one replica, and no spare GPU for the new one (components/no-spare-gpu):"
                " it would be down until the new model answers; DOWNTIME=1 accepts that"
            )
        secret, shown = f"{name}-key", "go-template={{.data.key}}"
        key = self.kubectl.call("get", "secret", secret, "-o", shown)
        if key.returncode == 0 and key.stdout.strip() in ("", "<no value>"):
            delete = f"kubectl -n {self.kubectl.namespace} delete secret {secret}"
            found.append(f"secret {secret}: has no entry named key; {delete}, and it is made anew")
        words = ("apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f")
        done = self.kubectl.call(*words, str(folder / SERVED))
        if done.returncode and not found:
            found.append(f"the API server refuses {name}: {in_words(done.stderr)}")
        return found

    def write(self, submission: Submission, folder: Path) -> str:
        """Write the objects, as kustomize makes them, into a folder's serve.yaml; return them."""
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        text = objects(submission, folder / FOLDER)
        (folder / FOLDER / "kustomization.yaml").write_text(text, encoding="utf-8")
        made = self.kubectl.must("kustomize", str(folder / FOLDER))
        (folder / SERVED).write_text(made, encoding="utf-8")
        return made

    def make_key(self, submission: Submission) -> None:
        """Make the Secret with the API's key, unless there is one: the user's, or a new one."""
        facts = submission.facts
        name = f"{facts['SERVICE']}-key"
        if self.kubectl.call("get", "secret", name).returncode == 0:
            return
        key = secrets.token_hex(24)
        if "API_KEY_FILE" in facts:
            file = from_fact(facts["API_KEY_FILE"], submission.run.root)
            key = file.read_text(encoding="utf-8").strip()
        words = ("create", "secret", "generic", name, "--from-file=key=/dev/stdin")
        done = self.kubectl.call(*words, given=key.encode())  # not as a word: others see those
        if done.returncode and "already exists" not in done.stderr:
            raise InputError(f"secret {name}: {in_words(done.stderr)}")

    def key(self, service: str) -> str:
        """Return the key of a service. Raises InputError."""
        words = ("get", "secret", f"{service}-key", "-o", "go-template={{.data.key}}")
        return base64.b64decode(self.kubectl.must(*words)).decode().strip()

    def of(self, directory: Path) -> Optional[dict[str, Any]]:
        """Return the deployment that serves a run's model now, None if none does."""
        file = directory / "stage.env"
        service = read_env(file).get("SERVICE", "") if file.exists() else ""
        made = self.kubectl.get("deployment", service) if service else None
        labels = made["metadata"].get("labels", {}) if made else {}
        return made if labels.get("torch-relay/run") == directory.parent.name else None

    def state(self, directory: Path) -> str:
        """Return "serving", "loading", or "" where another run or none serves."""
        made = self.of(directory)
        if made is None:
            return ""
        return "serving" if made.get("status", {}).get("availableReplicas") else "loading"

    def url(self, directory: Path) -> str:
        """Return the URL in the cluster, "" where a run is not served."""
        made = self.of(directory)
        return f"http://{made['metadata']['name']}.{self.kubectl.namespace}" if made else ""

    def tunnel(self, directory: Path) -> str:
        """Open a way to a service from here, as long as this process lives; return its URL."""
        made = self.of(directory)
        if made is None or not made.get("status", {}).get("availableReplicas"):
            return ""
        name = made["metadata"]["name"]
        if name in self._tunnels:
            return self._tunnels[name]
        words = self.kubectl.words("port-forward", f"service/{name}", ":80")
        process = subprocess.Popen(
            words,
            env=self.kubectl.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        atexit.register(process.kill)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if not found:
            raise InputError(f"kubectl port-forward service/{name}: {line.strip()}")
        self._tunnels[name] = f"http://127.0.0.1:{found[1]}"
        return self._tunnels[name]

    def earlier(self, service: str) -> str:
        """Return the run that served before the one that serves now. Raises InputError."""
        made = self.kubectl.get("deployment", service)
        if made is None:
            raise InputError(f"SERVICE={service}: nothing serves under that name")
        run = made["metadata"].get("annotations", {}).get("torch-relay/before", "")
        if not run:
            now = made["metadata"]["labels"]["torch-relay/run"]
            raise InputError(f"SERVICE={service}: run {now} serves, and none did before it")
        return str(run)

    def end(self, directory: Path) -> None:
        """Take a run's service away. Nothing to do where another run serves by now."""
        made = self.of(directory)
        if made:
            label = f"torch-relay/service={made['metadata']['name']}"
            kinds = "deployments,services,poddisruptionbudgets"
            self.kubectl.must("delete", kinds, "-l", label, "--wait=true", "--cascade=foreground")

    def follow(self, job: str, ended: Any) -> int:
        """Show how a rollout goes until its Job has ended; return an exit code."""
        told = ""
        while True:
            made = self.kubectl.get("job", job)
            end = ended(made) if made else "job was deleted"
            if end:
                complete = bool(made and made["status"].get("succeeded"))
                return 0 if complete else 1
            label = f"batch.kubernetes.io/job-name={job}"
            said = self.kubectl.must("logs", "-l", label, "--tail=1", "--ignore-errors").strip()
            if said and said != told and not said.startswith("error: container"):
                told = said
                print(f"  {said}", flush=True)
            time.sleep(1)
