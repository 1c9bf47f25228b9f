"""Pods on a real Kubernetes: what the cluster that the tests bring up is good for.

make test-kubernetes brings up a cluster of its own (tests/support/kube_lab.py);
RELAY_KUBERNETES=site uses the one that KUBECONFIG names, and leaves out what breaks nodes or needs
this machine's .venv in pods.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.kube_lab import CODE, KUBE, KubeLab, missing, repository
from tests.support.lanes import lacking
from tests.support.launching import assert_refused, launch
from tests.support.runs import ROOT
from tests.support.waiting import until

pytestmark = pytest.mark.slow  # on one worker (lanes.LANES): one cluster, which tests break
NAMES = ["node1", "node2"]
GPUS = 8
IMAGE = "registry.example/relay:1"
SPACE = "relay-stages"
STEPS = "--training.steps 60 --checkpoint.interval 10"
SHORT = "max_steps_per_epoch=4 epochs=1"
# What a site edits; here also for pods that see this repository in the place of an image.
SITE = """\
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
namespace: {space}
images: [{{name: torch-relay, newName: registry.example/relay, newTag: "{tag}"}}]
components: [{components}]
patches:
  - target: {{kind: Job}}
    patch: |-
      - {{op: add, path: /spec/template/spec/initContainers/0/workingDir, value: "{root}"}}
      - {{op: add, path: /spec/template/spec/initContainers/0/env/-, value: {path}}}
      - {{op: add, path: /spec/template/spec/containers/0/workingDir, value: "{root}"}}
      - {{op: add, path: /spec/template/spec/containers/0/env/-, value: {path}}}
      - op: add
        path: /spec/template/spec/containers/0/env/-
        value: {{name: OMP_NUM_THREADS, value: "1"}}
      - op: replace
        path: /spec/template/spec/containers/0/resources/requests
        value: {{cpu: 100m, memory: 256Mi}}
      - op: replace
        path: /spec/template/spec/containers/0/resources/limits/memory
        value: 6Gi
  - target: {{kind: Pod}}
    patch: |-
      - {{op: add, path: /spec/containers/0/workingDir, value: "{root}"}}
      - {{op: add, path: /spec/containers/0/env, value: [{path}]}}
"""
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
    lab = KubeLab(folder, len(NAMES), GPUS, repository(), tags=[IMAGE])
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
    python = f"{CODE}/.venv/bin/python"
    text = (KUBE / "gang.yaml").read_text().replace("PYTHON", python)
    own.kubectl("-n", namespace, "apply", "-f", "-", input=text)
    how = until(lambda: ended(own, namespace, "gang"), 120, lambda: pods(own, namespace))
    assert how == "Complete", f"the Job ended as {how}:\n{pods(own, namespace)}"
    said = own.kubectl("-n", namespace, "logs", "-l", "app=gang", "--tail=-1")
    told = [line for line in said.splitlines() if line.startswith("rank ")]
    nodes = {line.split()[3].strip(",") for line in told}
    assert nodes == set(NAMES), f"not one pod on each node: {told}"
    ends = {line.partition(", ")[2] for line in told}
    assert ends == {f"uid 1000, {GPUS} GPUs: sum 3, files rank0,rank1"}, told


# --- stages, by a client that does not see the volume


class Client:
    """The launcher in a checkout whose kubernetes/site is edited, on a machine without volume."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        for name in ("configs", "kubernetes", "scripts"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        self.site()
        once = folder / "kubernetes/site/once"
        for name, old, new in (
            ("kustomization.yaml", "namespace: torch-relay", f"namespace: {SPACE}"),
            ("volume.yaml", "fsx-lustre", "shared"),
        ):
            (once / name).write_text((once / name).read_text().replace(old, new))

    def site(self, space=SPACE, tag="1", components="../components/cpu"):
        path = f"{{name: PATH, value: '{CODE}/.venv/bin:/usr/bin:/bin'}}"
        said = {"space": space, "tag": tag, "components": components, "root": CODE, "path": path}
        (self.folder / "kubernetes/site/kustomization.yaml").write_text(SITE.format(**said))

    def launch(self, verb, **options):
        given = {"HOME": os.environ["HOME"], "CLUSTER": "k8s", **self.cluster.environment}
        return launch(verb, checkout=self.folder, environment={**given, **options})

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
        until(lambda: not re.search(wait, self.line(run, stage)), 240)
        return self.line(run, stage)

    def steps(self, run, least):
        """Wait until pretrain has come so far."""
        until(lambda: self.read(run).get("step", 0) >= least)

    def read(self, run, name="progress.json"):
        self.must("status", RUN=run)
        file = self.folder / "runs" / run / "pretrain" / name
        return json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture(scope="module")
