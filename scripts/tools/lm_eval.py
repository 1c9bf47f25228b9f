"""lm-eval around the pinned release: its config checked, then its own command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from scripts.job.rank import Rank
from scripts.run import gate, suites
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.tools import lm_eval_tasks, patches
from scripts.tools.config_check import against_dataclass, refusals
from scripts.tools.decoder import attention

RESULTS, BEFORE = "results", "before"  # where in the stage's directory lm-eval writes


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
    """Run lm-eval's own command line on FROM, with the tasks of a suite, or those that DATA has
    rows for; then on each model that FROM was trained from; of those only the parent must be there.

    Raises InputError with every unknown key and wrong type of its config at once, and with every
    task that cannot be asked.
    """
    rank.phase("imports lm-eval")
    config, tasks = read_yaml(rank.config), rank.directory / suites.TASKS
    from lm_eval.config.evaluate_config import EvaluatorConfig

    found = against_dataclass(EvaluatorConfig, config)
    if found:
        raise InputError([f"{rank.config}: {problem}" for problem in found])
    own = lm_eval_tasks.index(tasks)
    names = lm_eval_tasks.in_arguments(rank.arguments) or _listed(config.get("tasks"))
    names = names or lm_eval_tasks.outermost(own, tasks)
    members = [name for entry in own.values() for name in lm_eval_tasks.members(entry)]
    patches.lm_eval_without_bundled_tasks([*names, *members], own)
    patches.lm_eval_reads_staged(lm_eval_tasks.staged(rank))
    from lm_eval import evaluator
    from lm_eval.__main__ import cli_evaluate

    # Without a word it takes a GPU for granted, and dies where there is none.
    device = [] if config.get("device") else ["--device", _device()]
    rank.phase("reads the tasks")
    manager = lm_eval_tasks.refuse_unknown([*names, *members], tasks)
    if lm_eval_tasks.is_suite(rank):
        lm_eval_tasks.build(names, manager)
    else:
        names = with_data(names, tasks, rank.path("DATA"))
    upstream = evaluator.evaluate
    models = {"the model": ("FROM", RESULTS)}
    for name in gate.before(rank.facts):
        which = "the parent" if name == gate.PARENT else f"the model of {name}"
        models[which] = gate.before_fact(name), f"{BEFORE}/{name}"
    for which, (fact, folder) in models.items():
        try:
            source = rank.path(fact)
        except InputError:
            if fact in ("FROM", gate.before_fact(gate.PARENT)):  # what the verdict is about
                raise
            rank.say(f"{which} is not there any more: not evaluated")
            continue

        def evaluate_with_phase(*arguments: Any, which: str = which, **keywords: Any) -> Any:
            rank.phase(f"evaluates {which}")
            return upstream(*arguments, **keywords)

        evaluator.evaluate = evaluate_with_phase  # called when the model is loaded
        rank.phase(f"loads {which}")
        # On the command line model_args replace the config's, so these carry both.
        own = attention(read_json(source / "config.json"))
        model = json.dumps({**own, **config.get("model_args", {}), "pretrained": str(source)})
        sys.argv = ["lm_eval", "run", "--config", str(rank.config), "--include_path", str(tasks)]
        sys.argv += ["--output_path", str(rank.directory / folder), "--log_samples"]
        sys.argv += ["--tasks", ",".join(names), "--model_args", model, *device, *rank.arguments]
        with refusals("lm-eval"):
            cli_evaluate()


def _listed(tasks: Any) -> list[str]:
    """Return the tasks of a config, which lm-eval takes as a list and with commas."""
    return tasks.split(",") if isinstance(tasks, str) else list(tasks or [])


def _device() -> str:
    """Name the GPU, or the CPU where there is none."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def with_data(names: list[str], tasks: Path, data: Path) -> list[str]:
    """Return the tasks that can be asked: not those of the run whose held-out file is empty or not
    there. Raises InputError if none is left."""
    found = [name for name in names if name not in without_data(names, tasks, data)]
    if names and not found:
        raise InputError(f"{data}: holds out nothing that {', '.join(names)} could ask")
    return found


def without_data(names: list[str], tasks: Path, data: Path) -> list[str]:
    """Return the tasks of the run whose held-out file is empty or not there."""
    found = []
    for name in names:
        text = (tasks / f"{name}.yaml").read_text() if (tasks / f"{name}.yaml").exists() else ""
        file = re.search(r"data_files:.*?(\w+\.jsonl)", text)
        if file and not ((data / file[1]).exists() and (data / file[1]).stat().st_size):
            found.append(name)
    return found
