"""lm-eval around the pinned release: its config checked, then its own command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scripts.job.rank import Rank
from scripts.run.errors import InputError
from scripts.tools import patches
from scripts.tools.config_check import against_dataclass

RESULTS = "results"  # where in the stage's directory lm-eval writes


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file of key: value lines. Raises InputError naming the line that is not YAML."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold key: value lines")
    return content


def evaluate(rank: Rank) -> None:
    """Run lm-eval's own command line on FROM, with the run's tasks. Raises InputError with every
    unknown key and wrong type of its config at once."""
    rank.phase("imports lm-eval")
    config, tasks = read_yaml(rank.config), rank.directory / "tasks"
    patches.lm_eval_without_bundled_tasks(config.get("tasks"), tasks)
    from lm_eval import evaluator
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.config.evaluate_config import EvaluatorConfig

    found = against_dataclass(EvaluatorConfig, config)
    if found:
        raise InputError([f"{rank.config}: {problem}" for problem in found])
    # On the command line model_args replace the config's, so these carry both.
    model = json.dumps({**config.get("model_args", {}), "pretrained": str(rank.path("FROM"))})
    sys.argv = ["lm_eval", "run", "--config", str(rank.config), "--include_path", str(tasks)]
    sys.argv += ["--output_path", str(rank.directory / RESULTS), "--log_samples"]
    sys.argv += ["--model_args", model, *rank.arguments]
    upstream = evaluator.evaluate

    def evaluate_with_phase(*arguments: Any, **keywords: Any) -> Any:
        rank.phase("evaluates")
        return upstream(*arguments, **keywords)

    evaluator.evaluate = evaluate_with_phase  # called when the model is loaded
    rank.phase("loads the model")
    cli_evaluate()
