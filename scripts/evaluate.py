"""Evaluate a model with lm-eval and judge it: FROM + held-out sets → results.json, verdict.json.

python -m scripts.evaluate runs/<run>/evaluate
"""

import json
import os
import sys

from scripts.job.stage import Stage, run
from scripts.launcher import report
from scripts.run import digests, files, modeldir, preflight
from scripts.run.errors import InputError
from scripts.tools.config_check import against_dataclass


def main(stage: Stage) -> dict:
    """Run lm-eval in one process, then hold its scores against the floors for exactly this model."""
    source, data = stage.path("FROM"), stage.path("DATA")
    found = modeldir.problems(source) or preflight.memory_problems(modeldir.weight_bytes(source), "the weights")
    if found:
        raise InputError(found)
    results = stage.scratch("results")
    # The tasks name their files relative to the data directory, so one task serves every run.
    stage.ranks({"HF_DATASETS_CACHE": str(stage.scratch("cache")), "RELAY_RESULTS": str(results)}, cwd=data)
    verdict = report.judge(next(results.rglob("results_*.json")), stage.directory / "floors.json")
    model = digests.describe(source)
    content = {"model": model, "arguments": stage.arguments, **verdict}
    files.write_atomic(stage.directory / "verdict.json", files.dump_json(content))
    stage.scratch("cache")
    return {
        "inputs": {"model": model, "data": digests.describe(data)},
        "outputs": {"verdict": verdict},
        "summary": {"scores": {row["metric"]: row["value"] for row in verdict["floors"] if row["value"] is not None}},
    }


def rank(stage: Stage) -> None:
    """lm-eval's own command line; its config checked first."""
    from scripts.tools import patches

    config = stage.read_yaml()
    patches.lm_eval_without_bundled_tasks(config.get("tasks"), stage.directory / "tasks")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.config.evaluate_config import EvaluatorConfig

    found = against_dataclass(EvaluatorConfig, config)
    if found:
        raise InputError([f"{stage.config}: {problem}" for problem in found])
    # Given on the command line, model_args replace the config's; so these carry both.
    model = json.dumps({**config.get("model_args", {}), "pretrained": str(stage.path("FROM"))})
    sys.argv = ["lm_eval", "run", "--config", str(stage.config), "--include_path", str(stage.directory / "tasks")]
    sys.argv += ["--output_path", os.environ["RELAY_RESULTS"], "--log_samples", "--model_args", model, *stage.arguments]
    cli_evaluate()


if __name__ == "__main__":
    run(main, rank)
