"""Roll a service over to a run's model, on Kubernetes: FROM → SERVICE, or back to what served.

    python3 -m scripts.rollout /runs/<run>/deploy

A stage script: the deploy stage is its Job there. It needs no GPU. It checks the model and the
verdict, applies the objects of serve.yaml, which the client has rendered, and waits until the new
pods answer. Where they do not come up it applies what was there before, and ends with 64: tried
again it would be the same.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any, Optional

from scripts.conductor import HOPELESS, PULL_SECONDS, Api, documents
from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.job.stage import Stopped
from scripts.run import gate, modeldir
from scripts.run.errors import InputError
from scripts.run.stages import maker

MANAGER = "fieldManager=torch-relay&force=true"  # of server-side apply
APPLY = "application/apply-patch+yaml"
POLL_SECONDS = 2.0
BEFORE = "torch-relay/before"  # an annotation: the run that make rollback goes back to
RESTARTS = 2  # of a new pod's container, after which it will not come up


def main(stage: Parent) -> None:
    """Check, apply, wait. Raises InputError for a model that may not be served, or that does not
    come up."""
    model, service, api = stage.path("FROM"), stage.facts["SERVICE"], Api()
    stage.phase("checks the model")
    found = modeldir.problems(model)
    if not found and "FORCE" not in stage.facts:
        evaluation = stage.run.stage(maker("verdict").name)
        found += gate.problems(evaluation, model, stage.digests)
    before = api.call("GET", "Deployment", service)
    if before and before["metadata"]["labels"].get("torch-relay/service") != service:
        found.append(f"SERVICE={service}: a deployment of that name is not ours; choose another")
    if found:
        raise InputError(found)
    digest = stage.digests.describe(model)["digest"]
    text = (stage.directory / "serve.yaml").read_text(encoding="utf-8")
    rollout = f"{stage.environment.job}.{stage.attempt_number}"
    # What only is known now, in the places that kubernetes/base/serve has for it.
    text = text.replace('torch-relay/rollout: ""', f"torch-relay/rollout: '{rollout}'")
    text = text.replace('torch-relay/model: ""', f"torch-relay/model: {digest}")
    text = text.replace(
        'torch-relay/before: ""', f"torch-relay/before: '{_earlier(before, stage)}'"
    )
    for kind, document in documents(text):
        api.call("PATCH", kind, service, MANAGER, document, APPLY)
    stage.phase("waits for the new pods")
    try:
        why = _wait(api, service, rollout, stage)
    except Stopped:
        why = "stopped"
    if why:
        _go_back(api, service, before)
        back = f"run {_run(before)} serves as before" if before else "nothing serves"
        raise InputError(f"{service}: {why}; {back}")  # tried again it would be the same
    stage.shown.say(f"serves as {service}, {digest}")


def _run(deployment: Optional[dict[str, Any]]) -> str:
    return deployment["metadata"]["labels"]["torch-relay/run"] if deployment else ""


def _earlier(before: Optional[dict[str, Any]], stage: Parent) -> str:
    """Name the run to go back to: the one that serves now, or that one's own earlier one."""
    if before is None or _run(before) != stage.run.name:
        return _run(before)
    return str(before["metadata"].get("annotations", {}).get(BEFORE, ""))


def _wait(api: Api, service: str, rollout: str, stage: Parent) -> str:
    """Wait until every pod of a service is one of the new and answers; return why that will not be,
    "" once it is."""
    hopeless = 0.0
    while True:
        time.sleep(POLL_SECONDS)
        made = api.call("GET", "Deployment", service)
        if made is None:
            return "its deployment was deleted"
        status, wanted = made.get("status", {}), made["spec"]["replicas"]
        if status.get("observedGeneration", 0) < made["metadata"]["generation"]:
            continue
        new = [status.get(name, 0) for name in ("updatedReplicas", "availableReplicas", "replicas")]
        if new == [wanted] * 3:
            return ""
        late = [
            c for c in status.get("conditions", []) if c.get("reason") == "ProgressDeadlineExceeded"
        ]
        if late:
            return str(late[0]["message"])
        why, waits = "", False
        for pod in api.items("Pod", f"torch-relay/service={service}"):
            if pod["metadata"].get("annotations", {}).get("torch-relay/rollout") != rollout:
                continue
            for container in pod["status"].get("containerStatuses", []):
                why = _fault(container) or why
                reason = container["state"].get("waiting", {}).get("reason", "")
                if reason in (*HOPELESS, "CreateContainerConfigError"):
                    waits, said = True, container["state"]["waiting"].get("message", reason)
                    stage.phase("waits for the new pods", said)
        if why:
            return why
        hopeless = (hopeless or time.monotonic()) if waits else 0.0
        if hopeless and time.monotonic() > hopeless + PULL_SECONDS:
            return said


def _fault(container: dict[str, Any]) -> str:
    """Return the last words of a container that was started in vain; "" of one that was not."""
    ended = container["state"].get("terminated") or container.get("lastState", {}).get("terminated")
    if not ended or (container.get("restartCount", 0) < RESTARTS and ended["exitCode"] != 64):
        return ""
    lines = (ended.get("message") or f"exit code {ended['exitCode']}").strip().splitlines()
    said = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|error)\b", line)] or lines
    return f"the new pods do not come up: {said[-1]}"


def _go_back(api: Api, service: str, before: Optional[dict[str, Any]]) -> None:
    """Put the pods of before back, or take away those that never came up."""
    if before is None:
        api.call("DELETE", "Deployment", service)
        return
    earlier = before["metadata"].get("annotations", {}).get(BEFORE, "")
    values = {
        "/spec/template": before["spec"]["template"],
        "/spec/replicas": before["spec"]["replicas"],
        "/metadata/labels": before["metadata"]["labels"],
        f"/metadata/annotations/{BEFORE.replace('/', '~1')}": earlier,
    }
    content = [{"op": "add", "path": path, "value": value} for path, value in values.items()]
    patch = "application/json-patch+json"
    api.call("PATCH", "Deployment", service, body=json.dumps(content), content=patch)


if __name__ == "__main__":
    run(main)
