"""Evaluate a model with lm-eval and judge it: FROM + held-out sets → results.json, verdict.json.

    python -m scripts.evaluate runs/<run>/evaluate
"""

import os
import sys

from scripts import modeldir, report, rundir
from scripts.errors import InputError
from scripts.stage import Stage, run


def main(stage: Stage) -> dict:
    """Run lm-eval in one process, then hold its scores against the floors for exactly this model."""
    source, data = stage.path("FROM"), stage.path("DATA")
    found = modeldir.problems(source)
    if found:
        raise InputError(found)
    results = stage.scratch("results")
    # The tasks name their files relative to the data directory, so one task serves every run.
    stage.ranks({"HF_DATASETS_CACHE": str(stage.scratch("cache")), "RELAY_RESULTS": str(results)}, cwd=data)
    measured = rundir.read_json(next(results.rglob("results_*.json")))["results"]
    scores = {
        f"{task}/{metric.split(',')[0]}": value
        for task, metrics in measured.items() for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    }
    model = rundir.describe(source)
    floors = report.judge(scores, rundir.read_json(stage.directory / "floors.json"))
    verdict = {"model": model, "passed": all(row["passed"] for row in floors), "floors": floors, "scores": scores}
    rundir.write_atomic(stage.directory / "verdict.json", rundir.dump_json(verdict))
    stage.scratch("cache")
    shown = {row["metric"]: row["value"] for row in floors if row["value"] is not None}
    return {
        "inputs": {"model": model, "data": rundir.describe(data)},
        "outputs": {"verdict": {"passed": verdict["passed"], "scores": scores}},
        "summary": {"scores": shown},
    }


def rank(stage: Stage) -> None:
    """lm-eval's own command line."""
    from scripts import compat

    compat.lm_eval_without_bundled_tasks(stage.config)
    from lm_eval.__main__ import cli_evaluate

    sys.argv = [
        "lm_eval", "run", "--config", str(stage.config), "--include_path", str(stage.directory / "tasks"),
        "--output_path", os.environ["RELAY_RESULTS"], "--log_samples",
        *stage.arguments, "--model_args", f"pretrained={stage.path('FROM')}",
    ]
    cli_evaluate()


if __name__ == "__main__":
    run(main, rank)
