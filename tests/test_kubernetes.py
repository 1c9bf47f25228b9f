"""Pods on a real Kubernetes: what the cluster that the tests bring up is good for.

make test-kubernetes brings up a cluster of its own (tests/support/kube_lab.py);
RELAY_KUBERNETES=site uses the one that KUBECONFIG names, and leaves out what breaks nodes or needs
this machine's .venv in pods.
"""

import base64
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.kube_client import LONG, SPACE, Client, pods
from tests.support.kube_lab import CODE, KUBE, KubeLab, missing, repository
from tests.support.lanes import lacking
from tests.support.launching import assert_refused
from tests.support.sets import chats, write_rows
from tests.support.waiting import until

pytestmark = pytest.mark.slow  # on one worker (lanes.LANES): one cluster, which tests break
NAMES = ["node1", "node2"]
GPUS = 8
STEPS = "--training.steps 60 --checkpoint.interval 10"
LONGER = "--training.steps 9000 --checkpoint.interval 10"
SHORT = "max_steps_per_epoch=4 epochs=1"


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
    lab = KubeLab(folder, len(NAMES), GPUS, repository(), addons=["netpol"])
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
    made.become_user()
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
    until(lambda: client.read("goes-on", "attempts/2.json"), LONG)
    client.steps("goes-on", 20)
    client.cluster.kubectl("delete", "pod", *label, "--wait=false")
    until(lambda: client.read("goes-on", "attempts/3.json"), LONG)
    client.steps("goes-on", 40)
    subprocess.run(["pkill", "-9", "-f", "scripts.pretrain /runs/goes-on"], check=True)
    assert "done" in client.ended("goes-on", "pretrain")
    before = [client.read("goes-on", f"attempts/{n}.json")["highest_before"] for n in (1, 2, 3, 4)]
    # Twice the same: a pod was deleted before it had trained a step.
    assert before == sorted(before), f"what was saved is lost: {before}"
    assert before[-1] >= 40
    losses = [client.read(run, "stage.json")["summary"]["loss"] for run in ("3x", "goes-on")]
    assert losses[0] == losses[1]


# --- stages on two nodes


PAIR = {"NODES": "2", "DATA": "/runs/3x/data", "ARGS": f"{STEPS} --training.local_batch_size 8"}


@pytest.fixture(scope="module")
def unbroken(client):
    """The loss of a run on two nodes that nothing happened to."""
    client.must("pretrain", RUN="pair", **PAIR)
    assert "done" in client.ended("pair", "pretrain"), client.must("logs", RUN="pair")
    return client.read("pair", "stage.json")["summary"]["loss"]


def test_data_and_the_check_of_the_network_on_two_pods(client):
    """Without DATA, too, what two nodes prepare has the bytes of one; the demo's text is read by
    each rank, in which torch has replaced things that the text describes."""
    client.must("nccl-check", RUN="fabric", NODES="2")
    client.must("data", RUN="spread", NODES="2")
    assert "done" in client.ended("spread", "data"), client.said("spread")
    records = [client.folder / "runs" / run / "data/stage.json" for run in ("3x", "spread")]
    one, two = (json.loads(record.read_text())["outputs"]["sets"] for record in records)
    assert one["digest"] == two["digest"]
    assert "done" in client.ended("fabric", "nccl-check"), client.said("fabric")
    assert "gloo over TCP sockets" in client.line("fabric", "nccl-check")


