"""A run on a volume that this machine does not see, and the copy of its small files here. A pod of
the site, the desk, reads the volume (kubectl.py)."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from scripts.clusters.kubectl import Kubectl
from scripts.clusters.kubernetes_text import VOLUME
from scripts.run import attempts, stages
from scripts.run.errors import InputError
from scripts.run.files import read_json, write_json
from scripts.run.layout import Run

NAME = "k8s"  # CLUSTER=
COPY = "k8s.json"  # in a run's folder here: it is a copy, of which namespace
# Of a stage's folder here, not on the volume.
OURS = ("job.json", "kustomization.yaml", ".lock", "waits", "serve")
OTHER = "choose another RUN, or another RUNS"


class RunCopy:
    """Read and remove runs on the volume, for a client with this environment."""

    def __init__(self, environment: Mapping[str, str], kubectl: Kubectl):
        self.environment, self.kubectl = environment, kubectl

    def concerns(self, run: Run) -> bool:
        """Whether a run has anything here: as it was submitted, or as CLUSTER says. A dry run asks
        no cluster."""
        if self.environment.get("DRY_RUN", "0") not in ("", "0"):
            return False
        if self.environment.get("CLUSTER") == NAME:
            return bool(shutil.which("kubectl", path=self.environment.get("PATH")))
        return (run.directory / COPY).exists()

    def mark(self, run: Run) -> None:
        """Say that the run's folder here is a copy of this namespace's. Raises InputError if it is
        not: a copy replaces what is there, and models that were trained here would be lost."""
        known = read_json(run.directory / COPY)
        if known is None and any(attempts.history(run.stage(name)) for name in stages.names()):
            raise InputError(f"RUN={run.name}: ran on another cluster, in {run.directory}: {OTHER}")
        if known is not None and known["namespace"] != self.kubectl.namespace:
            said = f"is a copy of the one in namespace {known['namespace']}, this is"
            raise InputError(f"RUN={run.name}: {said} {self.kubectl.namespace}: {OTHER}")
        if known is None:
            run.directory.mkdir(parents=True, exist_ok=True)
            write_json(run.directory / COPY, {"namespace": self.kubectl.namespace})

    def fetch(self, run: Run) -> None:
        """Copy the run's small files from the volume, by the desk."""
        if not self.concerns(run):
            return
        told = json.loads(self.kubectl.volume("read", f"{VOLUME}/{run.name}"))
        if not told and not run.directory.exists():
            return
        self.mark(run)
        began = time.time() - 60
        for stage in stages.names():
            directory = run.stage(stage)
            if stage not in told and not attempts.history(directory):
                continue  # submitted, and not there yet
            for path in list(directory.iterdir()) if directory.is_dir() else []:
                if path.name not in OURS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            for number, (name, text) in enumerate(told.get(stage, {}).items()):
                path = directory / name
                if directory.resolve() not in path.resolve().parents:
                    raise InputError(f"{run.name}/{stage}: the volume names {name!r}")
                (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
                if not name.endswith("/"):
                    path.write_text(text, encoding="utf-8")
                    age = (began + number / 1000,) * 2  # in one tick of the clock all are as old
                    os.utime(path, age)  # make logs shows the newest

    def beside(self, run: Run, verb: str) -> Optional[tuple[int, str]]:
        """Run the image's own launcher in the desk."""
        if not self.concerns(run):
            return None
        variables = ("env", f"RUNS={VOLUME}", f"RUN={run.name}", "CLUSTER=local")
        done = self.kubectl.desk(*variables, "python3", "-m", "scripts.launch", verb)
        return done.returncode, done.stdout

    def remove(self, path: Path, run: Run) -> None:
        """Remove a run or a stage on the volume."""
        self.kubectl.volume("remove", f"{VOLUME}/{path.resolve().relative_to(run.root.resolve())}")
