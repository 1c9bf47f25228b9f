"""Which tasks lm-eval is asked for: found, named by who means them, and built before a model is."""

from __future__ import annotations

import argparse
import difflib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.job.stage import Stage
from scripts.run import suites
from scripts.run.errors import InputError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def is_suite(stage: Stage) -> bool:
    """Tell whether a stage asks a suite, and nothing that DATA holds out."""
    return "DATA" not in stage.facts


def staged(stage: Stage) -> dict[str, Path]:
    """Return the folders of the data sets that were staged for a stage, by their names. Raises
    InputError if one is gone."""
    paths = [stage.path(fact) for fact in suites.staged_facts(stage.facts)]
    return {suites.hub_name(path): path for path in paths}


def lay_out(stage: Stage, folder: Path) -> dict[str, str]:
    """Copy the rows that tasks name to where lm-eval will run, so that one task serves every run;
    return what the environment must say. datasets takes [ ] * ? in a run's path for a pattern."""
    tasks = stage.directory / suites.TASKS
    if not is_suite(stage):
        rows = stage.path("DATA").glob("heldout_*.jsonl")
        named = {path.name: path for path in rows}
    else:
        files = [path for path in tasks.rglob("*") if path.is_file()]
        code = (".yaml", ".yml", ".py", ".pyc")
        named = {str(p.relative_to(tasks)): p for p in files if p.suffix not in code}
    for name, path in named.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    nltk = staged(stage).get(suites.NLTK)
    # Python's own copies of the tasks' code would be taken for files of the suite.
    return {"PYTHONDONTWRITEBYTECODE": "1", **({"NLTK_DATA": str(nltk)} if nltk else {})}


def in_arguments(arguments: list[str]) -> list[str]:
    """Return the tasks that arguments of lm-eval name, [] where they name none."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    try:
        words = parser.parse_known_args(arguments)[0].tasks
    except argparse.ArgumentError:
        return []  # lm-eval says what is wrong
    return [name for word in words for name in word.split(",") if name]


def index(tasks: Path) -> dict[str, Any]:
    """Return lm-eval's index of the run's own tasks. Raises InputError with every file that it
    cannot read: it would leave such a file out without a word."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    wrong = []
    for path in sorted(tasks.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever YAML raises
            said = " ".join(str(error).split())
            wrong.append(f"{path}: lm-eval cannot read it: {type(error).__name__}: {said}")
    if wrong:
        raise InputError(wrong)
    return TaskManager(include_path=str(tasks), include_defaults=False).task_index


def members(entry: Any) -> list[str]:
    """Name what a group holds, [] for a task."""
    held = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    words = held if isinstance(held, list) else []
    return [w if isinstance(w, str) else w.get("task") or w.get("group", "") for w in words]


def outermost(own: dict[str, Any], tasks: Path) -> list[str]:
    """Name what a suite without a list asks: its groups, and its tasks that stand in none. Raises
    InputError if there is nothing."""
    inside = {name for entry in own.values() for name in members(entry)}
    found = [n for n, entry in own.items() if entry.yaml_path and n not in inside]
    if not found:
        raise InputError(f"{tasks}: holds no task: no .yaml file that says task: <its name>")
    return found


def refuse_unknown(names: list[str], tasks: Path) -> TaskManager:
    """Return lm-eval's index of tasks. Raises InputError with every name that is none of it, each
    with the nearest that are."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_path=str(tasks))
    unknown = [n for n in names if not n.endswith(".yaml") and not manager.match_tasks([n])]
    found = []
    for name in dict.fromkeys(unknown):
        near = difflib.get_close_matches(name, manager.all_tasks, n=4)
        mend = f"did you mean {', '.join(near)}?" if near else ".venv/bin/lm_eval ls tasks has all"
        found.append(f"{name}: unknown task; {mend}")
    if found:
        raise InputError(found)
    return manager


def build(names: list[str], manager: TaskManager) -> None:
    """Build every task once, before a model is loaded: so what is wrong with one is said early.
    Raises InputError with what keeps each from being built."""
    found: list[str] = []
    for name in manager.match_tasks(names):
        try:
            manager.load([name])
        except InputError as error:
            found += error.problems
        except ModuleNotFoundError as error:
            found.append(
                f"{name}: needs the Python package {error.name}, which is not installed here; put "
                "it into requirements/stack.in, then make lock setup"
            )
        except Exception as error:  # whatever a task's own code raises
            # Of the folder that it runs in (lay_out) a user has never heard.
            said = " ".join(str(error).replace(f"{Path.cwd()}/", "").split())
            found.append(f"{name}: lm-eval cannot build it: {type(error).__name__}: {said}")
    if found:
        raise InputError(dict.fromkeys(found))