def test_lost_pods_cost_no_other_pod(client, unbroken):
    """One run: node 0's script is killed, then node 1's; then node 0's pod is deleted, and the node
    of the other is drained: these two lose no step."""
    client.must("pretrain", RUN="lost", **PAIR)
    kubectl, reached = client.cluster.kubectl, 0
    for number, (way, index) in enumerate(
        [("kill", 0), ("kill", 1), ("delete", 0), ("drain", 1)], start=1
    ):
        until(lambda n=number: client.read("lost").get("attempt") == n, LONG)
        reached += 10
        client.steps("lost", reached)
        pod, stays = client.pods("lost")[index], client.pods("lost")[1 - index]
        if way == "kill":
            client.kill("lost", index)
        elif way == "delete":
            kubectl("-n", SPACE, "delete", "pod", pod["metadata"]["name"], "--wait=false")
        else:
            flags = ("--ignore-daemonsets", "--delete-emptydir-data", "--force")
            label = "--pod-selector=torch-relay/run=lost,batch.kubernetes.io/job-completion-index=1"
            kubectl("drain", pod["spec"]["nodeName"], *flags, label)
            kubectl("uncordon", pod["spec"]["nodeName"])
        until(lambda n=number: client.read("lost", f"attempts/{n + 1}.json"), LONG)
        until(lambda n=number: client.called("lost") == ("start", n + 1), LONG)
        now = client.pods("lost")
        assert now[1 - index]["metadata"]["uid"] == stays["metadata"]["uid"], f"{way} {index}"
        assert now[index]["metadata"]["uid"] != pod["metadata"]["uid"], f"{way} {index}"
    assert "done" in client.ended("lost", "pretrain"), client.must("logs", RUN="lost")
    assert client.read("lost", "stage.json")["summary"]["loss"] == unbroken
    tried = [client.read("lost", f"attempts/{n}.json") for n in range(1, 6)]
    assert [a.get("exit") for a in tried] == [None, 1, 75, 75, 0], "node 0 was killed first"
    log = "".join(client.texts("lost", "logs/attempt-*.log"))
    resumed = sorted(int(n) for n in re.findall(r"from its checkpoint of step (\d+)", log))
    lost = [a["highest_before"] - step for a, step in zip(tried[1:], resumed)]
    assert all(steps <= 20 for steps in lost[:2]), f"more than an interval, and a save: {lost}"
    assert all(steps <= 0 for steps in lost[2:]), f"a save was asked for: {lost}"


def test_chats_of_this_machine(client, tmp_path):
    write_rows(tmp_path / "my chats.jsonl", chats(300))
    given = {"RUN": "mine", "DATA": str(tmp_path / "my chats.jsonl")}
    assert "are there" in client.must("data", **given)
    assert "done" in client.ended("mine", "data")
    assert "300" in client.line("mine", "data")
    assert "done already" in client.must("data", **given), "the same digest, the same settings"


def test_wrong_input_ends_the_job_at_once(client):
    given = {"RUN": "wrong", "DATA": "/runs/3x/data"}
    client.must("pretrain", **given, ARGS="--training.steps many")
    assert "refused" in client.ended("wrong", "pretrain")
    assert "torchtitan refuses ARGS" in client.line("wrong", "pretrain")
    client.must("pretrain", **given, ARGS="--training.steps 10")
    assert "done" in client.ended("wrong", "pretrain"), "the job that has failed is replaced"
    client.must("clean", RUN="wrong")
    assert "wrong" not in client.cluster.kubectl("-n", SPACE, "get", "jobs,configmaps")
    assert not list(client.cluster.state.glob("volumes/*/wrong"))


def test_what_cannot_start_is_said_in_words(client):
    client.site(components=())
    given = {"RUN": "gpus", "DATA": "/runs/3x/data"}
    client.must("pretrain", **given, GPUS=str(GPUS + 1))
    until(lambda: "Insufficient nvidia.com/gpu" in client.line("gpus", "pretrain"), 20)
    client.must("stop", RUN="gpus")
    assert "cancelled" in client.line("gpus", "pretrain")
    client.site(image="localhost/torch-relay:none")
    client.cluster.kubectl("-n", SPACE, "delete", "pod", "relay-desk")
    said = assert_refused(client.launch("data", RUN="image"), "does not start: ErrImagePull")
    assert "torch-relay:none" in said
    client.site()
    client.must("status", RUN="3x")


