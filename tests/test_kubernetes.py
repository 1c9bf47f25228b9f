"""Pods on a real Kubernetes: what the cluster that the tests bring up is good for.

make test-kubernetes brings up a cluster of its own (tests/support/kube_lab.py);
RELAY_KUBERNETES=site uses the one that KUBECONFIG names, and leaves out what breaks nodes or needs
this machine's .venv in pods.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.kube_lab import KUBE, KubeLab, missing, python_folders
from tests.support.lanes import lacking
from tests.support.waiting import until

pytestmark = pytest.mark.slow  # on one worker (lanes.LANES): one cluster, which tests break
NAMES = ["node1", "node2"]
GPUS = 8
# A pod that goes on writing to the volume, on node2.
BEATING = """
apiVersion: v1
kind: Pod
metadata: {name: beat}
spec:
  runtimeClassName: host
  nodeSelector: {lab.local/node: node2}
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: node
    image: localhost/host:1
    command: [sh, -c, "while :; do date +%s.%N > /runs/beat; sleep 0.2; done"]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: runs, mountPath: /runs}]
  volumes: [{name: runs, persistentVolumeClaim: {claimName: runs}}]
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: runs}
spec: {accessModes: [ReadWriteMany], resources: {requests: {storage: 1Gi}}}
"""


class Site:
    """The cluster that KUBECONFIG names."""

    environment: ClassVar = {}
    kubectl = KubeLab.kubectl


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with eight pretended GPUs each."""
    if os.environ.get("RELAY_KUBERNETES") == "site":
        if not shutil.which("kubectl"):
            lacking("RELAY_KUBERNETES=site needs kubectl on PATH")
        yield Site()
        return
    if missing():
        lacking(
            f"a Kubernetes of its own needs {', '.join(missing())}: apt-get install iproute2 "
            "util-linux procps openssl; Go 1.21 or newer is on https://go.dev/dl"
        )
    folder = Path(tempfile.mkdtemp(prefix="kube-"))  # pytest's are too long for a socket's path
    lab = KubeLab(folder, len(NAMES), GPUS, mounts=python_folders())
    try:
        lab.up()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in lab.environment.items():
                patch.setenv(name, value)
            yield lab
    finally:
        lab.down()


@pytest.fixture
def own(cluster):
    """The same, to break: only where it is the tests' own."""
    return (
        cluster
        if isinstance(cluster, KubeLab)
        else lacking("this needs a cluster of its own; without RELAY_KUBERNETES=site")
    )


@pytest.fixture
def namespace(cluster):
    """A namespace in which pods must keep the pod security standard "restricted"."""
    name = f"relay-test-{os.getpid()}-{os.urandom(3).hex()}"
    cluster.kubectl("create", "namespace", name)
    enforce = "pod-security.kubernetes.io/enforce=restricted"
    cluster.kubectl("label", "namespace", name, enforce)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def ready(cluster):
    """Return the GPUs that each ready node offers."""
    nodes = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    return {
        node["metadata"]["name"]: int(node["status"]["allocatable"].get("nvidia.com/gpu", 0))
        for node in nodes
        if any(
            (one["type"], one["status"]) == ("Ready", "True")
            for one in node["status"]["conditions"]
        )
    }


def ended(cluster, namespace, job):
    """Return Complete or Failed once a Job is, else nothing."""
    status = json.loads(cluster.kubectl("-n", namespace, "get", "job", job, "-o", "json"))["status"]
    said = [one["type"] for one in status.get("conditions", []) if one["status"] == "True"]
    return next((word for word in said if word in ("Complete", "Failed")), "")


def pods(cluster, namespace):
    """Return what a namespace's pods say, for a failure."""
    asked = ["get pods -o wide", "get events", "logs -l app --prefix --tail=80 --ignore-errors"]
    return "\n\n".join(cluster.kubectl("-n", namespace, *words.split()) for words in asked)


def test_nodes_are_ready_and_offer_gpus(cluster):
    found = ready(cluster)
    assert found, "no node is ready"
    if isinstance(cluster, KubeLab):
        assert found == dict.fromkeys(NAMES, GPUS)


def test_restricted_is_enforced(own, namespace):
    with pytest.raises(AssertionError, match="violates PodSecurity"):
        own.kubectl("-n", namespace, "run", "root", "--image=localhost/host:1")


def test_torchrun_over_two_nodes(own, namespace):
    """Two pods of an Indexed Job find each other, run .venv's torch as uid 1000, and see each
    other's file on the shared volume."""
    python = python_folders()[0] / "bin/python"
    text = (KUBE / "gang.yaml").read_text().replace("PYTHON", str(python))
    own.kubectl("-n", namespace, "apply", "-f", "-", input=text)
    how = until(lambda: ended(own, namespace, "gang"), 120, lambda: pods(own, namespace))
    assert how == "Complete", f"the Job ended as {how}:\n{pods(own, namespace)}"
    said = own.kubectl("-n", namespace, "logs", "-l", "app=gang", "--tail=-1")
    told = [line for line in said.splitlines() if line.startswith("rank ")]
    nodes = {line.split()[3].strip(",") for line in told}
    assert nodes == set(NAMES), f"not one pod on each node: {told}"
    ends = {line.partition(", ")[2] for line in told}
    assert ends == {f"uid 1000, {GPUS} GPUs: sum 3, files rank0,rank1"}, told


def test_a_killed_node_is_noticed_and_comes_back(own):
    own.kill_node("node2")
    until(lambda: list(ready(own)) == ["node1"], 40, own.said)
    own.start_node("node2")
    until(lambda: ready(own) == dict.fromkeys(NAMES, GPUS), 60, own.said)


def test_a_node_without_kubelet_is_lost_while_its_pod_goes_on(own, namespace):
    own.kubectl("-n", namespace, "apply", "-f", "-", input=BEATING)
    until(lambda: beat(own, namespace), 60, lambda: pods(own, namespace))
    own.stop_kubelet("node2")
    until(lambda: list(ready(own)) == ["node1"], 40, own.said)
    last = beat(own, namespace)
    until(lambda: beat(own, namespace) > last, 10)
    own.start_kubelet("node2")
    until(lambda: ready(own) == dict.fromkeys(NAMES, GPUS), 60, own.said)


def beat(cluster, namespace):
    """Return when the pod last wrote to its volume, 0 before it has."""
    written = [file.read_text() for file in cluster.state.glob(f"volumes/{namespace}-runs-*/beat")]
    return float("".join(written) or 0)
