"""From what the user asked for to the files that say what runs: options, checks, one stage's submission.

Standard library only, Python 3.9 or newer. Nothing is written here.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from scripts.clusters import local, slurm
from scripts.launcher import report
from scripts.run import attempts, files, layout, modeldir, preflight
from scripts.run.errors import InputError
from scripts.run.files import dump_json, read_json
from scripts.run.layout import ROOT, STAGES, TRAINED, as_fact, record, relative, stage_dir

CLUSTERS = {"local": local, "slurm": slurm}
CONFIGS = ROOT / "configs"


@dataclass
class Request:
    """What the user asked for, from environment variables; names as in `make help`."""

    verb: str
    run: str
    model: str
    cluster: str
    nodes: int
    gpus: int
    args: dict[str, list[str]]
    data: str = ""
    source: str = ""  # FROM
    stage: str = ""
    bind: str = "127.0.0.1"
    port: str = "8000"
    api_key_file: str = ""
    force: bool = False
    dry_run: bool = False


@dataclass
class Submission:
    """One stage ready to start: where, and the files that say what runs."""

    directory: Path
    nodes: int
    gpus: int
    files: dict[str, str] = field(default_factory=dict)
    origins: dict[str, Path] = field(default_factory=dict)  # of the files that are copies

    @property
    def stage(self) -> str:
        return self.directory.name

    def copy(self, path: Path, name: str) -> None:
        """Freeze a file of the repository under a name in the stage's directory."""
        self.files[name], self.origins[name] = path.read_text(encoding="utf-8"), path

    def as_shell(self) -> str:
        """Commands that write these files, for a shell in the repository."""
        folders = {(self.directory / name).parent for name in ("logs/*", *self.files) if "/" in name}
        lines = [f"mkdir -p {shlex.join(sorted(map(relative, folders)))}"]
        for name, text in self.files.items():
            path = shlex.quote(relative(self.directory / name))
            copied = name in self.origins and shlex.quote(relative(self.origins[name]))
            lines.append(f"cp {copied} {path}" if copied else f"cat > {path} << 'EOF'\n{text}EOF")
        return "\n".join(lines)


def read_request(verb: str, env: dict[str, str]) -> Request:
    """Parse and check every option. Raises InputError with all problems at once."""
    found: list[str] = []
    get = lambda name, default="": env.get(name, "").strip() or default  # noqa: E731
    path = lambda name: os.path.expanduser(get(name))  # noqa: E731  sh leaves ~ alone behind NAME=
    model, cluster = get("MODEL", "debug"), get("CLUSTER", "local")
    run = get("RUN", model)
    found += layout.check_run_name(run)
    configs = {p.stem for stage in STAGES for p in (CONFIGS / stage).glob("*.*") if p.name.count(".") == 1}
    models = sorted(configs | folder_names(CONFIGS / "models"))
    if model not in models and verb in (*STAGES, "pipeline"):
        found.append(f"MODEL={model}: unknown; known: {', '.join(models)} (configs/<stage>/<model>.*)")
    if cluster not in CLUSTERS:
        found.append(f"CLUSTER={cluster}: not yet; known: {', '.join(CLUSTERS)}")
    counts = {}
    for name in ("NODES", "GPUS"):
        text = get(name, "1")
        counts[name] = int(text) if text.isdigit() else 0
        if counts[name] < 1:
            found.append(f"{name}={text}: give a whole number of at least 1; for example {name}=2")
    if counts["NODES"] > 1 and cluster == "local":
        found.append(
            f"NODES={counts['NODES']}: CLUSTER=local is one machine; use GPUS={counts['NODES']} for that many processes on it"
        )
    args: dict[str, list[str]] = {}
    if get("ARGS") and verb == "pipeline":
        found.append("ARGS: which stage of the pipeline? Use " + " ".join(f"{s.upper()}_ARGS" for s in STAGES[1:]) + " instead")
    for stage in STAGES:
        text = env.get(f"{stage.upper()}_ARGS") or (env.get("ARGS", "") if stage == verb else "")
        try:
            args[stage] = shlex.split(text)
        except ValueError as error:
            found.append(f"ARGS of {stage}: {error}: {text}")
    if get("STAGE") and get("STAGE") not in STAGES:
        found.append(f"STAGE={get('STAGE')}: unknown; known: {', '.join(STAGES)}")
    if found:
        raise InputError(found)
    return Request(
        verb=verb,
        run=run,
        model=model,
        cluster=cluster,
        nodes=counts["NODES"],
        gpus=counts["GPUS"],
        args=args,
        data=path("DATA"),
        source=path("FROM"),
        stage=get("STAGE"),
        bind=get("BIND", CLUSTERS[cluster].BIND),
        port=get("PORT", "8000"),
        api_key_file=path("API_KEY_FILE"),
        force=get("FORCE") not in ("", "0"),
        dry_run=get("DRY_RUN") not in ("", "0"),
    )