def test_what_a_site_lacks_is_said_before_anything_is_made(own, client, namespace, tmp_path):
    """In a namespace of its own; but for a folder that cannot be written, which a Job finds."""
    other = Client(own, tmp_path, namespace)
    once, kubectl = str(tmp_path / "kubernetes/site/once"), own.kubectl
    refused = functools.partial(other.launch, "data", RUN="lacks")
    other.site(storage="missing")
    kubectl("apply", "-k", once)
    assert_refused(refused(), "storage class missing", f"kubectl -n {namespace} delete pvc")
    kubectl("-n", namespace, "delete", "pvc", "relay-runs")
    other.site(modes="ReadWriteOnce")
    kubectl("apply", "-k", once)
    assert_refused(refused(NODES="2"), "ReadWriteOnce", "for one node alone")
    other.site(image="localhost/host:1")
    assert_refused(refused(), "localhost/host:1: an image without this repository's scripts")
    other.site(components=("cpu", "kueue"))
    trained = {"RUN": "lacks", "DATA": "/runs/sets"}
    assert_refused(other.launch("pretrain", **trained), "this cluster has no Kueue")
    other.site()
    kubectl("-n", namespace, "create", "secret", "generic", "lacks-key", "--from-literal=other=x")
    served = {"RUN": "lacks", "FROM": "/runs/model", "FORCE": "1"}
    assert_refused(other.launch("deploy", **served), "secret lacks-key: has no entry named key")
    other.become_user()
    patch = [{"op": "remove", "path": "/rules/0"}]
    words = ["patch", "role", "relay-user", "--type=json", f"--patch={json.dumps(patch)}"]
    kubectl("-n", namespace, *words)
    assert_refused(refused(), "jobs", "cannot", "ask whoever owns the namespace for that verb")
    assert kubectl("-n", namespace, "get", "jobs,deployments", "-o", "name") == ""
    other.config = {}
    [folder] = own.state.glob(f"volumes/{namespace}-*")
    folder.chmod(0o755)
    other.must("data", RUN="lacks")
    until(lambda: "writable by uid 1000" in other.line("lacks", "data"), 60)
    other.must("clean", RUN="lacks")
    assert kubectl("-n", namespace, "get", "jobs", "-o", "name") == ""


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


# --- the whole line, and services

LOAD = """
import json, sys, time, urllib.request
key, until, failed, done = sys.argv[1], time.time() + float(sys.argv[2]), [], 0
body = {"model": "", "prompt": "a", "max_tokens": 2}
def ask(path, body=None):
    request = urllib.request.Request("http://chat/v1/" + path, body and json.dumps(body).encode(),
        {"Authorization": "Bearer " + key, "Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))
while time.time() < until:
    try:
        body["model"] = ask("models")["data"][0]["id"]
        ask("completions", body)
        done += 1
    except urllib.error.HTTPError as error:
        # Between the two questions another model may have come: that one is unknown to it.
        failed += [] if error.code == 404 else [str(error)]
    except OSError as error:
        failed.append(str(error))
print(json.dumps([done, failed]))
"""


def test_the_pipeline_without_its_client(client):
    """All stages on two pods, the conductor killed between two of them; then an answer, through the
    Service."""
    small = {"PRETRAIN_ARGS": STEPS, "FINETUNE_ARGS": SHORT, "ALIGN_ARGS": SHORT}
    given = {**small, "EVALUATE_ARGS": "--limit 20", "NODES": "2", "FORCE": "1"}
    client.must("pipeline", RUN="whole", **given)
    until(lambda: client.read("whole").get("step"), LONG)
    label = f"-n {SPACE} -l app.kubernetes.io/component=conductor".split()
    client.cluster.kubectl("delete", "pod", *label, "--wait=false")
    until(
        lambda: "serving" in client.line("whole", "deploy"), 2 * LONG, lambda: client.said("whole")
    )
    assert "http://whole.relay-stages/v1" in client.line("whole", "deploy")
    assert client.must("chat", RUN="whole", PROMPT="What is a list?", CLUSTER="").strip()
    refused = client.launch("pipeline", RUN="whole", **{**given, "NODES": "1"})
    assert_refused(refused, "exists with other settings")
    client.must("undeploy", RUN="whole")
    left = client.cluster.kubectl("-n", SPACE, "get", "deploy,svc,pdb", "-o", "name")
    assert "whole" not in left


def test_what_waits_is_taken_back_and_what_fails_ends_the_chain(client):
    given = {"RUN": "chain", "DATA": "/runs/3x/data"}
    client.must("pretrain", **given, ARGS="--training.steps many")
    client.must("finetune", **given, ARGS=SHORT)
    until(lambda: "cancelled" in client.line("chain", "finetune"), LONG)
    assert "waits for pretrain, which has failed" in client.line("chain", "finetune")
    client.must("pretrain", **given, ARGS="--training.steps 4000")
    client.must("finetune", **given, ARGS=SHORT)
    client.steps("chain", 5)
    said = client.must("stop", RUN="chain")
    assert said.startswith("finetune: taken from the queue\npretrain: stopped"), said
    assert "cancelled" in client.line("chain", "finetune")
    client.must("clean", RUN="chain")
    assert "chain" not in client.cluster.kubectl("-n", SPACE, "get", "jobs,configmaps")