def client(cluster, tmp_path_factory):
    """A site set up as docs/kubernetes.md says, in a namespace enforced restricted."""
    if not isinstance(cluster, KubeLab):
        lacking("pods must see this repository; without RELAY_KUBERNETES=site")
    made = Client(cluster, tmp_path_factory.mktemp("laptop"))
    assert_refused(made.launch("data", RUN="3x"), SPACE, "kubectl create namespace")
    cluster.kubectl("create", "namespace", SPACE)
    level = "pod-security.kubernetes.io/enforce=restricted"
    cluster.kubectl("label", "namespace", SPACE, level)
    assert_refused(made.launch("data", RUN="3x"), "relay-runs", "kubernetes/site/once")
    cluster.kubectl("apply", "-k", str(made.folder / "kubernetes/site/once"))
    made.must("data", RUN="3x")
    assert "done" in made.ended("3x", "data")
    made.must("pretrain", RUN="3x", ARGS=STEPS)
    twice = made.launch("pretrain", RUN="3x", ARGS=STEPS)
    assert_refused(twice, "submitted already", "make stop")
    assert "done" in made.ended("3x", "pretrain")
    return made


def test_stages_one_by_one(client):
    """To a verdict, in a run whose name begins with a digit; the copy here has no models."""
    for stage, arguments in (("finetune", SHORT), ("align", SHORT), ("evaluate", "--limit 20")):
        client.must(stage, RUN="3x", ARGS=arguments)
        assert "done" in client.ended("3x", stage), client.must("logs", RUN="3x", STAGE=stage)
    assert "done already" in client.must("pretrain", RUN="3x", ARGS=STEPS)
    other = client.launch("pretrain", RUN="3x", ARGS="--training.steps 61")
    assert_refused(other, "exists with other settings", "Choose another RUN")
    assert not any((client.folder / "runs/3x/pretrain/model").iterdir())
    assert "3x/pretrain" in client.must("lineage", RUN="3x")
    assert "relay_choice" in client.must("logs", RUN="3x", STAGE="evaluate")


def test_it_goes_on_after_a_stop_a_deleted_and_a_killed_pod(client):
    """The same command; and no step that was saved is trained again, the loss is the same."""
    given = {"RUN": "goes-on", "DATA": "/runs/3x/data", "ARGS": STEPS}
    client.must("pretrain", **given)
    client.steps("goes-on", 10)
    client.must("stop", RUN="goes-on")
    assert "stopped" in client.line("goes-on", "pretrain")
    assert client.read("goes-on", "attempts/1.json")["exit"] == 75
    client.must("pretrain", **given)
    label = ["-n", SPACE, "-l", "torch-relay/run=goes-on"]
    until(lambda: client.read("goes-on", "attempts/2.json"))
    client.steps("goes-on", 20)
    client.cluster.kubectl("delete", "pod", *label, "--wait=false")
    until(lambda: client.read("goes-on", "attempts/3.json"))
    client.steps("goes-on", 40)
    subprocess.run(["pkill", "-9", "-f", "scripts.pretrain /runs/goes-on"], check=True)
    assert "done" in client.ended("goes-on", "pretrain")
    before = [client.read("goes-on", f"attempts/{n}.json")["highest_before"] for n in (1, 2, 3, 4)]
    assert before == sorted(set(before)), f"what was saved is lost: {before}"
    losses = [client.read(run, "stage.json")["summary"]["loss"] for run in ("3x", "goes-on")]
    assert losses[0] == losses[1]


def test_wrong_input_ends_the_job_at_once(client):
    given = {"RUN": "wrong", "DATA": "/runs/3x/data"}
    client.must("pretrain", **given, ARGS="--training.steps many")
    assert "refused" in client.ended("wrong", "pretrain")
    assert "torchtitan refuses them" in client.line("wrong", "pretrain")
    client.must("pretrain", **given, ARGS="--training.steps 10")
    assert "done" in client.ended("wrong", "pretrain"), "the job that has failed is replaced"
    client.must("clean", RUN="wrong")
    assert "wrong" not in client.cluster.kubectl("-n", SPACE, "get", "jobs,configmaps")
    assert not list(client.cluster.state.glob("volumes/*/wrong"))


def test_what_cannot_start_is_said_in_words(client):
    client.site(components="")
    given = {"RUN": "gpus", "DATA": "/runs/3x/data"}
    client.must("pretrain", **given, GPUS=str(GPUS + 1))
    until(lambda: "Insufficient nvidia.com/gpu" in client.line("gpus", "pretrain"), 20)
    client.must("stop", RUN="gpus")
    assert "cancelled" in client.line("gpus", "pretrain")
    client.site(tag="none")
    client.cluster.kubectl("-n", SPACE, "delete", "pod", "relay-desk")
    said = assert_refused(client.launch("data", RUN="image"), "does not start: ErrImagePull")
    assert "registry.example/relay:none" in said
    client.site()
    client.must("status", RUN="3x")


def test_two_clients_and_one_run(client, tmp_path):
    """The second has nothing of the first's, and sees it all the same."""
    other = Client(client.cluster, tmp_path)
    assert "done" in other.line("3x", "pretrain")
    refused = other.launch("data", RUN="3x", DATA_ARGS="too_long=cut")
    assert_refused(refused, "exists with other settings")
    (tmp_path / "runs/local/data/attempts").mkdir(parents=True)
    (tmp_path / "runs/local/data/attempts/1.json").write_text('{"attempt": 1, "ended": 1}')
    client.must("data", RUN="local")
    assert_refused(other.launch("data", RUN="local"), "ran on another cluster")
    client.must("cancel", RUN="local")


# --- nodes


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
