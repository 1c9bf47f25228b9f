"""kubectl in the site's namespace, its errors in words, and the desk, which reads the volume."""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, Optional

from scripts.clusters.commands import ask
from scripts.clusters.kubernetes_pods import Pods
from scripts.run.errors import InputError
from scripts.run.layout import ROOT

SITE = "kubernetes/site/namespace/kustomization.yaml"
DESK, IMAGE = "relay-desk", "torch-relay/image"  # its pod; an annotation, the site's image
CLAIM = "relay-runs"
QUEUES, WORKLOADS = "localqueues.kueue.x-k8s.io", "workloads.kueue.x-k8s.io"
WAIT, DESK_GRACE = 600, 180  # seconds: for a command that waits, for the desk's image
# What does not end by waiting, and the seconds after which that is believed.
HOPELESS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainer")
HOPELESS_GRACE = 10
NO_KUBELET = "error dialing backend"  # kubectl exec, where a node is lost; nothing was run then
MENDS = {  # what kubectl's first line says: how to mend it
    r"current-context|no configuration|context .* does not exist": "kubectl config use-context …",
    r"was refused|connection refused|no such host|timeout|unable to connect|no answer": (
        "is the cluster up, and is this the right context? kubectl config current-context"
    ),
    r"forbidden": "ask whoever owns the namespace for that verb",
}


