"""A suite: tasks in a folder of their own, which ask data sets of the hub instead of DATA.

configs/<stage>/<recipe>/ is one, and so is any folder that RECIPE= names. Its suite.json, where it
has one, says which scores count ("scores"), and at which commit each data set is read ("data").
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from scripts.run import stages
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.run.layout import ROOT, relative

OWN = "custom"  # the recipe whose config runs a folder of the user's
ABOUT, TASKS = "suite.json", "tasks"  # the latter: where the folder lies in a stage's directory
NLTK = "nltk_data"  # what nltk calls the folder of its data
STAGED, RECORD = "datasets", ".download.json"  # hidden: datasets would take it for rows
TEXTS = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".md")
NAMED = re.compile(r"""dataset_path:\s*["']?([\w-][\w.-]*/[\w.-]+)["']?\s*(?:[,}#]|$)""", re.M)
PATTERN = re.compile(r"[\[\]*?]")


def folder(recipe: str) -> Optional[Path]:
    """Return the folder of a recipe that is a suite, None for one that asks what DATA holds out."""
    path = Path(recipe) if "/" in recipe else _configs() / recipe
    return path if recipe and recipe != TASKS and path.is_dir() else None


def _configs() -> Path:
    return ROOT / "configs" / stages.maker("verdict").name


def known() -> list[str]:
    """Name the suites that need no path."""
    return sorted(path.name for path in _configs().iterdir() if folder(path.name))


def about(place: Path) -> dict[str, Any]:
    """Read suite.json, {} where there is none. Raises InputError where it is not what it must be:
    {"scores": {"task/metric": …}, "data": {"org/name": commit}, "nltk": [name]}."""
    content = read_json(place / ABOUT) or {}
    kinds = {"scores": dict, "data": dict, "nltk": list}
    if not isinstance(content, dict) or not content.keys() <= kinds.keys():
        raise InputError(f"{place / ABOUT}: may hold {', '.join(kinds)}, nothing else")
    wrong = [key for key, value in content.items() if not isinstance(value, kinds[key])]
    if wrong:
        raise InputError(f"{place / ABOUT}: {wrong[0]} has the wrong form; see docs/evaluate.md")
    return content


def files(place: Path) -> dict[str, Path]:
    """Return the files of a suite, by name in it. Raises InputError for what a submission cannot
    hold, and where no task is."""
    found, wrong = {}, []
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if not path.is_file() or "__pycache__" in name or re.search(r"(^|/)\.", name):
            continue
        if path.suffix not in TEXTS:
            wrong.append(f"{path}: no text file; convert it to one of {' '.join(TEXTS)}")
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name:
            wrong.append(f"{path}: give it a name of letters, digits, _ - and .")
        found[name] = path
    if not any(name.endswith(".yaml") for name in found) and place.parent != _configs():
        example = relative(_configs() / OWN)
        wrong.append(f"{place}: holds no task, which is a .yaml file of lm-eval; {example} has one")
    if wrong:
        raise InputError(wrong)
    return found


def data_sets(place: Path) -> dict[str, str]:
    """Return {data set of the hub: its commit, "" for any} of a suite: those of its suite.json, and
    those that its tasks name."""
    found = {name: "" for name in ([NLTK] if about(place).get("nltk") else [])}
    for path in files(place).values():
        text = path.read_text(encoding="utf-8") if path.suffix in (".yaml", ".yml") else ""
        found.update({name: "" for name in NAMED.findall(text) if not (place / name).exists()})
    return {**found, **about(place).get("data", {})}


def staged(models: Path, name: str) -> Path:
    """Return where a data set lies once it is staged, among the models that were downloaded."""
    return models / STAGED / name.replace("/", "--")


def hub_name(path: Path) -> str:
    """Return the data set that lies staged in this folder."""
    return path.name.replace("--", "/", 1)


def lacking(recipe: str, models: Path, given: str) -> list[str]:
    """Say which data sets of a suite are not staged, and the command that stages them. `given` is
    MODELS as the user gave it."""
    place = folder(recipe)
    if place is None:
        return []
    missing = []
    for name, commit in data_sets(place).items():
        record = read_json(staged(models, name) / RECORD)
        if not record or (commit and commit not in (record["commit"], record["revision"])):
            missing.append(name)
    if not missing:
        return []
    command = f"make download RECIPE={shlex.quote(recipe)}"
    command += f" MODELS={shlex.quote(given)}" if given else ""
    return [
        f"RECIPE={recipe}: {', '.join(missing)}: not staged in {models / STAGED}, and stages ask"
        f" no hub; {command} stages them, where the hub can be reached"
    ]


def unreadable(path: Path) -> list[str]:
    """Say why data sets cannot lie below a path: datasets takes some characters for patterns."""
    if PATTERN.search(str(path.resolve())):
        return [
            f"MODELS: {path} has one of [ ] * ? in it, which the data sets' reader takes for a "
            "pattern; choose another folder"
        ]
    return []


def facts(paths: list[str]) -> dict[str, str]:
    """Return what stage.env says of staged data sets."""
    return {f"DATASET_{number}": path for number, path in enumerate(paths, 1)}


def staged_facts(told: Mapping[str, str]) -> list[str]:
    """Name the facts that name staged data sets."""
    return [name for name in told if name.startswith("DATASET_")]