def folder_names(folder: Path) -> set[str]:
    """Names of the folders in a folder."""
    return {p.name for p in folder.iterdir() if p.is_dir()} if folder.is_dir() else set()


def plan(request: Request, stage: str, pending: tuple[str, ...] = ()) -> Submission:
    """The submission of one stage. `pending` names stages that will have finished before it starts.

    Raises InputError with every problem found without torch: the rest is checked in the job.
    """
    directory = stage_dir(request.run, stage)
    submission = Submission(directory, request.nodes if stage in TRAINED else 1, request.gpus if stage in TRAINED else 1)
    found: list[str] = []
    facts = {"MODEL": request.model}
    if stage == "data":
        if request.args.get(stage):
            found.append("ARGS: data has no upstream tool to take them; DATA= names the source")
        facts["SOURCE"] = as_fact(Path(request.data)) if request.data else "python"
        if request.data:
            found += _source_problems(Path(request.data))
    elif stage in (*TRAINED, "evaluate"):
        facts["DATA"] = as_fact(prepared_data(request) or stage_dir(request.run, "data") / "sets")
    model = _input_model(request, stage, pending)
    if model:
        facts["FROM"] = as_fact(model)
        if not any(model.parent == stage_dir(request.run, s) for s in pending):
            found += modeldir.problems(model)
    elif stage not in ("data", "pretrain"):
        found.append(
            f"{stage} needs a model: train one in this run (make pretrain RUN={request.run}), or give FROM=<Hugging Face directory>"
        )
    if stage in ("data", "pretrain") and not (stage == "pretrain" and model):
        architecture = CONFIGS / "models" / request.model / "config.json"
        if architecture.exists():
            submission.copy(architecture, "architecture.json")
        else:
            found.append(f"{relative(architecture)}: missing; a model born here needs its architecture there, any other its FROM=")
    if stage != "data":
        found += _add_config(submission, stage, request.model)
    if stage == "deploy":
        facts |= {"BIND": request.bind, "PORT": request.port}
        found += _check_service(request, facts, model, pending)
    if stage in TRAINED:
        found += _disk_problems(submission, model)
        facts |= {"NODES": str(request.nodes), "GPUS": str(request.gpus)}
    found += CLUSTERS[request.cluster].problems(submission)
    if found:
        raise InputError(found)
    submission.files["stage.env"] = files.format_env(facts)
    submission.files["args.json"] = dump_json(request.args.get(stage, []))
    return submission


def prepared_data(request: Request) -> Path | None:
    """The sets that DATA names if it is already prepared (a data stage's directory or its sets/), else None."""
    for path in (Path(request.data), Path(request.data, "sets")) if request.data else ():
        if (path / "data.json").exists():
            return path
    return None


def _source_problems(path: Path) -> list[str]:
    """Whether DATA is something that the data stage reads."""
    files = path.rglob("*") if path.is_dir() else [path]
    if path.exists() and any(file.suffix in (".txt", ".jsonl") for file in files):
        return []
    what = "nothing to read there" if path.exists() else "no such file or folder"
    return [f"DATA={path}: {what}; give a .txt or .jsonl file, or a folder of them"]


def _input_model(request: Request, stage: str, pending: tuple[str, ...]) -> Path | None:
    """FROM, or the newest model before this stage in the run, finished or about to be."""
    if stage == "data":
        return None
    if request.source and (request.verb != "pipeline" or stage == "pretrain"):
        return Path(request.source)  # a pipeline starts from it; its later stages follow on
    before = TRAINED[: TRAINED.index(stage)] if stage in TRAINED else TRAINED
    for name in reversed(before):
        if name in pending or record(stage_dir(request.run, name)):
            return stage_dir(request.run, name) / "model"
    return None


