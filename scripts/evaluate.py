"""Evaluate a model with lm-eval, and judge it: FROM + held-out sets or a suite → verdict.json.

A cluster runs it: python -m scripts.evaluate runs/<run>/evaluate
"""

import tempfile
from pathlib import Path

from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.run import files, gate, modeldir, preflight, suites
from scripts.run.errors import InputError
from scripts.tools import lm_eval, lm_eval_tasks


def main(stage: Parent) -> dict:
    """Run lm-eval in one process, then hold its scores against the floors, for the model's bytes
    as they were before and after."""
    source, tasks = stage.path("FROM"), stage.directory / suites.TASKS
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
        told = lm_eval_tasks.lay_out(stage, Path(folder))
        told["HF_DATASETS_CACHE"] = str(stage.scratch("cache"))
        stage.ranks(told, cwd=Path(folder))
    stage.scratch("cache")
    if stage.digests.describe(source) != model:
        raise RuntimeError(f"{source} was changed while it was evaluated; run the same again")
    if lm_eval_tasks.is_suite(stage):
        asked = {"tasks": tasks, **lm_eval_tasks.staged(stage)}
        verdict = gate.conclude(results, before, floors, [], suites.about(tasks))
    else:
        asked = {"data": stage.path("DATA")}
        bound = sorted({name.split("/")[0] for name in floors})
        empty = lm_eval.without_data(bound, tasks, asked["data"])
        verdict = gate.conclude(results, before, floors, empty)
    content = {"model": model, "arguments": stage.arguments, **verdict}
    files.write_json(stage.directory / gate.VERDICT, content)
    name = source.parent.name if source.name == "model" else source.name
    for line in gate.changes(verdict, name):
        stage.shown.say(line)
    inputs = {name: stage.digests.describe(path) for name, path in asked.items()}
    return {
        "inputs": {"model": model, **inputs},
        "outputs": {"verdict": verdict},
        "summary": {"scores": gate.summary(verdict)},
    }


if __name__ == "__main__":
    run(main, lm_eval.evaluate)
