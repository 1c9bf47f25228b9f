"""Make the sets that every later stage reads: DATA → sets/, with tokenizer and held-out sets.

A cluster runs it: python -m scripts.data runs/<run>/data
"""

import os
import shutil
from pathlib import Path

from scripts.corpus import recipe, table
from scripts.corpus.python_docs import PYTHON
from scripts.corpus.sets import Sets, Target
from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.run import files
from scripts.run.layout import as_fact
from scripts.tools.architecture import read_architecture


def main(stage: Parent) -> dict:
    """Read the recipe, run its passes, hand the sets over by one rename."""
    settings = recipe.read(stage.config, stage.arguments, stage.facts)
    if stage.facts.get("DATA"):
        settings.sources = [recipe.Source(str(named(stage, "DATA")))]
    if isinstance(settings.validation, str) and stage.facts.get("VALIDATION"):
        settings.validation = str(named(stage, "VALIDATION"))
    model = stage.path("FROM") if "FROM" in stage.facts else None
    config = model / "config.json" if model else stage.directory / "architecture.json"
    sizes = read_architecture(config)
    partial, final = stage.directory / "sets.partial", stage.directory / "sets"
    sets = Sets(partial, settings, Target(model, sizes["vocab"], sizes["context"]), stage.phase)
    manifest = sets.make()
    stage.phase("hands the sets over")
    files.write_json(partial / "out/data.json", manifest)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial / "out", final)
    shutil.rmtree(partial)
    (stage.directory / "derived.jsonl").unlink(missing_ok=True)
    for line in table.lines(manifest, as_fact(final, stage.run.root)):
        stage.shown.say(line)
    describe = stage.digests.describe
    paths = {f"source {n}": s.path for n, s in enumerate(settings.sources, 1) if s.path != PYTHON}
    if isinstance(settings.validation, str):
        paths["validation"] = settings.validation
    read = {name: Path(path).expanduser() for name, path in paths.items()}
    inputs = {name: describe(path) for name, path in read.items() if path.exists()}
    return {"inputs": inputs, "outputs": {"sets": describe(final)}, "summary": manifest}


def named(stage: Parent, fact: str) -> str | Path:
    """Return what a fact names, as a recipe names a source: a path, or an id of the hub."""
    return stage.facts[fact] if stage.facts[fact].startswith("hf://") else stage.path(fact)


if __name__ == "__main__":
    run(main)
