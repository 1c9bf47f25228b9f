"""Evaluate a model with lm-eval and judge it: FROM + held-out sets → results/, verdict.json.

A cluster runs it: python -m scripts.evaluate runs/<run>/evaluate
"""

import shutil
import tempfile
from pathlib import Path

from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.run import files, gate, modeldir, preflight
from scripts.run.errors import InputError
from scripts.tools import lm_eval


def main(stage: Parent) -> dict:
    """Run lm-eval in one process, then hold its scores against the floors, for the model's bytes
    as they were before and after."""
    source, data = stage.path("FROM"), stage.path("DATA")
    found = modeldir.problems(source)
    if not found:
        found = preflight.memory_problems(modeldir.weight_bytes(source), "the weights")
    if found:
        raise InputError(found)
    floors = files.read_json(stage.directory / gate.FLOORS) or {}
    if not floors and gate.before_fact(gate.PARENT) not in stage.facts:
        stage.shown.say("no floor and no parent: it is measured, and does not pass")
    model = stage.digests.describe(source)
    results, before = stage.scratch(lm_eval.RESULTS), stage.scratch(lm_eval.BEFORE)
    with tempfile.TemporaryDirectory() as folder:
        # The tasks name their files relative to where lm-eval runs, so one task serves every run;
        # and datasets takes [ ] * ? in a run's path for a pattern.
        for file in data.glob("heldout_*.jsonl"):
            shutil.copy(file, folder)
        stage.ranks({"HF_DATASETS_CACHE": str(stage.scratch("cache"))}, cwd=Path(folder))
    stage.scratch("cache")
    if stage.digests.describe(source) != model:
        raise RuntimeError(f"{source} was changed while it was evaluated; run the same again")
    tasks = sorted({name.split("/")[0] for name in floors})
    empty = lm_eval.without_data(tasks, stage.directory / "tasks", data)
    verdict = gate.conclude(results, before, floors, empty)
    content = {"model": model, "arguments": stage.arguments, **verdict}
    files.write_json(stage.directory / gate.VERDICT, content)
    name = source.parent.name if source.name == "model" else source.name
    for line in gate.changes(verdict, name):
        stage.shown.say(line)
    measured = [row for row in verdict["floors"] if row["value"] is not None]
    return {
        "inputs": {"model": model, "data": stage.digests.describe(data)},
        "outputs": {"verdict": verdict},
        "summary": {"scores": {row["metric"]: row["value"] for row in measured}},
    }


if __name__ == "__main__":
    run(main, lm_eval.evaluate)
