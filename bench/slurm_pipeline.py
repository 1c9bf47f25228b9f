"""The pipeline on Slurm beside the same on this machine: one table of bench.operations.

It needs a Slurm of two nodes that SLURM_CONF names; one on this machine:

    eval "$(.venv/bin/python -m tests.support.slurm_lab /tmp/lab up)"
    .venv/bin/python -m bench.operations slurm
    .venv/bin/python -m tests.support.slurm_lab /tmp/lab down
"""

import json
import os
import shutil
import sys
import time

from bench.measures import RUNS, STAGES, quiet
from scripts.run import attempts


def slurm() -> None:
    """The pipeline on two Slurm nodes against two processes on this machine, one thread each; queue
    gaps stand apart."""
    if not os.environ.get("SLURM_CONF"):
        sys.exit(f"slurm: SLURM_CONF names no cluster; how to start one:\n{__doc__}")
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = {name: RUNS / f"bench-{name}" for name in ("local", "slurm")}
    for directory in runs.values():
        shutil.rmtree(directory, ignore_errors=True)
    ready = {}
    quiet(["make", "-s", "pipeline", "RUN=bench-local", "GPUS=2"])
    ready["local"] = json.loads((runs["local"] / "deploy/server.json").read_text())["ready_seconds"]
    quiet(["make", "-s", "undeploy", "RUN=bench-local"])
    quiet(["make", "-s", "pipeline", "RUN=bench-slurm", "NODES=2", "CLUSTER=slurm"])
    try:
        while not (address := runs["slurm"] / "deploy/server.json").exists():
            time.sleep(1)
        ready["slurm"] = json.loads(address.read_text())["ready_seconds"]
    finally:
        quiet(["make", "-s", "undeploy", "RUN=bench-slurm"])
    print("| stage | local, s | Slurm, s | ratio | gap before it, s |\n|---|---|---|---|---|")
    sums, gaps, free = (
        [0.0, 0.0],
        0.0,
        json.loads((runs["slurm"] / "data/job.json").read_text())["submitted"],
    )
    for stage in STAGES:
        here, there = (attempts.history(directory / stage)[-1] for directory in runs.values())
        pair = [here["seconds"], there["seconds"]]
        if stage == "deploy":
            pair = list(ready.values())
        gap, free = there["started"] - free, there["ended"]
        sums, gaps = [a + b for a, b in zip(sums, pair)], gaps + gap
        print(f"| {stage} | {pair[0]:.0f} | {pair[1]:.0f} | {pair[1] / pair[0]:.2f} | {gap:.1f} |")
    print(f"| all | {sums[0]:.0f} | {sums[1]:.0f} | {sums[1] / sums[0]:.2f} | {gaps:.1f} |")
    for directory in runs.values():
        shutil.rmtree(directory)
