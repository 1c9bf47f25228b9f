"""The data recipe: what is read, what is held out and what is dropped (configs/data/<recipe>.yaml).

The user's key=value arguments win over the file, and VALIDATION and COLUMNS over both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts.corpus.shapes import columns_from, columns_problems
from scripts.run.errors import InputError, nearest


@dataclass
class Source:
    """Name a file, a folder or a data set of the hub; `weight`: how often an epoch has each row."""

    path: str
    weight: float = 1.0


@dataclass
class Recipe:
    """Hold the settings of one data stage; each key of the YAML file is one of these."""

    sources: list[Source] = field(default_factory=list)
    derive: bool = False  # make conversations, questions and preferences out of text
    columns: dict[str, str] = field(default_factory=dict)  # our names: the files' names
    validation: float | str = 0.01  # share of rows, or a file or folder
    duplicates: str = "drop"
    too_long: str = "drop"
    max_seq_len: int | None = 2048  # tokens of a conversation; the model's context if it is less
    bad_rows: str = "refuse"
    max_dropped: float = 0.05
    tokenizer_megabytes: float = 100.0  # of text that a tokenizer is trained on
    filters: list[Any] = field(default_factory=list)  # datatrove's, of texts (filters.py)
    seed: int = 0


CHOICES = {
    "duplicates": ("drop", "keep"),
    "too_long": ("drop", "cut", "refuse"),
    "bad_rows": ("refuse", "drop"),
}
SHARES = ("validation", "max_dropped")


def of_stage(
    file: Path, arguments: Sequence[str], facts: Mapping[str, str], path: Callable[[str], Path]
) -> Recipe:
    """Read a stage's recipe; DATA and VALIDATION of its facts win, `path` says where they lie.

    Raises InputError.
    """

    def named(fact: str) -> str:  # as a recipe names a source: a path, or an id of the hub
        return facts[fact] if facts[fact].startswith("hf://") else str(path(fact))

    recipe = read(file, arguments, facts)
    if facts.get("DATA"):
        recipe.sources = [Source(named("DATA"))]
    if isinstance(recipe.validation, str) and facts.get("VALIDATION"):
        recipe.validation = named("VALIDATION")
    return recipe


def read(file: Path, arguments: Sequence[str], facts: Mapping[str, str]) -> Recipe:
    """Read a recipe, with the sources and settings that the command named.

    Raises InputError with every problem at once.
    """
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"recipe: not YAML: {error}") from None
    if not isinstance(given, dict):
        raise InputError("recipe: must hold key: value lines")
    found: list[str] = []
    for word in arguments:
        key, equals, value = word.lstrip("-").partition("=")
        if not equals:
            found.append(f"ARGS: {word}: give key=value, as too_long=cut")
        given[key] = yaml.safe_load(value or "''")
    if facts.get("VALIDATION"):
        given["validation"] = yaml.safe_load(facts["VALIDATION"])
    if facts.get("COLUMNS"):
        given["columns"] = columns_from(facts["COLUMNS"])
    known = {f.name: f for f in dataclasses.fields(Recipe)}
    for key in [key for key in given if key not in known]:
        found.append(f"recipe: {key}: no such key; {nearest(key, known)}")
        del given[key]
    if given.get("derive") and "validation" in given:
        found.append("validation: a recipe that derives holds out its own; leave VALIDATION out")
    if given.get("derive") and given.get("filters"):
        found.append("filters: a recipe that derives makes its own texts; leave filters out")
    recipe = Recipe(**given)
    found += _problems(recipe)
    if found:
        raise InputError(found)
    return recipe


def _problems(recipe: Recipe) -> list[str]:
    """Check the values, and make Source out of what the YAML file says of each."""
    found = []
    for key, choices in CHOICES.items():
        if getattr(recipe, key) not in choices:
            found.append(f"{key}: {getattr(recipe, key)}: one of {', '.join(choices)}")
    for key in SHARES:
        value = getattr(recipe, key)
        if not isinstance(value, (str, int, float)) or (
            not isinstance(value, str) and not 0 <= value <= 1
        ):
            found.append(f"{key}: {value}: a share from 0 to 1")
    if isinstance(recipe.max_dropped, str):
        found.append(f"max_dropped: {recipe.max_dropped}: a share from 0 to 1")
    if isinstance(recipe.columns, dict):
        found += columns_problems(recipe.columns)
    else:
        found.append(f"columns: {recipe.columns}: give {{our name: the file's, …}}")
    filters = recipe.filters if isinstance(recipe.filters, list) else [recipe.filters]
    recipe.filters = [{f: {}} if isinstance(f, str) else f for f in filters]
    for entry in recipe.filters:
        settings = list(entry.values()) if isinstance(entry, dict) else []
        if len(settings) != 1 or not isinstance(settings[0] or {}, dict):
            found.append(f"filters: {entry}: give a name, or {{Name: {{setting: value}}}}")
    if recipe.max_seq_len is not None and not (
        isinstance(recipe.max_seq_len, int) and recipe.max_seq_len > 1
    ):
        found.append(f"max_seq_len: {recipe.max_seq_len}: a number of tokens")
    sources: list[Any] = recipe.sources if isinstance(recipe.sources, list) else [recipe.sources]
    recipe.sources = []
    for source in sources:
        source = {"path": source} if isinstance(source, str) else source
        known = [f.name for f in dataclasses.fields(Source)]
        for key in [k for k in source if k not in known] if isinstance(source, dict) else []:
            found.append(f"sources: {source}: {key}: no such key; {nearest(key, known)}")
        try:
            made = Source(**{k: v for k, v in source.items() if k in known})
            if not isinstance(made.path, str) or not 0 < float(made.weight) < float("inf"):
                raise ValueError
            recipe.sources.append(Source(made.path, float(made.weight)))
        except (TypeError, ValueError, AttributeError):
            found.append(f"sources: {source}: give a path, or {{path: …, weight: above 0}} alone")
    return found
