"""Make the sets that every later stage reads: DATA → sets/, with tokenizer and held-out sets.

A cluster runs it: python -m scripts.data runs/<run>/data
"""

import os
import shutil
from pathlib import Path

from scripts.corpus import recipe, sets, table
from scripts.corpus.python_docs import PYTHON
from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.run import files
from scripts.run.layout import relative
from scripts.tools.data_nodes import make_sets


def main(stage: Parent) -> dict:
    """Start one process on each node; hand the sets over by one rename."""
    settings = recipe.of_stage(stage.config, stage.arguments, stage.facts, stage.path)
    partial, final = stage.directory / sets.PARTIAL, stage.directory / "sets"
    stage.ranks()
    stage.phase("hands the sets over")
    manifest = files.read_json(partial / "out/data.json") or {}
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial / "out", final)
    shutil.rmtree(partial)
    (stage.directory / "derived.jsonl").unlink(missing_ok=True)
    for line in table.lines(manifest, relative(final)):
        stage.shown.say(line)
    describe = stage.digests.describe
    paths = {f"source {n}": s.path for n, s in enumerate(settings.sources, 1) if s.path != PYTHON}
    if isinstance(settings.validation, str):
        paths["validation"] = settings.validation
    read = {name: Path(path).expanduser() for name, path in paths.items()}
    inputs = {name: describe(path) for name, path in read.items() if path.exists()}
    return {"inputs": inputs, "outputs": {"sets": describe(final)}, "summary": manifest}


if __name__ == "__main__":
    run(main, make_sets)
