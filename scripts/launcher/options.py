"""What the user asked for: every option comes by environment variable, read and checked here."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from scripts.clusters.catalog import CLUSTERS
from scripts.clusters.interface import Cluster
from scripts.run import files, stages
from scripts.run.errors import InputError
from scripts.run.layout import ROOT, Run, check_run_name
from scripts.run.stages import StageRow

CONFIGS = ROOT / "configs"
MODELS = CONFIGS / "models"
MODELS_HERE = ROOT / "models"  # where make download puts them without MODELS=
DEBUG = "debug"  # the model of make demo
PIPELINE = "pipeline"


@dataclass(frozen=True)
class Options:
    """Hold the options of one command; names as in `make help`."""

    verb: str
    run: Run
    model: str  # whose settings are taken; "" for a FROM without a name
    cluster: str
    nodes: int = 1
    gpus: int = 1
    recipes: Mapping[str, str] = field(default_factory=dict)  # by stage, where one was named
    args: Mapping[str, list[str]] = field(default_factory=dict)  # by stage
    data: str = ""
    validation: str = ""
    columns: str = ""
    from_: str = ""  # FROM
    downloaded: str = ""  # where make download has put the model, for a stage that has no other
    models: str = ""  # MODELS: the folder of all that was downloaded
    stage: str = ""
    bind: str = ""
    port: str = "8000"
    api_key_file: str = ""
    service: str = ""
    prompt: str = ""
    force: bool = False
    dry_run: bool = False
    base: Optional[Run] = None  # the run whose model is, or was, quantised into `run`
    clusters: Mapping[str, Cluster] = field(default_factory=dict)  # every one, by name

    @property
    def here(self) -> Cluster:
        """Return the cluster that CLUSTER names."""
        return self.clusters[self.cluster]

    @property
    def several(self) -> bool:
        """Tell whether the command carries a model through several stages: FROM is the first's."""
        quantizes = self.base is not None and self.verb != stages.quantizer().name
        return self.verb == PIPELINE or quantizes


def verbs() -> list[str]:
    """Name what starts a stage: each stage, and the pipeline."""
    return [*stages.names(), PIPELINE]


def folder_names(folder: Path) -> set[str]:
    """Name the folders in a folder."""
    return {p.name for p in folder.iterdir() if p.is_dir()} if folder.is_dir() else set()


