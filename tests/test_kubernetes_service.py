"""A service on Kubernetes, without a cluster: what keeps it out, and how it rolls over."""

import json
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest

from scripts import rollout
from scripts.clusters.kubernetes_service import Services
from scripts.run.submission import Submission
from tests.support.kube_text import everything
from tests.support.lanes import lacking


class Asked:
    """A kubectl that renders, and answers everything else alike."""

    namespace = "torch-relay"

    def __init__(self, deployment, stderr="", key="a2V5"):
        self.deployment, self.stderr, self.key = deployment, stderr, key

    def must(self, *words):
        done = subprocess.run(["kubectl", *words], capture_output=True, text=True, check=True)
        return done.stdout

    def get(self, kind, name):
        return self.deployment

    def call(self, *words, **_):
        return SimpleNamespace(returncode=bool(self.stderr), stderr=self.stderr, stdout=self.key)


OURS = {"metadata": {"labels": {"torch-relay/service": "chat"}}}


@pytest.mark.parametrize(
    ("kubectl", "components", "config", "downtime", "said"),
    [
        (Asked(OURS), "", "", False, []),
        (Asked(None), "no-spare-gpu", "", False, []),
        (Asked(OURS), "no-spare-gpu", "", False, ["DOWNTIME=1"]),
        (Asked(OURS), "no-spare-gpu", "", True, []),
        (Asked({"metadata": {}}), "", "", False, ["not ours"]),
        (Asked(OURS), "", "shutdown-timeout: 135", False, ["streams would be cut"]),
        (Asked(OURS), "", "shutdown-timeout: 134", False, []),
        (Asked(None, key="<no value>"), "", "", False, ["has no entry named key"]),
        (Asked(None, "exceeded quota: gpus"), "", "", False, ["refuses chat: exceeded quota"]),
    ],
)
def test_what_keeps_a_service_out(
    checkout, monkeypatch, kubectl, components, config, downtime, said
):
    if not shutil.which("kubectl"):
        lacking("kubectl: not on PATH")
    monkeypatch.setattr("scripts.clusters.kubernetes_service.ROOT", checkout)
    if components:
        site = checkout / "kubernetes/site/kustomization.yaml"
        line = f"# - ../components/{components}\n"
        site.write_text(site.read_text().replace(line, line[2:]))
    files = {"stage.env": "SERVICE=chat\nPORT=8123\n", "config.yaml": config}
    made = Submission(checkout / "runs/1e3/deploy", files=files)
    found = Services(kubectl).refusal(made, made.directory, downtime)
    assert len(found) == len(said)
    assert all(words in line for words, line in zip(said, found))
    served = {i["kind"]: i for i in everything(made.directory / "serve")}
    pod = served["Deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"]["torch-relay/run"] == "1e3", "a string, not a number"
    assert pod["spec"]["containers"][0]["ports"][0]["containerPort"] == 8123
    assert served["Service"]["spec"]["selector"] == {"torch-relay/service": "chat"}
    texts = "".join(p.read_text() for p in made.directory.rglob("*.yaml"))
    assert "VLLM_API_KEY" in texts
    assert "secretKeyRef" in texts, "the key itself is in no file"


# --- what rolls over


class Server:
    """An API server with one deployment, whose pods do what they are told."""

    def __init__(self, before, pods):
        self.deployment, self.pods, self.calls = before, pods, []

    def call(self, method, kind, name="", query="", body="", content=""):
        self.calls.append((method, kind, body))
        return self.deployment

    def items(self, kind, labels):
        return self.pods


def served(run, before, **status):
    return {
        "metadata": {
            "generation": 2,
            "labels": {"torch-relay/run": run},
            "annotations": {"torch-relay/before": before},
        },
        "spec": {"replicas": 1, "template": {"a": run}},
        "status": {"observedGeneration": 2, **status},
    }


def waiting_pod(rollout, **container):
    meta = {"annotations": {"torch-relay/rollout": rollout}}
    return {"metadata": meta, "status": {"containerStatuses": [container]}}


DIED = {"terminated": {"exitCode": 1, "message": "x\nValueError: too long\nsee https://x"}}


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        (waiting_pod("me", state={}, lastState=DIED, restartCount=2), "ValueError: too long"),
        (waiting_pod("me", state={"terminated": {"exitCode": 64, "message": "no"}}), "no"),
        (waiting_pod("me", state={}, lastState=DIED, restartCount=1), ""),
        (waiting_pod("another", state={}, lastState=DIED, restartCount=9), ""),
    ],
)
def test_when_a_candidate_has_failed(monkeypatch, pod, said):
    monkeypatch.setattr(rollout, "POLL_SECONDS", 0.01)
    server = Server(served("b", "a", replicas=2, updatedReplicas=1, availableReplicas=1), [pod])
    stage = SimpleNamespace(phase=lambda *_: None)
    if not said:  # it goes on to wait, until the deployment is as it should be
        timer = threading.Timer(0.1, server.deployment["status"].update, [{"replicas": 1}])
        timer.start()
    found = rollout._wait(server, "chat", "me", stage)
    assert (said in found) if said else found == ""


def test_going_back_leaves_nothing_of_the_candidate():
    server = Server(None, [])
    rollout._go_back(server, "chat", served("a", "z"))
    patch = {change["path"]: change["value"] for change in json.loads(server.calls[0][2])}
    assert patch["/spec/template"] == {"a": "a"}
    assert patch["/metadata/labels"] == {"torch-relay/run": "a"}
    assert patch["/metadata/annotations/torch-relay~1before"] == "z", "where rollback goes to"
    rollout._go_back(server, "chat", None)
    assert server.calls[-1][:2] == ("DELETE", "Deployment"), "what never came up is taken away"
