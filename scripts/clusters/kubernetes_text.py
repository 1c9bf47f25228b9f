"""What a stage's submission looks like to kustomize: the one file that stands beside its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from scripts.run.layout import ROOT, relative
from scripts.run.submission import SERVED, Submission, as_key

VOLUME = "/runs"  # where pods see the runs


def kustomization(submission: Submission, folder: Optional[Path] = None) -> str:
    """Format the kustomization of a stage, to lie in a folder (default: the stage's) beside its
    files: kubernetes/<stage>, what the run says of it, and the site."""
    row = submission.row
    up = os.path.relpath(ROOT / "kubernetes", (folder or submission.directory).resolve())
    job = f"{submission.run.name}-{row.name}"
    facts = {
        "JOB": job,
        "RUN": submission.run.name,
        "DIRECTORY": f"{VOLUME}/{submission.run.name}/{row.name}",
        "NODES": submission.nodes,
        "GPUS": submission.gpus,
    }
    names = [*submission.files, *([SERVED] if row.serves else [])]
    keys = [(as_key(name), name) for name in names]
    lines = [
        f"# kubectl create -k {relative(submission.directory)}",
        f"resources: [{up}/{row.name}]",
        "configMapGenerator:",
        "  - name: facts # for kustomize alone: not sent",
        "    options: {annotations: {config.kubernetes.io/local-config: 'true'}}",
        "    literals:",
        *(f"      - {key}={value}" for key, value in facts.items()),
        f"  - name: {job}",
        "    files:",
        *(f"      - {key if key == name else f'{key}={name}'}" for key, name in keys),
        f"components: [{up}/base/facts, {up}/site]",
    ]
    return "\n".join(lines) + "\n"
