"""What kubectl makes of kubernetes/, for tests that need no cluster."""

import shutil
import subprocess

import yaml

from scripts.clusters.kubernetes_text import kustomization
from scripts.run.submission import SERVED, Submission
from tests.support.lanes import lacking

GPU = "nvidia.com/gpu"


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


def everything(folder):
    """List the objects that kubectl makes of a folder."""
    words = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))
