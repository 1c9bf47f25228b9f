"""What DATA is, before anything reads it all: its recipe, its facts, its kinds of rows."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from scripts.corpus.files import HUB_ID
from scripts.corpus.preview import Preview, preview
from scripts.corpus.shapes import FOLDERS, NAMES, columns_from
from scripts.launcher.options import CONFIGS, Options, with_recipe
from scripts.launcher.report import made_model
from scripts.run import stages, suites
from scripts.run.digests import Digests
from scripts.run.files import read_env, read_json
from scripts.run.layout import Run, as_fact, finished, from_fact, relative
from scripts.run.stages import StageRow

HUB = "hf://"
RECIPE = (".yaml", ".yml")


def of_base(options: Options) -> Options:
    """Return the options with what the user did not say of a model that is to be quantised, or
    was: FROM is the newest model of its base, DATA what that was made from. Raises InputError."""
    source, data = options.from_, options.data
    stage = options.run.stage(stages.quantizer().name)
    if options.base and not options.from_:
        for cluster in options.clusters.values():
            cluster.fetch(options.base)
        if options.base.directory.is_dir() or not options.downloaded:
            stage = made_model(options.base)
            source = str(stage / "model")
    if not data and (stage / "stage.env").exists():
        fact = read_env(stage / "stage.env").get("DATA")
        data = str(from_fact(fact, options.run.root)) if fact else ""
    return dataclasses.replace(options, from_=source, data=data)


def prepared(options: Options) -> Optional[Path]:
    """Return the sets that DATA names if it is prepared already: a data stage's directory, or its
    sets/. None if DATA is a corpus or empty."""
    for path in (Path(options.data), Path(options.data, "sets")) if options.data else ():
        if (path / "data.json").exists():
            return path
    # Where the runs are elsewhere, their names tell; the job looks into them.
    path, folder = Path(options.data), stages.maker("sets")
    if options.here.sees_runs or path.exists():
        return None
    return {folder.name: path / folder.makes, folder.makes: path}.get(path.name)


def recipe(options: Options) -> Path:
    """Return the data recipe of a command: the one that DATA names, the demo's without DATA, or the
    one for all other data."""
    if options.data.endswith(RECIPE):
        return Path(options.data)
    folder = CONFIGS / stages.maker("sets").name
    return folder / ("default.yaml" if options.data else "demo.yaml")


def suite(options: Options, row: StageRow) -> Optional[Path]:
    """Return the folder of the suite that a stage asks instead of DATA, None where it asks DATA."""
    return suites.folder(options.recipes.get(row.name, "")) if row.makes == "verdict" else None


def facts(options: Options) -> dict[str, str]:
    """Return what stage.env says of the source; nothing where the recipe says it."""
    found = {}
    if options.data and not options.data.endswith(RECIPE):
        found["DATA"] = _fact(options, options.data)
    if options.validation:
        share = re.fullmatch(r"[0-9.]+", options.validation)
        found["VALIDATION"] = options.validation if share else _fact(options, options.validation)
    if options.columns:
        found["COLUMNS"] = options.columns
    return found


def _fact(options: Options, text: str) -> str:
    if not Path(text).exists() and HUB_ID.fullmatch(text):
        return HUB + text.replace(HUB, "").replace("datasets/", "", 1)
    return as_fact(Path(text), options.run.root)


def problems(options: Options) -> list[str]:
    """List what is wrong with DATA and VALIDATION, as far as their first rows show it."""
    found = []
    if options.data.endswith(RECIPE):
        if not Path(options.data).is_file():
            found.append(f"DATA={options.data}: no such recipe; copy configs/data/default.yaml")
    elif options.data and not _is_hub(options.data):
        inside = options.run.root.resolve() in Path(options.data).resolve().parents
        if inside and not prepared(options):
            found.append(
                f"DATA={options.data}: lies among the runs, where make clean removes it; give a "
                "data stage with sets/, or files from elsewhere"
            )
        else:
            found += _seen(options).problems
    share = re.fullmatch(r"[0-9.]+", options.validation) or not options.validation
    if not share and not _is_hub(options.validation):
        seen = preview(Path(options.validation), columns_from(options.columns))
        found += [p.replace("DATA=", "VALIDATION=", 1) for p in seen.problems]
    words = options.args.get(stages.maker("sets").name, [])
    found += [f"ARGS: {word}: give key=value, as too_long=cut" for word in words if "=" not in word]
    if any(word.lstrip("-") == "bad_rows=drop" for word in words):
        found = [problem for problem in found if problem.startswith(("DATA=", "VALIDATION="))]
    return found


def _is_hub(text: str) -> bool:
    return not Path(text).exists() and bool(HUB_ID.fullmatch(text))


def _seen(options: Options) -> Preview:
    return _preview(options.data, tuple(columns_from(options.columns).items()))


@functools.cache
def _preview(path: str, columns: tuple[tuple[str, str], ...]) -> Preview:
    """Look at DATA once a command."""
    return preview(Path(path), dict(columns))


def kinds(options: Options) -> Optional[frozenset[str]]:
    """Return the kinds of rows that DATA has (text, chat, pair); None where that is not known
    before it is read."""
    made = prepared(options)
    if made is None and finished(options.run.stage(stages.maker("sets").name)):
        made = options.run.stage(stages.maker("sets").name) / "sets"
    content = read_json(made / "data.json") if made else None
    if content is not None:
        rows: Mapping[str, int] = content.get("rows", {})
        return frozenset(kind for kind, name in FOLDERS.items() if rows.get(name))
    if not options.data:
        return frozenset(FOLDERS)  # the demo's
    if options.data.endswith(RECIPE) or _is_hub(options.data):
        return None
    seen = _seen(options)
    return seen.kinds if seen.whole and not seen.problems else None


def lacks(options: Options, row: StageRow, found: frozenset[str]) -> str:
    """Say what a stage needs of DATA that is not there."""
    there = [NAMES[kind][1] for kind in FOLDERS if kind in found] or ["nothing to train on"]
    said = f"DATA has {' and '.join(there)}, {row.name} needs {NAMES[row.trains_on][1]}"
    others = sorted({path.stem for path in (CONFIGS / row.name).glob("*.*")})
    own = stages.row(row.name)
    taking = [name for name in others if with_recipe(own, name).trains_on in found]
    if not taking:
        return said
    variable = "RECIPE" if options.verb == row.name else f"{row.name.upper()}_RECIPE"
    return f"{said}; {variable}={' or '.join(taking)} takes what DATA has"


def unseen(options: Options) -> list[str]:
    """List why a pipeline cannot be planned over DATA yet."""
    return problems(options) or [
        f"DATA={options.data}: what it holds is seen when it is read, and the stages of a pipeline "
        f"depend on it; make {stages.maker('sets').name} with the same variables, then this again"
    ]


def changed(run: Run, record: Mapping[str, Any], dry_run: bool) -> list[str]:
    """List the sources of finished sets that are not as they were when they were read."""
    digests, found = Digests(run, remember=not dry_run), []
    for item in record.get("inputs", {}).values():
        path = from_fact(item["path"], run.root)
        if path.exists() and digests.of_tree(path) != item["digest"]:
            found.append(f"{relative(path)} has changed since it was read")
    return found
