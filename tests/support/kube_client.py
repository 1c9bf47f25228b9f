"""A user of the tests' Kubernetes: the launcher in a checkout of its own, which does not see the
volume, and what its runs and pods say."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from tests.support.kube_lab import IMAGE, KUBE
from tests.support.launching import launch
from tests.support.runs import ROOT
from tests.support.waiting import until

SPACE = "relay-stages"
LONG = 900  # seconds for what takes one minute alone: another lane may have both cores
# Which of the addresses that it is given take a connection; run by a pod.
CONNECT = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
def taken(address):
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3)
    except OSError:
        return False
    return True
with ThreadPoolExecutor() as pool:
    print(*[a for a, t in zip(sys.argv[1:], pool.map(taken, sys.argv[1:])) if t])
"""


def pods(cluster, namespace):
    """Return what a namespace's pods say, for a failure."""
    asked = ["get pods -o wide", "get events", "logs -l app --prefix --tail=80 --ignore-errors"]
    return "\n\n".join(cluster.kubectl("-n", namespace, *words.split()) for words in asked)


class Client:
    """The launcher in a checkout whose kubernetes/site is edited, on a machine without volume."""

    def __init__(self, cluster, folder, space=SPACE):
        self.cluster, self.folder, self.space, self.config = cluster, folder, space, {}
        for name in ("configs", "kubernetes", "scripts"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        self.site()

    def site(self, image=IMAGE, components=("cpu",), storage="shared", modes="ReadWriteMany"):
        """Edit the site's files, as whoever adapts them would."""
        image, _, tag = image.rpartition(":")
        for name, *changes in (
            ("namespace/kustomization.yaml", ("torch-relay #", f"{self.space} #")),
            ("once/volume.yaml", ("fsx-lustre", storage), ("ReadWriteMany", modes)),
            (
                "kustomization.yaml",
                ("registry.example/torch-relay", image),
                ('newTag: "1"', f'newTag: "{tag}"'),
                *((f"# - ../components/{c}\n", f"- ../components/{c}\n") for c in components),
            ),
        ):
            text = (ROOT / "kubernetes/site" / name).read_text()
            for old, new in changes:
                assert text.count(old) == 1, f"{name}: {old}"
                text = text.replace(old, new)
            (self.folder / "kubernetes/site" / name).write_text(text)

    def launch(self, verb, **options):
        given = {"HOME": os.environ["HOME"], "CLUSTER": "k8s", **self.cluster.environment}
        return launch(verb, checkout=self.folder, environment={**given, **self.config, **options})

    def become_user(self):
        """Go on as somebody who has the rights of the Role relay-user alone."""
        kubectl, file = self.cluster.kubectl, self.folder / "kubeconfig"
        shutil.copyfile(self.cluster.environment["KUBECONFIG"], file)
        file.chmod(0o600)
        kubectl("-n", self.space, "create", "serviceaccount", "somebody")
        role = ["--role=relay-user", f"--serviceaccount={self.space}:somebody"]
        kubectl("-n", self.space, "create", "rolebinding", "somebody", *role)
        token = kubectl("-n", self.space, "create", "token", "somebody", "--duration=5h")
        config = ["config", "--kubeconfig", str(file)]
        kubectl(*config, "set-credentials", "somebody", f"--token={token}")
        kubectl(*config, "set-context", "--current", "--user=somebody")
        self.config = {"KUBECONFIG": str(file)}

    def must(self, verb, **options):
        done = self.launch(verb, **options)
        assert done.returncode == 0, f"{verb} {options}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def line(self, run, stage):
        table = self.must("status", RUN=run)
        return next(line for line in table.splitlines() if line.startswith(stage))

    def ended(self, run, stage):
        """Wait until a stage neither waits nor runs; return its line of make status."""
        wait = "queued|running|starting|submitted"
        until(lambda: not re.search(wait, self.line(run, stage)), LONG, lambda: self.said(run))
        return self.line(run, stage)

    def steps(self, run, least):
        """Wait until pretrain has come so far."""
        until(lambda: self.read(run).get("step", 0) >= least, LONG, lambda: self.said(run))

    def pods(self, run):
        """Return {index: pod} of a run, the newest of an index."""
        label = f"torch-relay/run={run},torch-relay/stage"  # the conductor has no index
        asked = ["-n", SPACE, "get", "pods", "-l", label, "-o", "json"]
        items = json.loads(self.cluster.kubectl(*asked))["items"]
        items.sort(key=lambda pod: pod["metadata"]["creationTimestamp"])
        index = "batch.kubernetes.io/job-completion-index"
        return {int(pod["metadata"]["labels"][index]): pod for pod in items}

    def probe(self, name, labels=None, space=None):
        """Make a pod that waits; its labels decide whom it may speak to."""
        at = ["-n", space or self.space]
        text = (
            (KUBE / "probe.yaml")
            .read_text()
            .replace("NAME", name)
            .replace("LABELS", json.dumps(labels or {}))
        )
        self.cluster.kubectl(*at, "apply", "-f", "-", input=text)
        self.cluster.kubectl(*at, "wait", "--for=condition=Ready", f"pod/{name}", "--timeout=300s")

    def reached(self, name, addresses, space=None):
        """Return the addresses where a connection of a probe's is taken."""
        words = ["python3", "-c", CONNECT, *addresses]
        return self.cluster.kubectl("-n", space or self.space, "exec", name, "--", *words).split()

    def called(self, run):
        """Return what node 0 has called, and in which attempt."""
        said = self.read(run, "attempts/call.json") or {}
        return said.get("state"), said.get("attempt")

    def scripts(self, run):
        """Return {process: environment} of a run's stage scripts, on any node."""
        found = {}
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                said = file.read_text().split("\0")
                env = dict(
                    word.partition("=")[::2]
                    for word in (file.parent / "environ").read_text().split("\0")
                )
                script = said[1:3] == ["-m", "scripts.pretrain"] and "RANK" not in env
                if script and f"/runs/{run}/pretrain" in said:
                    found[int(file.parent.name)] = env
        return found

    def kill(self, run, index):
        """Kill the stage script of a pod, as the kernel does where memory is short."""
        for pid, env in self.scripts(run).items():
            if env["PET_NODE_RANK"] == str(index):
                os.kill(pid, 9)

    def said(self, run):
        """What there is to say of a run, for a failure."""
        table = self.launch("status", RUN=run).stdout
        return table + pods(self.cluster, SPACE)

    def texts(self, run, pattern):
        self.must("status", RUN=run)
        found = sorted((self.folder / "runs" / run / "pretrain").glob(pattern))
        return [file.read_text() for file in found]

    def read(self, run, name="progress.json"):
        self.must("status", RUN=run)
        file = self.folder / "runs" / run / "pretrain" / name
        return json.loads(file.read_text()) if file.exists() else {}
