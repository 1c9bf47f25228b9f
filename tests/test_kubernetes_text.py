"""kubernetes/ as kubectl renders it, without a cluster: what is submitted for each stage, that
every pod keeps the "restricted" standard, what components change, and mistakes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import kubernetes_validate
import pytest
import yaml

from scripts import rollout, volume
from scripts.clusters import kubernetes_bring
from scripts.clusters.kubectl import Kubectl, in_words
from scripts.clusters.kubernetes import Kubernetes
from scripts.clusters.kubernetes_pods import Pods
from scripts.clusters.kubernetes_service import Services
from scripts.clusters.kubernetes_text import VOLUME, kustomization
from scripts.run import attempts, stages
from scripts.run.errors import InputError
from scripts.run.layout import Run
from scripts.run.submission import SERVED, Submission, as_key, from_key
from tests.support.goldens import dry_run
from tests.support.lanes import lacking
from tests.support.launching import assert_refused, launch
from tests.support.runs import ROOT, STAGES, read_json

GPU = "nvidia.com/gpu"


@pytest.fixture
def checkout(tmp_path):
    """A folder with kubernetes/ alone, to change."""
    shutil.copytree(ROOT / "kubernetes", tmp_path / "kubernetes")
    return tmp_path


def submission(stage, folder, nodes=1, gpus=1):
    files = {"stage.env": "MODEL=debug\n", "args.json": "[]\n", "tasks/a.yaml": "task: a\n"}
    return Submission(folder / "runs/1e3" / stage, nodes, gpus, files)


def render(stage, checkout, monkeypatch, **shape):
    """Return {kind: object} of what kubectl makes of a stage's submission."""
    if not shutil.which("kubectl"):
        lacking("kubectl: not on PATH")
    monkeypatch.setattr("scripts.clusters.kubernetes_text.ROOT", checkout)
    made = submission(stage, checkout, **shape)
    made.write("")
    (made.directory / SERVED).write_text("")
    text = kustomization(made)
    (made.directory / "kustomization.yaml").write_text(text)
    return kustomize(made.directory)


def kustomize(folder):
    words = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {item["kind"]: item for item in yaml.safe_load_all(done.stdout)}