def in_words(said: str) -> str:
    """Shorten what kubectl writes to stderr, with the mend where one is known."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"[EWI]\d{4} ", line)]  # its client's own log
    text = "; ".join(
        dict.fromkeys(
            re.sub(r"^(Error from server \(\w+\): |error: )?(error when creating \S+: )?", "", line)
            for line in lines[-3:]
        )
    )
    for pattern, mend in MENDS.items():
        if re.search(pattern, text, re.I):
            return f"{text}; {mend}"
    return text


class Kubectl:
    """Call kubectl with the user's environment, hence their context."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = environment

    @functools.cached_property
    def namespace(self) -> str:
        """Return the site's namespace. Raises InputError where its file names none."""
        try:
            text = (ROOT / SITE).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{SITE}: {error.strerror}; git checkout {SITE}") from None
        found = re.search(r"^namespace:\s*([a-z0-9-]+)", text, re.M)
        if not found:
            raise InputError(f"{SITE}: names no namespace; add the line namespace: torch-relay")
        return found[1]

    def volume(self, *words: str, given: bytes = b"") -> str:
        """Run a verb of scripts/volume.py in the desk, with `given` as its input; return what it
        prints. Raises InputError."""
        done = self.desk("python3", "-m", "scripts.volume", *words, given=given)
        if "No module named 'scripts'" in done.stderr:
            mend = "make image builds ours, make image-push pushes it; kubernetes/site"
            raise InputError(f"{self._image}: an image without this repository's scripts; {mend}")
        if done.returncode:
            raise InputError(f"the desk: {in_words(done.stderr)}")
        return str(done.stdout)

    def desk(self, *command: str, given: bytes = b"") -> Any:
        """Run a command beside the volume; return how it ended. Makes the desk where there is none:
        seconds, or as long as an image is pulled. Raises InputError if it does not start."""
        words = ["exec", *(["-i"] if given else []), DESK, "--", *command]
        deadline = time.monotonic() + DESK_GRACE
        while True:
            self._await_desk(deadline)
            done = self.call(*words, timeout=WAIT, given=given)
            if NO_KUBELET not in done.stderr or time.monotonic() > deadline:
                return done
            self._end_desk()

    def _await_desk(self, deadline: float) -> None:
        told = ""
        while not (pods := Pods([self._desk_or_none() or {}])).running:
            if not pods.pods:
                self._check_site()
                mark = (f'{IMAGE}: ""', f"{IMAGE}: '{self._image}'")
                text = self._desk_text.replace(*mark).encode()
                made = self.call("create", "-f", "-", given=text)
                if made.returncode and "already exists" not in made.stderr:  # another client's
                    raise InputError(f"the desk: {in_words(made.stderr)}")
            elif pods.waiting != told:
                told = pods.waiting
                print(f"the desk (pod {DESK}): {told}", file=sys.stderr, flush=True)
                if told.startswith(HOPELESS):
                    deadline = time.monotonic() + HOPELESS_GRACE
            if time.monotonic() > deadline:
                self._end_desk()
                raise InputError(f"the desk (pod {DESK}) does not start: {told}")
            time.sleep(0.3)

    def _end_desk(self) -> None:
        """Remove the desk's pod at once: on a node that is lost it would never be gone."""
        self.must("delete", "pod", DESK, "--force", "--grace-period=0", "--ignore-not-found")

    @functools.cached_property
    def _desk_text(self) -> str:
        return self.must("kustomize", "kubernetes/desk")

    @property
    def _image(self) -> str:
        """Return the site's image. Raises InputError."""
        found = re.search(r"^ *(?:- )?image: (.+)", self._desk_text, re.M)
        return found[1] if found else ""

    def _desk_or_none(self) -> Optional[dict[str, Any]]:
        """Return the desk's pod. One that has ended, is leaving, or has another image than the site
        by now, is removed."""
        pod = self.get("pod", DESK)
        ended = pod and pod["status"].get("phase") in ("Succeeded", "Failed")
        other = pod and pod["metadata"].get("annotations", {}).get(IMAGE) != self._image
        if pod and (ended or other or "deletionTimestamp" in pod["metadata"]):
            self._end_desk()
            return None
        return pod

    def _check_site(self) -> None:
        """Raise InputError where the site lacks what every run shares."""
        once = "kubectl apply -k kubernetes/site/once, by whoever owns the namespace"
        done = self.call("get", "namespace", self.namespace)  # a user may not be allowed to ask
        if "not found" in done.stderr:
            make = f"kubectl create namespace {self.namespace}; {once}"
            raise InputError(f"namespace {self.namespace}: not there; {make}")
        claim = self.get("persistentvolumeclaim", CLAIM)
        if claim is None:
            raise InputError(f"namespace {self.namespace} has no volume {CLAIM}; {once}")
        storage, said = claim["spec"].get("storageClassName"), ""
        if claim["status"].get("phase") == "Pending" and storage is None:
            said = "names no storage class, and the cluster has no default"
        elif claim["status"].get("phase") == "Pending" and storage:
            done = self.call("get", "storageclass", storage)
            if "not found" in done.stderr:
                said = f"asks for the storage class {storage}, which is not there"
        if said:
            delete = f"kubectl -n {self.namespace} delete pvc {CLAIM}"
            mend = f"kubectl get storageclass; kubernetes/site/once/volume.yaml; {delete}; {once}"
            raise InputError(f"volume {CLAIM} {said}; {mend}")

    def sharing_problems(self, nodes: int) -> list[str]:
        """Say that the runs' volume cannot be written by several nodes, if so."""
        claim = self.get("persistentvolumeclaim", CLAIM)
        modes = claim["spec"]["accessModes"] if claim else ["ReadWriteMany"]
        if "ReadWriteMany" in modes:
            return []
        mend = (
            "a storage class of shared files, and ReadWriteMany: kubernetes/site/once/volume.yaml"
        )
        return [f"NODES={nodes}: volume {CLAIM} is {', '.join(modes)}, for one node alone; {mend}"]

    @functools.cached_property
    def rights_problems(self) -> list[str]:
        """Name what this user may not do with what a submission has made already."""
        found = []
        for kind in ("jobs", "configmaps"):
            if self.call("auth", "can-i", "patch", kind).stdout.startswith("no"):
                ask_for = "ask whoever owns the namespace for that verb"
                found.append(f"{kind}: you may not patch them in {self.namespace}; {ask_for}")
        return found

    def queue_problems(self, queue: str) -> list[str]:
        """Say why Kueue would never admit a job of a LocalQueue, if so: the job would wait for
        ever. Nothing where this user may not ask."""
        done = self.call("get", QUEUES, queue, "-o", "json")
        edit = "kubernetes/site/kustomization.yaml"
        if "doesn't have a resource type" in done.stderr:
            return [f"components/kueue: this cluster has no Kueue; leave it out of {edit}"]
        if "not found" in done.stderr:
            see = f"kubectl -n {self.namespace} get localqueues; {edit}"
            return [f"LocalQueue {queue}: not in namespace {self.namespace}; {see}"]
        if done.returncode:
            return []
        said = json.loads(done.stdout).get("status", {}).get("conditions", [])
        active = next((c for c in said if c["type"] == "Active"), None)
        if active is None:
            return [f"LocalQueue {queue}: no controller has looked at it; does Kueue's run?"]
        return [f"LocalQueue {queue}: {active['message']}"] if active["status"] != "True" else []

    def admission(self, job: dict[str, Any]) -> str:
        """Say in Kueue's words what a suspended job waits for; "" where it says nothing."""
        done = self.call("get", WORKLOADS, "-o", "json")
        for made in json.loads(done.stdout)["items"] if not done.returncode else []:
            owners = made["metadata"].get("ownerReferences", [])
            if job["metadata"]["uid"] in [owner["uid"] for owner in owners]:
                said = made.get("status", {}).get("conditions", [])
                return next((c["message"] for c in said if c["status"] == "False"), "")
        return ""

    def get(self, kind: str, name: str) -> Optional[dict[str, Any]]:
        """Return an object, None if there is none. Raises InputError where it cannot be asked."""
        done = self.call("get", kind, name, "-o", "json", "--ignore-not-found")
        if done.returncode:
            raise InputError(in_words(done.stderr))
        return json.loads(done.stdout) if done.stdout.strip() else None

    def must(self, *words: str) -> str:
        """Call kubectl; return what it prints. Raises InputError with what is wrong."""
        done = self.call(*words, timeout=WAIT)
        if done.returncode:
            raise InputError(f"kubectl {words[0]}: {in_words(done.stderr)}")
        return str(done.stdout)

    def call(self, *words: str, timeout: float = 30, given: bytes = b"") -> Any:
        """Call kubectl, with `given` as its input; return how it ended."""
        return ask(*self.words(*words), environment=self.environment, timeout=timeout, given=given)

    def words(self, *words: str) -> list[str]:
        """Return the whole command line of a call."""
        options = ["--namespace", self.namespace, "--request-timeout=20s"]
        if words[0] in ("delete", "exec", "create", "port-forward"):
            options.pop()  # these wait, or stream
        return ["kubectl", *([] if words[0] == "kustomize" else options), *words]