def _add_config(submission: Submission, stage: str, model: str) -> list[str]:
    """Freeze configs/<stage>/<model>.* into the submission as config.*; evaluate takes its tasks and floors along."""
    files = [p for p in sorted((CONFIGS / stage).glob(f"{model}.*")) if p.name.count(".") == 1]
    if not files:
        return [
            f"configs/{stage}/{model}.*: missing; copy one of {', '.join(sorted(p.name for p in (CONFIGS / stage).glob('*.*')))}"
        ]
    submission.copy(files[0], f"config{files[0].suffix}")
    if stage == "evaluate":
        for path in sorted((CONFIGS / stage / "tasks").iterdir()):
            if path.is_file():
                submission.copy(path, f"tasks/{path.name}")
        floors = CONFIGS / stage / f"{model}.floors.json"
        if not floors.exists():
            return [f"{relative(floors)}: missing; deploy needs to know which scores pass"]
        submission.copy(floors, "floors.json")
    return []


def _disk_problems(submission: Submission, model: Path | None) -> list[str]:
    """Whether the run's disk can hold the model that will be handed on (2 bytes a parameter at least)."""
    text = submission.files.get("architecture.json")
    try:
        architecture = json.loads(text) if text else read_json(model / "config.json")
        return preflight.disk_problems(submission.directory, 2 * preflight.parameters(architecture), "the model")
    except (KeyError, TypeError, ValueError, InputError):
        return []  # no architecture to count: said elsewhere


def _check_service(request: Request, facts: dict[str, str], model: Path | None, pending: tuple[str, ...]) -> list[str]:
    found = []
    if not request.port.isdigit() or not 0 < int(request.port) < 65536:
        found.append(f"PORT={request.port}: give a number from 1 to 65535; for example PORT=8001")
    elif request.cluster == "local" and not request.dry_run and not attempts.running(stage_dir(request.run, "deploy")):
        found += preflight.port_problems(request.bind, int(request.port), patience=1)
    if request.api_key_file:
        facts["API_KEY_FILE"] = as_fact(Path(request.api_key_file))
        key = Path(request.api_key_file)
        if not key.exists() or not key.read_text().strip():
            found.append(f"API_KEY_FILE={key}: missing or empty; openssl rand -hex 24 > {key}; chmod 600 {key}")
        elif key.stat().st_mode & 0o077:
            found.append(f"API_KEY_FILE={key}: readable by others; chmod 600 {key}")
    elif request.bind not in ("127.0.0.1", "localhost", "::1", CLUSTERS[request.cluster].BIND):
        found.append(
            f"BIND={request.bind}: others can reach that address, so it needs a key of yours: "
            "(umask 077; openssl rand -hex 24 > api-key) and API_KEY_FILE=api-key"
        )
    if request.force:
        facts["FORCE"] = "1"
    elif model and "evaluate" not in pending:
        found += report.gate_problems(stage_dir(request.run, "evaluate"), model)
    return found


def differences(submission: Submission) -> list[str]:
    """How an existing submission differs from this one; [] if it is the same or there is none."""
    found = []
    for name, text in submission.files.items():
        path = submission.directory / name
        if not path.exists() or not (submission.directory / "stage.env").exists():
            continue
        old = path.read_text(encoding="utf-8")
        if old == text:
            continue
        if name == "stage.env":
            before, now = files.read_env(path), dict(line.split("=", 1) for line in text.splitlines())
            for key in sorted(before.keys() | now.keys()):
                if files.format_env({key: before.get(key, "")}) != f"{key}={now.get(key, '')}\n":
                    found.append(f"{key} was {before.get(key, 'not set')}, now {files.unquote(now.get(key, 'not set'))}")
        elif name == "args.json":
            before, now = (shlex.join(words) or "none" for words in (files.read_json(path), json.loads(text)))
            found.append(f"ARGS were {before}, now {now}")
        else:
            found.append(f"{name} has changed since (the run's copy: {relative(path)})")
    return found