def pods(objects):
    """List the pod specs among objects."""
    for item in objects.values():
        if item["kind"] == "Pod":
            yield item["spec"]
        elif "template" in item.get("spec", {}):
            yield item["spec"]["template"]["spec"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_one_job_with_what_the_run_says(stage, checkout, monkeypatch):
    row = stages.row(stage)
    shape = {"nodes": 3, "gpus": 8} if row.ranks else {}
    made = render(stage, checkout, monkeypatch, **shape)
    assert sorted(made) == ["ConfigMap", "Job"], "what is for kustomize alone must not be sent"
    job, node = made["Job"], made["Job"]["spec"]["template"]["spec"]["containers"][0]
    assert job["metadata"]["name"] == f"1e3-{stage}"
    assert job["metadata"]["labels"]["torch-relay/run"] == "1e3", "a string, not a number"
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert (labels["torch-relay/run"], labels["torch-relay/stage"]) == ("1e3", stage)
    assert node["command"] + node["args"] == [
        *("python3", "-m", "scripts.rollout" if row.serves else f"scripts.{row.module}"),
        f"{VOLUME}/1e3/{stage}",
    ]
    told = {entry["name"]: entry.get("value") for entry in node["env"]}
    nodes, gpus = shape.get("nodes", 1), shape.get("gpus", 1)
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (nodes, nodes)
    assert (told["PET_NNODES"], told["PET_NPROC_PER_NODE"]) == (str(nodes), str(gpus))
    assert node["resources"]["limits"].get(GPU) == (None if stage in ("data", "deploy") else gpus)
    volumes = job["spec"]["template"]["spec"]["volumes"]
    [mounted] = [v["configMap"]["name"] for v in volumes if "configMap" in v]
    assert mounted == made["ConfigMap"]["metadata"]["name"] != f"1e3-{stage}", "named by its digest"
    assert made["ConfigMap"]["data"]["tasks..a.yaml"] == "task: a\n"


def test_what_ends_a_job_and_what_does_not(checkout, monkeypatch):
    spec = render("pretrain", checkout, monkeypatch)["Job"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    said = [(r["action"], r.get("onExitCodes", {}).get("values")) for r in rules]
    assert said == [("FailJob", [64, 70]), ("Ignore", None), ("Ignore", [75])]
    condition = {"type": "DisruptionTarget", "status": "True"}
    assert rules[1]["onPodConditions"] == [condition], "Kubernetes before 1.35 wants its status"
    assert spec["successPolicy"]["rules"] == [{"succeededIndexes": "0"}]
    assert spec["podReplacementPolicy"] == "Failed", "a pod that is ending may still write"


@pytest.mark.parametrize("component", ["", "cpu", "efa", "infiniband", "kueue", "no-spare-gpu"])
def test_every_pod_is_restricted(component, checkout, monkeypatch):
    """Pod Security Standards, level restricted, and what this project asks beyond them."""
    site = checkout / "kubernetes/site/kustomization.yaml"
    text = site.read_text()
    if component:
        assert f"  # - ../components/{component}\n" in text, "an admin takes it by one line"
        text = text.replace("  []\n", "").replace(
            f"# - ../components/{component}\n", f"- ../components/{component}\n"
        )
        site.write_text(text)
    objects = [render(stage, checkout, monkeypatch) for stage in STAGES]
    site = checkout / "kubernetes/all/kustomization.yaml"
    site.parent.mkdir()
    site.write_text("resources: [../desk, ../conductor, ../serve]\ncomponents: [../site]\n")
    objects.append(kustomize(site.parent))
    for spec in (spec for made in objects for spec in pods(made)):
        account = spec.get("serviceAccountName")
        assert account == "relay-conductor" or spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        own = spec["securityContext"]
        assert own["runAsNonRoot"]
        assert own["runAsUser"] > 0
        assert own["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for volume_ in spec["volumes"]:
            assert set(volume_) - {"name"} <= {"configMap", "persistentVolumeClaim", "emptyDir"}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            held = container["securityContext"]
            assert held["allowPrivilegeEscalation"] is False
            assert held["readOnlyRootFilesystem"]
            assert held["capabilities"] == {"drop": ["ALL"]}, (
                "IPC_LOCK is refused, and does nothing"
            )
            assert container["image"] == "registry.example/torch-relay:1"
            if component == "cpu":
                assert GPU not in container["resources"]["limits"]


def test_components_reach_the_stages_with_ranks_alone(checkout, monkeypatch):
    site = checkout / "kubernetes/site/kustomization.yaml"
    added = "  - ../components/efa\n  - ../components/kueue\n"
    site.write_text(site.read_text().replace("  []\n", added))
    train, data = (render(s, checkout, monkeypatch)["Job"] for s in ("pretrain", "data"))
    node = train["spec"]["template"]["spec"]["containers"][0]
    assert node["resources"]["limits"]["vpc.amazonaws.com/efa"] == 32
    assert {"name": "NCCL_NET", "value": "AWS Libfabric"} in node["env"]
    assert train["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert train["spec"]["suspend"] is True
    assert "suspend" not in data["spec"]


def test_what_the_namespace_shares(checkout):
    if not shutil.which("kubectl"):
        lacking("kubectl: not on PATH")
    words = ["kubectl", "kustomize", str(checkout / "kubernetes/site/once")]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    kinds = sorted((i["kind"], i["metadata"]["name"]) for i in yaml.safe_load_all(shown))
    assert kinds == [
        ("NetworkPolicy", "relay-conductor"),
        ("NetworkPolicy", "relay-default"),
        ("NetworkPolicy", "relay-ranks"),
        ("NetworkPolicy", "relay-serve"),
        ("PersistentVolumeClaim", "relay-runs"),
        ("Role", "relay-conductor"),
        ("RoleBinding", "relay-conductor"),
        ("Service", "relay"),
        ("ServiceAccount", "relay-conductor"),
    ]


def test_local_and_kubernetes_run_the_same(tmp_path):
    """The same files, facts among them, and the same script."""
    said = {c: dry_run("data", {"RUN": "x", "CLUSTER": c}) for c in ("local", "k8s")}
    files = said["local"][: said["local"].rindex("EOF\n")]
    assert said["k8s"].startswith(files)
    assert "-m scripts.data runs/x/data" in said["local"]
    assert said["k8s"].rstrip().endswith("kubectl create -k runs/x/data")


# --- what runs beside the volume


def mounted(folder, **files):
    """Write a submission as a ConfigMap is mounted."""
    flat = folder / "submission"
    flat.mkdir(exist_ok=True)
    (flat / "..data").mkdir(exist_ok=True)
    for name, text in {"args.json": "[]\n", "tasks..a.yaml": "a", **files}.items():
        (flat / name).write_text(text)
    return flat


def test_a_submission_is_received_once(tmp_path, capsys):
    stage = tmp_path / "runs/x/pretrain"
    first = mounted(tmp_path, **{"stage.env": "MODEL=debug\n"})
    assert volume.main(["receive", str(first), str(stage), "k8s:1"]) == 0
    assert (stage / "tasks/a.yaml").read_text() == "a"
    assert volume.main(["receive", str(first), str(stage), "k8s:1"]) == 0, (
        "a replaced pod receives it again"
    )
    (stage / "checkpoints").mkdir()
    other = mounted(tmp_path, **{"stage.env": "MODEL=other\n"})
    assert volume.main(["receive", str(other), str(stage), "k8s:1"]) == 64
    assert "MODEL was debug, now other" in capsys.readouterr().err
    assert "debug" in (stage / "stage.env").read_text()


def test_a_new_job_takes_over_from_one_that_is_gone(tmp_path):
    """Its name was free, so its pods are gone; another scheduler's attempt is left alone."""
    stage = tmp_path / "runs/x/pretrain"
    flat = mounted(tmp_path, **{"stage.env": "MODEL=debug\n"})
    for job, ended in (("k8s:old", True), ("lab:7", False)):
        shutil.rmtree(stage, ignore_errors=True)
        attempts.begin(stage, job, "pod")
        record = {**read_json(stage / "attempts/1.json"), "host": "another"}
        (stage / "attempts/1.json").write_text(json.dumps(record))
        volume.main(["receive", str(flat), str(stage), "k8s:new"])
        assert ("ended" in read_json(stage / "attempts/1.json")) is ended


def test_small_files_are_read_and_large_ones_are_not(tmp_path, capsys):
    stage = tmp_path / "x/pretrain"
    for name, text in {
        "stage.json": "{}",
        "logs/attempt-1.log": "a" * (volume.SMALL + 10) + "end",
        "model/config.json": "{}",
        "api-key": "secret",
        "derived.jsonl": "a" * (volume.SMALL + 1),
        "sets/data.json": '{"rows": {}}',
    }.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text(text)
    assert volume.main(["read", str(tmp_path / "x")]) == 0
    told = json.loads(capsys.readouterr().out)["pretrain"]
    assert sorted(told) == ["logs/attempt-1.log", "model/", "sets/", "sets/data.json", "stage.json"]
    assert told["logs/attempt-1.log"].endswith("end")
    assert len(told["logs/attempt-1.log"]) == volume.SMALL


def test_what_runs_is_not_removed(tmp_path, capsys):
    stage = tmp_path / "x/data"
    attempts.begin(stage)
    assert volume.main(["remove", str(tmp_path / "x")]) == 64
    assert "runs; first make stop RUN=x" in capsys.readouterr().err
    attempts.end(stage, read_json(stage / "attempts/1.json"), 0, "")
    assert volume.main(["remove", str(tmp_path / "x")]) == 0
    assert not (tmp_path / "x").exists()


def test_a_key_of_a_map_is_a_name_again():
    for name in ("stage.env", "tasks/relay_text.yaml"):
        assert from_key(as_key(name)) == name
        assert "/" not in as_key(name)


# --- mistakes, before anything is asked of a cluster


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


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """A cluster whose desk reads `told`, and a run here."""
    cluster = Kubernetes({"CLUSTER": "k8s", "PATH": os.environ["PATH"]})
    monkeypatch.setattr(cluster.copy, "concerns", lambda run: True)
    monkeypatch.setattr(Kubectl, "volume", lambda self, *words: json.dumps(cluster.told))
    return cluster, Run(tmp_path / "runs", "x")


def test_the_copy_here_follows_the_volume(seen):
    cluster, run = seen
    cluster.told = {}
    cluster.fetch(run)
    assert not run.directory.exists(), "of a run that is nowhere nothing is made"
    cluster.told = {"data": {"stage.json": "{}", "sets/": "", "attempts/1.json": "{}"}}
    cluster.fetch(run)
    assert (run.stage("data") / "stage.json").read_text() == "{}"
    (run.stage("data") / "job.json").write_text("{}")
    cluster.told = {"data": {"stage.env": ""}}
    cluster.fetch(run)
    left = sorted(path.name for path in run.stage("data").iterdir())
    assert left == ["job.json", "stage.env"], "what was removed there is removed here"


def test_what_was_trained_here_is_not_replaced_by_a_copy(seen):
    cluster, run = seen
    attempts.begin(run.stage("data"))
    cluster.told = {}
    with pytest.raises(InputError, match="ran on another cluster"):
        cluster.fetch(run)
    assert attempts.history(run.stage("data"))


def test_the_volume_names_no_file_outside_the_run(seen):
    cluster, run = seen
    cluster.told = {"data": {"../../../evil": "x"}}
    with pytest.raises(InputError, match="the volume names"):
        cluster.fetch(run)
    assert not (run.root.parent / "evil").exists()


# --- what is brought


class Desk:
    """Runs the verbs of scripts/volume.py here, as a kubectl would in the desk."""

    def __init__(self, cut_after=99):
        self.calls, self.cut_after = [], cut_after

    def volume(self, *words, given=b""):
        self.calls.append(words[0])
        if len(self.calls) > self.cut_after:
            raise InputError("the line was cut")
        run = [sys.executable, "-m", "scripts.volume", *words]
        done = subprocess.run(run, input=given, capture_output=True, cwd=ROOT)
        if done.returncode:
            raise InputError(done.stderr.decode())
        return done.stdout.decode()


@pytest.fixture
def small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes_bring, "VOLUME", str(tmp_path / "volume"))
    monkeypatch.setattr(kubernetes_bring, "CHUNK", 100)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_brought_arrives_whole_and_goes_on(kind, tmp_path, small_chunks):
    source = tmp_path / "my chats.jsonl"
    if kind == "file":
        source.write_bytes(os.urandom(950))
    else:
        (source / "deep").mkdir(parents=True)
        for name, size in (("a", 250), ("deep/b", 120), ("empty", 0)):
            (source / name).write_bytes(os.urandom(size))
    run = Run(tmp_path / "runs", "x")
    cut = kubernetes_bring.Bringer(Desk(cut_after=3))
    fact = cut.place(source, run)
    with pytest.raises(InputError, match="cut"):
        cut.bring({"DATA": fact})
    assert not Path(fact).exists(), "half of it must not have its name"
    desk = Desk()
    again = kubernetes_bring.Bringer(desk)
    assert again.place(source, run) == fact
    again.bring({"DATA": fact})
    names = [p.relative_to(source) for p in source.rglob("*") if p.is_file()] or [Path()]
    assert all((fact / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert desk.calls.count("append") < 10, "what was there is not sent again"
    desk.calls.clear()
    again.bring({"DATA": fact, "MODEL": "debug"})
    assert desk.calls == ["have"], "once for all runs"


def test_what_comes_damaged_is_refused(tmp_path):
    there = tmp_path / "x"
    with pytest.raises(InputError, match="came damaged"):
        volume.append(there, "", 0, "0" * 64, b"abc")
    with pytest.raises(InputError, match="comes too early"):
        volume.append(there, "", 5, hashlib.sha256(b"abc").hexdigest(), b"abc")
    with pytest.raises(InputError, match="leads out"):
        volume.append(there, "../../evil", 0, hashlib.sha256(b"abc").hexdigest(), b"abc")
    volume.append(there, "", 0, hashlib.sha256(b"abc").hexdigest(), b"abc")
    with pytest.raises(InputError, match="is not what was sent"):
        volume.keep(there, "0" * 64)
    assert volume.have(there) == {}, "it begins anew"


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes_bring, "MOST", 10)
    (tmp_path / "a").write_text("more than ten")
    with pytest.raises(InputError, match="Copy it to the volume yourself"):
        kubernetes_bring.Bringer(Desk()).place(tmp_path / "a", Run(tmp_path, "x"))


# --- what the API servers of six releases know


def test_every_object_is_valid(checkout, monkeypatch):
    """No field that a release does not know: its API server would drop it, and with it a policy."""
    objects = [item for stage in STAGES for item in render(stage, checkout, monkeypatch).values()]
    for name in ("desk", "conductor", "serve", "site/once"):
        objects += everything(checkout / "kubernetes" / name)
    assert len(objects) > 25
    for version in ("1.32", "1.33", "1.34", "1.35", "1.36", "1.37"):
        for item in objects:
            kubernetes_validate.validate(item, version, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**item, "spec": {"typo": []}}, version, strict=True)


def everything(folder):
    """List the objects that kubectl makes of a folder."""
    words = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


# --- services


class Asked:
    """A kubectl that renders, and answers everything else alike."""

    namespace = "torch-relay"

    def __init__(self, deployment, stderr=""):
        self.deployment, self.stderr = deployment, stderr

    def must(self, *words):
        done = subprocess.run(["kubectl", *words], capture_output=True, text=True, check=True)
        return done.stdout

    def get(self, kind, name):
        return self.deployment

    def call(self, *words, **_):
        return SimpleNamespace(returncode=bool(self.stderr), stderr=self.stderr)


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
        site.write_text(site.read_text().replace("  []\n", "").replace(line, line[2:]))
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
