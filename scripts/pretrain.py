"""Pretrain from random weights, or from FROM, with torchtitan: text.jsonl + tokenizer → model/.

python -m scripts.pretrain runs/<run>/pretrain
"""

import shutil
from pathlib import Path

from scripts.job.stage import Stage, run
from scripts.run import digests
from scripts.run.errors import InputError
from scripts.run.modeldir import hand_over, tokenizer_problems


def main(stage: Stage) -> dict:
    """Around the ranks: a tokenizer and an architecture before, the Hugging Face directory after."""
    assets = stage.path("FROM") if "FROM" in stage.facts else compose_assets(stage)
    export = stage.scratch("export")
    stage.ranks()
    model = hand_over(export, assets, stage.directory / "model")
    return {
        "inputs": {"data": digests.describe(stage.path("DATA")), "assets": digests.describe(assets)},
        "outputs": {"model": model},
        "summary": stage.progress,
    }


def compose_assets(stage: Stage) -> Path:
    """The directory a model is born from: the frozen architecture and the data's tokenizer."""
    assets = stage.scratch("assets")
    shutil.copytree(stage.path("DATA") / "tokenizer", assets)
    shutil.copyfile(stage.directory / "architecture.json", assets / "config.json")
    found = tokenizer_problems(assets)
    if found:
        raise InputError(found)
    return assets


def rank(stage: Stage) -> None:
    """One rank: torchtitan's own configuration and trainer."""
    from scripts.tools.torchtitan import train

    train(stage)


if __name__ == "__main__":
    run(main, rank)
