"""kubernetes/ as kubectl renders it, without a cluster: what is submitted for each stage, that
every pod keeps the "restricted" standard, what components change."""

import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from scripts.clusters.kubectl import Kubectl
from scripts.clusters.kubernetes_text import VOLUME
from scripts.run import stages
from tests.support.goldens import dry_run
from tests.support.kube_text import GPU, everything, kustomize, pods, render
from tests.support.lanes import lacking
from tests.support.runs import STAGES


@pytest.mark.parametrize("stage", [*STAGES, "quantize"])
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
        line = f"# - ../components/{component}\n"
        text = text.replace(line, line[2:])
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
    for line in ("# - ../components/efa\n", "# - ../components/kueue\n"):
        site.write_text(site.read_text().replace(line, line[2:]))
    train, data = (render(s, checkout, monkeypatch)["Job"] for s in ("pretrain", "data"))
    node = train["spec"]["template"]["spec"]["containers"][0]
    assert node["resources"]["limits"]["vpc.amazonaws.com/efa"] == 32
    assert {"name": "NCCL_NET", "value": "AWS Libfabric"} in node["env"]
    assert train["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert train["spec"]["suspend"] is True
    assert "suspend" not in data["spec"]


def test_a_site_is_adapted_in_its_own_folder_alone(checkout, monkeypatch):
    """Its lines are uncommented and changed as an admin would; no other file is."""
    site = checkout / "kubernetes/site"
    main = (site / "kustomization.yaml").read_text()
    main = re.sub(r"^  # (- \.\./components/(efa|kueue|infiniband))$", r"  \1", main, flags=re.M)
    main = re.sub(r"^      # (- \{|   )(?=.*[\]}:,])", r"      \1", main, flags=re.M)
    for old, new in (
        ("value: 32", "value: 4"),
        ("value: gpu", "value: team-a"),
        ("path: /spec/template/spec/containers/0/resources/limits/rdma~1ib", "rdma~1hca"),
        ("p5.48xlarge}", "p4d.24xlarge}"),
        ("registry.example/torch-relay", "ghcr.io/us/relay"),
    ):
        assert main.count(old) == 1, f"{old} is not one line of the site's file"
        main = main.replace(old, old.replace("rdma~1ib", new) if "rdma" in old else new)
    (site / "kustomization.yaml").write_text(main)
    for name, old, new in (
        ("namespace/kustomization.yaml", "namespace: torch-relay", "namespace: team-a"),
        ("once/volume.yaml", "fsx-lustre", "shared"),
    ):
        text = (site / name).read_text()
        assert text.count(old) == 1
        (site / name).write_text(text.replace(old, new))
    job = render("pretrain", checkout, monkeypatch)["Job"]
    pod = job["spec"]["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits["vpc.amazonaws.com/efa"] == 4
    assert "rdma/ib" not in limits
    assert limits["rdma/hca"] == 1
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "p4d.24xlarge"}
    assert pod["containers"][0]["image"] == "ghcr.io/us/relay:1"
    shared = everything(site / "once")
    [claim] = [o for o in shared if o["kind"] == "PersistentVolumeClaim"]
    [bound] = [o for o in shared if o["kind"] == "RoleBinding"]
    assert claim["spec"]["storageClassName"] == "shared"
    assert bound["subjects"][0]["namespace"] == "team-a"
    assert {o["metadata"]["namespace"] for o in [job, *shared]} == {"team-a"}
    monkeypatch.setattr("scripts.clusters.kubectl.ROOT", checkout)
    assert Kubectl({}).namespace == "team-a"


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
        ("Role", "relay-user"),
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
    made = re.findall(r"^kubectl create -k (\S+)", said["k8s"], re.M)
    assert made == ["runs/x/data", "runs/x/conductor"]


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