def read(verb: str, env: Mapping[str, str]) -> Options:
    """Parse and check every option. Raises InputError with all problems at once."""
    given = _Given(verb, env)
    row = stages.row(verb) if verb in stages.names() else None
    model, cluster = given.text("MODEL"), given.text("CLUSTER", "local")
    now = f"{verb}-{time.strftime('%m%d-%H%M%S')}"
    folder, source = Path(given.path("MODELS") or MODELS_HERE), given.path("FROM")
    default = model.rpartition("/")[2].lower().replace("_", "-") or DEBUG
    if "/" in model and verb in verbs():  # a repository of the hub: where it was downloaded to
        source = source or given.repository(model, folder)
        model = ""
    name = given.text("RUN", now if row and row.alone else default)
    run = Run(Path(given.path("RUNS") or ROOT / "runs"), name)
    args = {row.name: given.arguments(row) for row in stages.TABLE}
    recipes = {row.name: given.recipe(row) for row in stages.TABLE}
    base = None
    if smaller := given.quantized(row, recipes):
        # Beside the run, so that what it has made, judged and serves stays as it is.
        base = Run(run.root, name[: -len(smaller) - 1] if name.endswith(f"-{smaller}") else name)
        run = Run(run.root, f"{base.name}-{smaller}")
    found = check_run_name(run.name) + _model_problems(verb, model)
    if cluster not in CLUSTERS:
        found.append(f"CLUSTER={cluster}: not yet; known: {', '.join(CLUSTERS)}")
    stage = given.text("STAGE")
    if stage and stage not in stages.names():
        found.append(f"STAGE={stage}: unknown; known: {', '.join(stages.names())}")
    if given.text("RUNTIME") and cluster != "local":
        where = "slurm/site.env (RELAY_RUNTIME)" if cluster == "slurm" else "kubernetes/site"
        found.append(f"RUNTIME: CLUSTER={cluster} says it in {where}")
    if given.text("MOUNTS") and not given.text("RUNTIME"):
        found.append("MOUNTS: is for stages in an image; give RUNTIME=docker or podman with it")
    nodes, gpus = given.count("NODES"), given.count("GPUS")
    if nodes > 1 and cluster == "local":
        mend = f"use GPUS={nodes} for that many processes on it"
        found.append(f"NODES={nodes}: CLUSTER=local is one machine; {mend}")
    if row and nodes * gpus < row.least_ranks:
        found.append(f"{verb}: one rank has no other to talk to; give GPUS=2 or NODES=2")
    several = [] if not row or row.ranks else [("GPUS", gpus)]
    several += [("NODES", nodes)] if row and not row.ranks and not row.spreads else []
    if any(n > 1 for _, n in several):
        many = " ".join(f"{k}={n}" for k, n in several if n > 1)
        found.append(f"{many}: {verb} is one process on one node; leave it out")
    if given.text("ARGS") and verb == PIPELINE:
        found.append(f"ARGS: which stage of the pipeline? Use {_each('ARGS')} instead")
    if given.text("RECIPE") and verb == PIPELINE:
        found.append(f"RECIPE: which stage of the pipeline? Use {_each('RECIPE')} instead")
    if given.text("SERVICE") and not CLUSTERS.get(cluster, Cluster).names_services:
        found.append(f"SERVICE: CLUSTER={cluster} serves a run under no other name; leave it out")
    model = model or _model_of(base or run, verb, source)
    born = row and row.from_scratch and row.ranks  # asked for by itself: from random weights
    place = folder / model
    downloaded = model and not born and (place / "download.json").exists()
    columns = given.columns()
    found += given.problems
    if found:
        raise InputError(found)
    return Options(
        verb=verb,
        run=run,
        model=model,
        cluster=cluster,
        nodes=nodes,
        gpus=gpus,
        recipes={name: recipe for name, recipe in recipes.items() if recipe},
        args=args,
        data=given.path("DATA"),
        validation=given.path("VALIDATION"),
        columns=columns,
        from_=source,
        downloaded=str(place) if downloaded else "",
        models=given.path("MODELS"),
        stage=stage,
        bind=given.text("BIND", CLUSTERS[cluster].listens),
        port=given.text("PORT", "8000"),
        api_key_file=given.path("API_KEY_FILE"),
        service=given.text("SERVICE"),
        prompt=given.text("PROMPT"),
        force=given.switch("FORCE"),
        dry_run=given.switch("DRY_RUN"),
        base=base,
        clusters={kind.name: kind(env) for kind in CLUSTERS.values()},
    )


