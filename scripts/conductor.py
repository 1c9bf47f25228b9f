"""Conduct a run from inside the cluster: create the stages that wait, one after the other, and end
a Job whose image is not there.

    python3 -m scripts.conductor /runs/<run>

A stage waits as a ConfigMap `<run>-<stage>`, made by whoever has submitted it: the label
torch-relay/waits, the annotation torch-relay/after with the stage that must be done before, and
the objects to create, as YAML. Whether that stage is done, its stage.json on the volume says.
Killed anywhere and started again it goes on. When nothing waits or runs any more it deletes its own
Job. Ends with 64 when what is waited for has failed or was deleted: then nothing waits any more,
either. Standard library alone.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Optional

from scripts.run import stages
from scripts.run.errors import DONE, WRONG_INPUT, InputError
from scripts.run.layout import finished

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_SECONDS = 3.0
LINGER_SECONDS = 30.0  # a client may be about to add the next
PULL_SECONDS = 180.0  # an image that cannot be pulled never fails a Job (kubernetes#122300)
HOPELESS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName")
PATHS = {
    "Job": "/apis/batch/v1",
    "ConfigMap": "/api/v1",
    "Pod": "/api/v1",
    "Service": "/api/v1",
    "Deployment": "/apis/apps/v1",
    "PodDisruptionBudget": "/apis/policy/v1",
}


class Api:
    """Ask the API server about this pod's namespace, with its service account."""

    def __init__(self) -> None:
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        host = f"[{host}]" if ":" in host else host
        self.url = f"https://{host}:{port}"
        self.namespace = (ACCOUNT / "namespace").read_text().strip()
        self._tls = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))

    def call(
        self,
        method: str,
        kind: str,
        name: str = "",
        query: str = "",
        body: str = "",
        content: str = "application/yaml",
    ) -> Optional[dict[str, Any]]:
        """Make one request; None for an object that is not there (404), or is already (409). Raises
        InputError with the server's words where it refuses, OSError where it does not answer."""
        path = f"{PATHS[kind]}/namespaces/{self.namespace}/{kind.lower()}s"
        url = f"{self.url}{path}{f'/{name}' if name else ''}{f'?{query}' if query else ''}"
        token = (ACCOUNT / "token").read_text().strip()  # the kubelet renews it
        headers = {"Authorization": f"Bearer {token}", "Content-Type": content}
        request = urllib.request.Request(url, body.encode() or None, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (404, 409):
                return None
            if error.code >= 500 or error.code == 429:
                raise
            said = json.loads(error.read() or b"{}").get("message", "")
            raise InputError(f"{method} {kind} {name}: {error.code} {said}") from None

    def items(self, kind: str, labels: str) -> list[dict[str, Any]]:
        """List the objects with these labels."""
        found = self.call("GET", kind, query=f"labelSelector={labels}")
        return found["items"] if found else []


def documents(text: str) -> list[tuple[str, str]]:
    """Split YAML as kustomize writes it into (kind, document)."""
    found = []
    for document in re.split(r"^---\n", text, flags=re.M):
        kind = re.search(r"^kind: (\w+)", document, re.M)
        if kind:
            found.append((kind[1], document))
    return found


def ended(job: dict[str, Any]) -> str:
    """Return Complete or Failed for a Job that has ended, else ""."""
    said = job.get("status", {}).get("conditions", [])
    return next(
        (c["type"] for c in said if c["status"] == "True" and c["type"] in ("Complete", "Failed")),
        "",
    )


class Conductor:
    """Conduct one run."""

    def __init__(self, run: Path, api: Api):
        self.run, self.api = run, api
        self.label = f"torch-relay/run={run.name}"
        self.hopeless: dict[str, float] = {}  # stage: since when its image is not there

    def conduct(self) -> None:
        """Work until nothing waits or runs any more. Raises InputError when it cannot go on."""
        idle = time.monotonic()
        while True:
            try:
                own = self.api.call("GET", "Job", f"{self.run.name}-conductor")
                if self._look():
                    idle = time.monotonic()
                elif time.monotonic() > idle + LINGER_SECONDS and self._left(own):
                    return
            except OSError as error:  # the API server, or the volume, does not answer for a moment
                print(f"{error}; asks again", file=sys.stderr, flush=True)
                idle = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _left(self, own: Optional[dict[str, Any]]) -> bool:
        """Delete the conductor's own Job, as it was before the last look. A client that adds a
        stage changes it, and is refused once it is gone: so none adds one that nobody creates."""
        if own is None:
            return True
        version = own["metadata"]["resourceVersion"]
        asked = {"preconditions": {"resourceVersion": version}, "propagationPolicy": "Background"}
        name, body = own["metadata"]["name"], json.dumps(asked)
        done = self.api.call("DELETE", "Job", name, body=body, content="application/json")
        return done is not None

    def dismiss(self) -> None:
        """Take away what waits: a later conductor must not find it and start it."""
        for waits in self.api.items("ConfigMap", f"{self.label},torch-relay/waits"):
            self.api.call("DELETE", "ConfigMap", waits["metadata"]["name"])

    def _look(self) -> bool:
        """Create the first stage that waits, if it may start, and end Jobs without an image; tell
        whether any stage waits or runs."""
        maps = self.api.items("ConfigMap", f"{self.label},torch-relay/waits")
        waiting = {m["metadata"]["labels"]["torch-relay/stage"]: m for m in maps}
        first = next((name for name in stages.names() if name in waiting), "")
        if first and self._may_start(first, waiting[first]):
            self._create(first, waiting[first])
        jobs = [j for j in self.api.items("Job", f"{self.label},torch-relay/stage") if not ended(j)]
        for job in jobs:
            self._end_without_image(job["metadata"]["name"][len(self.run.name) + 1 :])
        return bool(first or jobs)

    def _may_start(self, stage: str, waits: dict[str, Any]) -> bool:
        before = waits["metadata"]["annotations"]["torch-relay/after"]
        if finished(self.run / before):
            return True
        job = self.api.call("GET", "Job", f"{self.run.name}-{before}")
        if job is None:
            raise InputError(f"{stage}: waits for {before}, which was stopped or removed")
        if ended(job) == "Failed":
            raise InputError(f"{stage}: waits for {before}, which has failed")
        return False

    def _end_without_image(self, stage: str) -> None:
        """Delete a Job whose image has not been there for long: it would wait for ever. Raises
        InputError with the cause."""
        cause = ""
        for pod in self.api.items("Pod", f"{self.label},torch-relay/stage={stage}"):
            status = pod["status"]
            of = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
            waits = [c["state"]["waiting"] for c in of if c.get("state", {}).get("waiting")]
            cause = next(
                (w.get("message", w["reason"]) for w in waits if w["reason"] in HOPELESS), cause
            )
        since = self.hopeless.setdefault(stage, time.monotonic())
        if not cause:
            del self.hopeless[stage]
        elif time.monotonic() > since + PULL_SECONDS:
            query = "propagationPolicy=Foreground"
            self.api.call("DELETE", "Job", f"{self.run.name}-{stage}", query)
            raise InputError(f"{stage}: its image is not there: {cause}")

    def _create(self, stage: str, waits: dict[str, Any]) -> None:
        """Create a stage's Job, with its ConfigMap, which goes with it; it waits no more."""
        name, maps = f"{self.run.name}-{stage}", []
        for kind, text in documents(waits["data"]["stage.yaml"]):
            made = self.api.call("POST", kind, body=text)
            if kind == "ConfigMap":
                maps.append(re.search(r"^  name: (\S+)", text, re.M)[1])  # type: ignore[index]
            elif made:
                print(f"{stage}: job {name} is created", flush=True)
        job = self.api.call("GET", "Job", name)
        if job is None:
            raise InputError(f"{stage}: job {name} was deleted as soon as it was created")
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name}
        owner["uid"] = job["metadata"]["uid"]
        patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
        for one in maps:
            merge = "application/merge-patch+json"
            self.api.call("PATCH", "ConfigMap", one, body=patch, content=merge)
        self.api.call("DELETE", "ConfigMap", waits["metadata"]["name"])


def main(words: list[str]) -> int:
    """Conduct a run; return an exit code, with what is wrong on stderr."""
    if len(words) != 1:
        print(__doc__, file=sys.stderr)
        return WRONG_INPUT
    conductor = Conductor(Path(words[0]), Api())
    try:
        conductor.conduct()
    except InputError as error:
        conductor.dismiss()
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
