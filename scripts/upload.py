"""Put a run's model on the Hugging Face hub: RUN's newest model, or STAGE's → REPO=org/name.

    RUN=mine REPO=org/name .venv/bin/python -m scripts.upload

Private, unless PUBLIC=1. Nothing is asked. FORCE=1 writes over what the repository holds; DRY_RUN=1
prints the card and lists the files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts.launcher import card, options, report
from scripts.run import modeldir
from scripts.run.digests import Digests
from scripts.run.errors import InputError
from scripts.run.layout import finished
from scripts.tools.hub import command, put
from scripts.tools.hub_download import LICENCES, files_of, matches


def upload(env: Mapping[str, str]) -> str:
    """Upload a model with its card; return where it is. Raises InputError or NotNow."""
    asked = options.read("upload", env)
    repository = env.get("REPO", "").strip()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"REPO={repository}: give a name on the hub, as REPO=org/name")
    report.check_exists(asked.run)
    directory = report.made_model(asked.run, asked.stage)
    model = directory / "model"
    found = modeldir.problems(model)
    recorded = finished(directory)["outputs"]["model"]["digest"]
    now = Digests(asked.run, remember=not asked.dry_run).of_tree(model)
    if now != recorded:
        found.append(f"{model}: was changed since {directory.name} made it; make lineage tells")
    if found:
        raise InputError(found)
    text = card.card(directory, repository)
    files: dict[str, Path | bytes] = {name: model / name for name in files_of(model)}
    base = card.origins(directory).base
    for path in sorted(base.iterdir()) if base and base.is_dir() else []:
        if matches(path.name, LICENCES):  # a licence that asks to be handed on with the weights
            files.setdefault(path.name, path)
    files["README.md"] = text.encode()
    if asked.dry_run:
        return "\n".join([text, *sorted(files), f"would go to {repository}"])
    public = env.get("PUBLIC", "") not in ("", "0")
    message = f"{directory.name} of run {asked.run.name}, by Torch Relay"
    url, commit = put(repository, files, message, public, asked.force)
    return f"{url}: commit {commit}, {'public' if public else 'private'}, {len(files)} files"


if __name__ == "__main__":
    sys.exit(command(upload))