class _Given:
    """Read the variables of an environment; `problems` lists what cannot be read."""

    def __init__(self, verb: str, env: Mapping[str, str]):
        self.verb, self.env = verb, env
        self.problems: list[str] = []

    def text(self, name: str, default: str = "") -> str:
        return self.env.get(name, "").strip() or default

    def path(self, name: str) -> str:
        return os.path.expanduser(self.text(name))  # sh leaves ~ alone behind NAME=

    def switch(self, name: str) -> bool:
        return self.text(name) not in ("", "0")

    def count(self, name: str) -> int:
        text = self.text(name, "1")
        if text.isdecimal() and int(text) > 0:
            return int(text)
        self.problems.append(f"{name}={text}: give a whole number of at least 1, as {name}=2")
        return 1

    def columns(self) -> str:
        text = self.text("COLUMNS")
        if text.isdecimal():  # a shell's, of its terminal
            return ""
        if text and not re.fullmatch(r"\s*\w+=[^,=]+(,\s*\w+=[^,=]+)*", text):
            example = 'COLUMNS="prompt=question,chosen=best"'
            self.problems.append(f"COLUMNS={text}: give our names with yours, as {example}")
        return text

    def recipe(self, row: StageRow) -> str:
        """Return the recipe that was named for a stage; "" if none was."""
        text = self.text(f"{row.name.upper()}_RECIPE")
        text = text or (self.text("RECIPE") if row.name == self.verb else "")
        variable = "RECIPE"
        if row == stages.quantizer() and not text:
            variable, text = row.name.upper(), self.text(row.name.upper())
        if row.makes == "verdict" and "/" in text:  # a suite of the user's own
            text = os.path.expanduser(text).rstrip("/")
            if not Path(text).is_dir():
                example = f"give one of lm-eval's tasks, as configs/{row.name}/custom is"
                self.problems.append(f"RECIPE={text}: no such folder; {example}")
            return text
        known = sorted({p.stem for p in (CONFIGS / row.name).glob("*.*")}) if row.recipe else []
        if text and not known:
            self.problems.append(f"{variable}={text}: {row.name} takes none; leave it out")
        elif text and text not in known:
            where = f"known: {', '.join(known)} (configs/{row.name})"
            if row.makes == "verdict":
                where += f"; a folder of your own has a / in it: RECIPE=./{text}"
            self.problems.append(f"{variable}={text}: unknown; {where}")
        return text

    def quantized(self, row: Optional[StageRow], recipes: Mapping[str, str]) -> str:
        """Return the recipe by which a run's model is quantised for this command, "" for none."""
        small = stages.quantizer()
        if row == small:
            return recipes[small.name] or small.recipe
        variable = small.name.upper()
        text = self.text(variable)
        if text and (self.verb == PIPELINE or (row and small.name not in stages.before(row.name))):
            server = stages.maker("service").name
            mend = f"make {server} {variable}={text}, once the run has its model"
            self.problems.append(f"{variable}={text}: not for {self.verb}; {mend}")
        return text

    def repository(self, name: str, folder: Path) -> str:
        """Return the directory of a model that was downloaded by its repository's name."""
        place = folder / name.replace("/", "--")
        if not (place / "download.json").exists():
            self.problems.append(f"MODEL={name}: not in {folder} yet; make download MODEL={name}")
        return str(place)

    def arguments(self, row: StageRow) -> list[str]:
        text = self.env.get(f"{row.name.upper()}_ARGS", "")
        text = text or (self.env.get("ARGS", "") if row.name == self.verb else "")
        if text and not row.has_config:
            self.problems.append(f"ARGS={text}: {row.name} takes none; leave it out")
        try:
            return shlex.split(text)
        except ValueError as error:
            self.problems.append(f"ARGS of {row.name}: {error}: {text}")
            return []


def _each(variable: str) -> str:
    """Name a variable of each stage that has a recipe, and so takes it."""
    return " ".join(f"{row.name.upper()}_{variable}" for row in stages.TABLE if row.recipe)


def _model_problems(verb: str, model: str) -> list[str]:
    known = sorted(folder_names(MODELS))
    if not model or model in known or verb not in verbs():
        return []
    near = difflib.get_close_matches(model, known, n=4)
    meant = f"did you mean {', '.join(near)}? " if near else ""
    return [f"MODEL={model}: unknown; {meant}known are those of `make models`, or any by FROM="]


def _model_of(run: Run, verb: str, source: str) -> str:
    """Return the model whose settings are taken where MODEL does not say: none for a FROM; that of
    the newest stage that the run has up to this one; or else the debug model's."""
    if source:
        return ""
    names = [*stages.before(verb), verb] if verb in stages.names() else stages.names()
    there = [name for name in names if (run.stage(name) / "stage.env").exists()]
    # Sets that were prepared for another's tokenizer name no model.
    there = [name for name in there if stages.row(name).recipe] or there
    facts = files.read_env(run.stage(there[-1]) / "stage.env") if there else {"MODEL": DEBUG}
    return facts.get("MODEL", "")


def with_recipe(row: StageRow, recipe: str) -> StageRow:
    """Return a stage's row, with what a comment of the recipe says of it: another tool than the
    stage's own, and the kind of rows that it trains on."""
    if not row.trains_on:
        return row
    name = recipe or row.recipe
    texts = [path.read_text(encoding="utf-8") for path in (CONFIGS / row.name).glob(f"{name}.*")]
    found = re.search(r"^# tool: (\w+), trains on: (\w+)$", "\n".join(texts), re.M)
    return row._replace(tool=found[1], trains_on=found[2]) if found else row


def settings(model: str, stage: str, tool: str = "") -> list[str]:
    """Read what a model sets of a stage, in the words of the stage's tool: the arguments in
    configs/models/<model>/<stage>.args, or <stage>.<tool>.args. Empty if there is none."""
    path = MODELS / model / f"{stage}{'.' if tool else ''}{tool}.args"
    if not model or not path.exists():
        return []
    return shlex.split(path.read_text(encoding="utf-8"), comments=True)