def test_a_service_rolls_over_and_back_under_load(client):
    """Of a constant load no request fails: through a broken candidate, another model, and back."""
    client.must("deploy", RUN="3x", SERVICE="chat", FORCE="1")
    secret = client.cluster.kubectl("-n", SPACE, "get", "secret", "chat-key", "-o", "json")
    key = base64.b64decode(json.loads(secret)["data"]["key"]).decode().strip()
    client.probe("load")
    words = ["kubectl", "-n", SPACE, "exec", "load", "--", "python3", "-c", LOAD, key, "150"]
    load = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, **client.cluster.environment}
    )
    other = {"RUN": "other", "SERVICE": "chat", "FROM": "/runs/3x/pretrain/model", "FORCE": "1"}
    other["MODEL"] = "debug"
    broken = client.launch("deploy", **other, ARGS="--max-model-len 999999")
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "do not come up" in broken.stderr
    assert "run 3x serves as before" in broken.stderr
    assert "serving" in client.line("3x", "deploy")
    client.must("deploy", **other)
    assert "serving" in client.line("other", "deploy")
    assert "stopped" in client.line("3x", "deploy")
    client.must("rollback", SERVICE="chat")
    assert "serving" in client.line("3x", "deploy")
    done, failed = json.loads(load.communicate(timeout=300)[0])
    assert done > 20, "there was no load"
    assert failed == []
    nobody = client.launch("chat", RUN="other", PROMPT="x")
    assert_refused(nobody, "is not served")
    client.must("undeploy", RUN="3x")


def test_who_may_speak_to_whom(client, namespace):
    """The site's NetworkPolicies, by a controller that enforces them."""
    part = {"app.kubernetes.io/part-of": "torch-relay"}
    roles = {
        "rank": {**part, "torch-relay/ranks": "all"},
        "rank-2": {**part, "torch-relay/ranks": "all"},
        "server": {**part, "app.kubernetes.io/component": "serve"},
        "conductor": {**part, "app.kubernetes.io/component": "conductor"},
        "stage": part,  # of one pod: data
        "anybody": {},
    }
    for name, labels in roles.items():
        client.probe(name, labels)
    client.probe("stranger", space=namespace)
    asked = client.cluster.kubectl("-n", SPACE, "get", "pods", "-o", "json")
    pods = {pod["metadata"]["name"]: pod for pod in json.loads(asked)["items"]}
    there = {f"{pods[name]['status']['podIP']}:29500": name for name in roles}
    there["10.96.0.1:443"] = "API server"

    def reached(name, space=None):
        return {there[a] for a in client.reached(name, there, space)} - {name}

    assert reached("stranger", namespace) == {"anybody", "API server"}  # no policy is about them
    assert reached("anybody") == {"server", "API server"}
    assert reached("rank") == {"rank-2"}
    assert reached("conductor") == {"API server"}
    assert reached("stage") == reached("server") == set()
    client.cluster.kubectl("-n", SPACE, "delete", "pod", *roles, "--wait=false")


