"""What DRY_RUN=1 prints, as files to read and copy: `make golden` writes them anew; a test holds
them to the truth."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.models import write_model, write_sets
from tests.support.runs import ROOT

FOLDER = ROOT / "tests/golden"
CASES = {
    "local-pipeline.txt": (
        "pipeline",
        {"RUN": "demo", "FORCE": "1", "PORT": "8001", "DEPLOY_ARGS": "--max-num-seqs 8"},
    ),
    "local-pretrain-two-processes.txt": (
        "pretrain",
        {"RUN": "two", "GPUS": "2", "ARGS": "--training.steps 20 --job.description 'two words'"},
    ),
    "slurm-pipeline.txt": (
        "pipeline",
        {"RUN": "demo", "CLUSTER": "slurm", "NODES": "2", "GPUS": "8"},
    ),
    "kubernetes-pipeline.txt": (
        "pipeline",
        {"RUN": "demo", "CLUSTER": "k8s", "NODES": "2", "GPUS": "8"},
    ),
    "slurm-quantize.txt": (
        "deploy",
        {"RUN": "mine", "CLUSTER": "slurm", "QUANTIZE": "int8"},
    ),
    "kubernetes-quantize.txt": (
        "quantize",
        {"RUN": "mine", "CLUSTER": "k8s", "RECIPE": "fp8"},
    ),
    "slurm-nccl-check.txt": (
        "nccl-check",
        {"RUN": "fabric", "CLUSTER": "slurm", "NODES": "2", "GPUS": "8"},
    ),
}
BUILD_PLAN = "image-cuda.txt"


def dry_run(verb: str, options: dict[str, str]) -> str:
    """Return the output of one dry run, on an empty environment and a folder of runs shown as
    runs/: empty, but for a run with a model where one is to be quantised."""
    with tempfile.TemporaryDirectory() as folder:
        if options.get("RUN") == "mine":
            write_run(Path(folder, "mine"))
        there = sorted(Path(folder).rglob("*"))
        env = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "RUNS": folder, **options}
        command = [sys.executable, "-m", "scripts.launch", verb]
        result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
        assert sorted(Path(folder).rglob("*")) == there, "a dry run must not write"
    assert result.returncode == 0, f"the dry run of {verb} failed:\n{result.stderr}"
    up = os.path.relpath(ROOT, os.path.join(os.path.realpath(folder), "run/stage"))
    return result.stdout.replace(folder, "runs").replace(up, "../../..")


def write_run(run: Path) -> None:
    """Write a run whose newest model is finetune's, made from the run's own data."""
    (run / "finetune").mkdir(parents=True)
    (run / "data").mkdir()
    write_model(run / "finetune/model")
    write_sets(run / "data/sets")
    (run / "finetune/stage.json").write_text('{"status": "done"}\n')
    (run / "finetune/stage.env").write_text("MODEL=smollm2_135m\nDATA=runs/mine/data/sets\n")


def build_plan() -> str:
    """Return the command that would build the GPU image, without what changes by the commit."""
    words, env = ["bash", "image/build.sh"], {"PATH": os.environ["PATH"], "DRY_RUN": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return re.sub(r"(REVISION|SOURCE|LOCK_SHA256)=\S*", r"\1=…", done.stdout)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, case in CASES.items():
        (FOLDER / name).write_text(dry_run(*case))
    (FOLDER / BUILD_PLAN).write_text(build_plan())
