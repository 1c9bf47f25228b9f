"""What a Job's pods say in words."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

OUT_OF_SERVICE = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
STUCK_SECONDS = 15


class Pods:
    """Hold the pods of one Job, the newest last."""

    def __init__(self, pods: list[dict[str, Any]]):
        self.pods = sorted(
            (pod for pod in pods if pod), key=lambda pod: pod["metadata"]["creationTimestamp"]
        )

    @property
    def running(self) -> bool:
        """Tell whether any pod runs, past its init container."""
        return any(pod["status"].get("phase") == "Running" for pod in self.pods)

    @property
    def nodes(self) -> list[str]:
        """Name the nodes of the pods that run."""
        running = [pod for pod in self.pods if pod["status"].get("phase") == "Running"]
        return sorted(pod["spec"].get("nodeName", "?") for pod in running)

    @property
    def waiting(self) -> str:
        """Say what the newest pod waits for: the scheduler's own sentence, or the kubelet's."""
        for pod in reversed(self.pods):
            for state in _states(pod):
                waiting = state.get("waiting") or {}
                if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
                    return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
            for condition in pod["status"].get("conditions", []):
                if condition["type"] == "PodScheduled" and condition["status"] == "False":
                    return str(condition.get("message", "not scheduled"))
            return "its containers are being made"
        return ""

    @property
    def stuck(self) -> str:
        """Say which pod should have ended and has not, as on a node that is lost, and what frees
        it: until then it might still write, so no other takes its place. "" if there is none."""
        for pod in self.pods:
            end = pod["metadata"].get("deletionTimestamp")  # when its grace is over
            if end and _seconds_since(end) > STUCK_SECONDS:
                name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "?")
                taint = f"kubectl taint node {node} {OUT_OF_SERVICE}"
                return f"pod {name} does not end; if node {node} is dead for certain: {taint}"
        return ""

    @property
    def last_words(self) -> str:
        """Return the last line of what the newest container that failed has written."""
        for pod in reversed(self.pods):
            for state in _states(pod):
                ended = state.get("terminated") or {}
                if ended.get("exitCode"):
                    lines = (ended.get("message") or "").strip().splitlines()
                    return lines[-1] if lines else f"exit code {ended['exitCode']}"
        return ""


def _seconds_since(stamp: str) -> float:
    then = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    return (datetime.now(timezone.utc) - then).total_seconds()


def _states(pod: dict[str, Any]) -> list[dict[str, Any]]:
    status = pod["status"]
    of = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return [container.get("state", {}) for container in of]