def test_a_model_that_was_cut_touches_nothing(client):
    folder = next(client.cluster.state.glob(f"volumes/{SPACE}-*/3x/pretrain/model"))
    shutil.copytree(folder, folder.parents[2] / "cut")
    weights = next((folder.parents[2] / "cut").glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    refused = client.launch("deploy", RUN="cut", SERVICE="cut", FROM="/runs/cut", FORCE="1")
    assert refused.returncode == 1
    assert "cut" in refused.stderr
    assert "cut" not in client.cluster.kubectl("-n", SPACE, "get", "deploy", "-o", "name")


# --- nodes


def test_a_killed_node_is_noticed_and_comes_back(own):
    own.kill_node("node2")
    until(lambda: list(ready(own)) == ["node1"], 40, own.said)
    own.start_node("node2")
    until(lambda: ready(own) == dict.fromkeys(NAMES, GPUS), 60, own.said)


def test_a_node_without_kubelet_is_lost_while_its_pod_goes_on(own, namespace):
    own.kubectl("-n", namespace, "apply", "-f", "-", input=(KUBE / "beat.yaml").read_text())
    until(lambda: beat(own, namespace), 60, lambda: pods(own, namespace))
    own.stop_kubelet("node2")
    until(lambda: list(ready(own)) == ["node1"], 40, own.said)
    last = beat(own, namespace)
    until(lambda: beat(own, namespace) > last, 10)
    own.start_kubelet("node2")
    until(lambda: ready(own) == dict.fromkeys(NAMES, GPUS), 60, own.said)


def test_a_node_that_was_given_up_saves_nothing_more(own, client):
    """Its kubelet alone is dead: its pod trains on, while another has begun in its place."""
    steps = "--training.steps 9000 --checkpoint.interval 50"
    given = {"DATA": "/runs/3x/data", "ARGS": steps}
    client.must("pretrain", RUN="given-up", **given)
    client.steps("given-up", 20)
    pod = client.pods("given-up")[0]
    node, uid = pod["spec"]["nodeName"], pod["metadata"]["uid"]
    other = next(name for name in NAMES if name != node)
    own.kubectl("cordon", other)  # the desk is to be lost, too
    own.kubectl("-n", SPACE, "delete", "pod", "relay-desk")
    client.must("status", RUN="given-up")
    own.kubectl("uncordon", other)
    own.stop_kubelet(node)
    try:
        until(lambda: node not in ready(own), 40, own.said)
        taint = f"{node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
        own.kubectl("taint", "node", *taint.split())
        until(lambda: client.read("given-up", "attempts/2.json"), LONG)
        until(lambda: len(client.scripts("given-up")) == 1, 60)
        assert client.pods("given-up")[0]["metadata"]["uid"] != uid
        begun = client.read("given-up", "attempts/2.json")["highest_before"]
        client.steps("given-up", begun + 50)
        assert not client.read("given-up", "attempts/3.json")
        client.must("stop", RUN="given-up")
    finally:
        own.kubectl("taint", "node", node, "node.kubernetes.io/out-of-service-", input="")
        own.start_kubelet(node)
        until(lambda: ready(own) == dict.fromkeys(NAMES, GPUS), 60, own.said)


def beat(cluster, namespace):
    """Return when the pod last wrote to its volume, 0 before it has."""
    written = [file.read_text() for file in cluster.state.glob(f"volumes/{namespace}-runs-*/beat")]
    return float("".join(written) or 0)


# --- Kueue, which is asked about every job from here on: last


def test_kueue_admits_one_run_after_another(own, client):
    """A whole gang or nothing: the second waits in Kueue's words, and begins when the first has
    ended; one that waits is taken back."""
    own.add("kueue")
    client.site(components=("cpu", "kueue"))
    given = {"DATA": "/runs/3x/data", "NODES": "2"}
    nobody = client.launch("pretrain", RUN="queued", **given, ARGS=STEPS)
    assert_refused(nobody, "LocalQueue gpu: not in namespace")
    own.kubectl("-n", SPACE, "apply", "-f", "-", input=(KUBE / "queue.yaml").read_text())
    until(lambda: client.launch("pretrain", RUN="first", **given, ARGS=LONGER).returncode == 0, 60)
    client.steps("first", 5)
    client.must("pretrain", RUN="queued", **given, ARGS=STEPS)
    client.must("pretrain", RUN="regretted", **given, ARGS=STEPS)
    for run in ("queued", "regretted"):
        until(
            lambda run=run: "insufficient unused quota for cpu" in client.line(run, "pretrain"), 60
        )
        assert client.line(run, "pretrain").split()[1] == "queued"
    assert client.pods("queued") == {}
    client.must("cancel", RUN="regretted")
    client.must("stop", RUN="first")
    assert "done" in client.ended("queued", "pretrain")
    client.must("pretrain", RUN="first", **given, ARGS=LONGER)
    until(lambda: client.called("first")[1] == 2, LONG, lambda: client.said("first"))
    client.must("stop", RUN="first")
