"""What a client of a Kubernetes says, without a cluster: mistakes, and what waits, in words."""

import shutil

import pytest

from scripts.clusters.kubectl import in_words
from scripts.clusters.kubernetes import Kubernetes
from scripts.clusters.kubernetes_pods import Pods
from scripts.clusters.kubernetes_text import VOLUME
from tests.support.kube_text import submission
from tests.support.lanes import lacking
from tests.support.launching import assert_refused, launch


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("deploy", {"FROM": f"{VOLUME}/m", "RUN": "3x"}, ["SERVICE=3x", "a-z first"]),
        ("deploy", {"FROM": f"{VOLUME}/m", "SERVICE": "relay"}, ["not relay", "SERVICE=chat"]),
        ("data", {"DATA": "/data/chats.jsonl"}, ["neither here nor below", VOLUME]),
        ("data", {"RUNTIME": "docker"}, ["RUNTIME", "kubernetes/site"]),
        ("data", {"NODES": "four"}, ["NODES=four", "whole number"]),
    ],
)
def test_mistakes_are_named_in_a_dry_run(runs, verb, options, words):
    given = {"RUN": "x", "CLUSTER": "k8s", "DRY_RUN": "1", **options}
    assert_refused(launch(verb, **given), *words)
    assert not runs.exists()


def test_a_submission_that_is_too_large(tmp_path):
    made = submission("evaluate", tmp_path)
    made.files["tasks/b.yaml"] = "b" * (1 << 20)
    [said] = Kubernetes({}).problems(made, dry_run=True)
    assert "1,048,576 may be" in said


def test_no_kubectl(runs, tmp_path):
    given = {"RUN": "x", "CLUSTER": "k8s", "PATH": str(tmp_path)}
    assert_refused(launch("data", **given), "kubectl: not on PATH")


def test_no_cluster_answers(runs, tmp_path):
    if not shutil.which("kubectl"):
        lacking("kubectl: not on PATH")
    (tmp_path / "config").write_text("")
    given = {"RUN": "x", "CLUSTER": "k8s", "KUBECONFIG": str(tmp_path / "config")}
    assert_refused(launch("data", **given), "refused", "is the cluster up")


# --- in words


def test_kubectl_in_words():
    log = 'E1126 19:16:46.6 9899 memcache.go:265] "Unhandled Error" err="x"\n'
    forbidden = 'Error from server (Forbidden): jobs is forbidden: User "me" cannot create "jobs"'
    assert in_words(log + forbidden).startswith('jobs is forbidden: User "me" cannot create')
    of_a_file = forbidden.replace("(Forbidden): ", '(Forbidden): error when creating "/tmp/x": ')
    assert in_words(of_a_file) == in_words(forbidden)


def pod(phase="Pending", **status):
    meta = {"creationTimestamp": "2026-11-26T10:00:00Z"}
    return {"metadata": meta, "spec": {"nodeName": "node1"}, "status": {"phase": phase, **status}}


def test_what_a_pod_waits_for():
    said = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "message": said}
    assert Pods([pod(conditions=[condition])]).waiting == said
    state = {"waiting": {"reason": "ImagePullBackOff", "message": "not there"}}
    assert (
        Pods([pod(containerStatuses=[{"state": state}])]).waiting == "ImagePullBackOff: not there"
    )
    ended = {"terminated": {"exitCode": 64, "message": "a\nerror: the volume\n"}}
    assert Pods([pod(initContainerStatuses=[{"state": ended}])]).last_words == "error: the volume"
    assert Pods([pod("Running")]).nodes == ["node1"]
    lost = pod("Running")
    lost["metadata"] |= {"name": "x-0", "deletionTimestamp": "2026-11-26T10:00:00Z"}
    assert Pods([lost]).stuck.endswith(
        "node1 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
    )
    lost["metadata"]["deletionTimestamp"] = "2199-01-01T10:00:00Z"
    assert Pods([lost]).stuck == "", "its grace is not over"
