"""Pretrain with torchtitan: text/ + tokenizer → model/, from random weights or from FROM.

A cluster runs it: python -m scripts.pretrain runs/<run>/pretrain
"""

import shutil
from pathlib import Path

from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.run.errors import InputError
from scripts.run.modeldir import hand_over, tokenizer_problems
from scripts.tools import torchtitan


def main(stage: Parent) -> dict:
    """Give the ranks a tokenizer and an architecture; hand over what they export."""
    assets = stage.path("FROM") if "FROM" in stage.facts else compose_assets(stage)
    export = stage.scratch("export")
    stage.ranks()
    stage.phase("hands the model over")
    model = hand_over(export, assets, stage.directory / "model", stage.digests)
    describe = stage.digests.describe
    return {
        "inputs": {"data": describe(stage.path("DATA")), "assets": describe(assets)},
        "outputs": {"model": model},
        "summary": stage.progress,
    }


def compose_assets(stage: Parent) -> Path:
    """Make the directory that a new model starts from: the run's architecture and the data's
    tokenizer. Raises InputError if they do not fit."""
    if not (stage.path("DATA") / "tokenizer").exists():
        raise InputError(f"{stage.path('DATA')}: made for a model's tokenizer; give that FROM=")
    assets = stage.scratch("assets")
    shutil.copytree(stage.path("DATA") / "tokenizer", assets)
    shutil.copyfile(stage.directory / "architecture.json", assets / "config.json")
    found = tokenizer_problems(assets)
    if found:
        raise InputError(found)
    return assets


if __name__ == "__main__":
    run(main, torchtitan.train)
