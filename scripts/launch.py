"""The front door behind make: checks what the user asked for, writes the submission, hands it to a cluster.

    python3 -m scripts.launch <verb>        verbs: the stages, pipeline, status, logs, stop, clean, lineage, undeploy

Every option comes by environment variable (see `make help`), so quotes and spaces survive make. Standard library
only, Python 3.9 or newer: this runs on a login node with nothing installed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from scripts import local, modeldir, report, rundir
from scripts.errors import DONE, WRONG_INPUT, InputError
from scripts.rundir import ROOT, STAGES, TRAINED, dump_json, record, stage_dir

CLUSTERS = {"local": local}
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

    @property
    def stage(self) -> str:
        return self.directory.name


def read_request(verb: str, env: dict[str, str]) -> Request:
    """Parse and check every option. Raises InputError with all problems at once."""
    found: list[str] = []
    get = lambda name, default="": env.get(name, "").strip() or default  # noqa: E731
    model, cluster = get("MODEL", "debug"), get("CLUSTER", "local")
    run = get("RUN", model)
    found += rundir.check_run_name(run)
    models = sorted({p.stem for stage in STAGES for p in (CONFIGS / stage).glob("*.*")} | _names(CONFIGS / "models"))
    if model not in models and verb in (*STAGES, "pipeline"):
        found.append(f"MODEL={model}: unknown; known: {', '.join(m for m in models if '.' not in m)} (configs/<stage>/<model>.*)")
    if cluster not in CLUSTERS:
        found.append(f"CLUSTER={cluster}: not yet; known: {', '.join(CLUSTERS)}")
    counts = {}
    for name in ("NODES", "GPUS"):
        text = get(name, "1")
        counts[name] = int(text) if text.isdigit() else 0
        if counts[name] < 1:
            found.append(f"{name}={text}: give a whole number of at least 1; for example {name}=2")
    if counts["NODES"] > 1 and cluster == "local":
        found.append(f"NODES={counts['NODES']}: CLUSTER=local is one machine; use GPUS={counts['NODES']} for that many processes on it")
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
        verb=verb, run=run, model=model, cluster=cluster, nodes=counts["NODES"], gpus=counts["GPUS"], args=args,
        data=get("DATA"), source=get("FROM"), stage=get("STAGE"), bind=get("BIND", "127.0.0.1"), port=get("PORT", "8000"),
        api_key_file=get("API_KEY_FILE"), force=get("FORCE") not in ("", "0"), dry_run=get("DRY_RUN") not in ("", "0"),
    )


def _names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_dir()} if folder.is_dir() else set()


# --- what a stage needs ----------------------------------------------------------------------------------------


def plan(request: Request, stage: str, pending: tuple[str, ...] = ()) -> Submission:
    """The submission of one stage. `pending` names stages that will have finished before it starts.

    Raises InputError with every problem found without torch: the rest is checked in the job.
    """
    directory = stage_dir(request.run, stage)
    submission = Submission(directory, request.nodes if stage in TRAINED else 1, request.gpus if stage in TRAINED else 1)
    found: list[str] = []
    facts = {"MODEL": request.model}
    if stage == "data":
        facts["SOURCE"] = _relative(Path(request.data)) if request.data else "python"
        if request.data and not Path(request.data).exists():
            found.append(f"DATA={request.data}: no such file or folder; give a .txt or .jsonl file, or a folder of them")
    elif stage in (*TRAINED, "evaluate"):
        facts["DATA"] = _relative(prepared_data(request) or stage_dir(request.run, "data") / "sets")
    model = _input_model(request, stage, pending)
    if model:
        facts["FROM"] = _relative(model)
        if not any(model.parent == stage_dir(request.run, s) for s in pending):
            found += modeldir.problems(model)
    elif stage not in ("data", "pretrain"):
        found.append(f"{stage} needs a model: train one in this run (make pretrain RUN={request.run}), or give FROM=<Hugging Face directory>")
    if stage in ("data", "pretrain") and not (stage == "pretrain" and model):
        architecture = CONFIGS / "models" / request.model / "config.json"
        if architecture.exists():
            submission.files["architecture.json"] = architecture.read_text(encoding="utf-8")
        else:
            found.append(f"{_relative(architecture)}: missing; a model born here needs its architecture there, any other its FROM=")
    if stage != "data":
        found += _add_config(submission, stage, request.model)
    if stage == "deploy":
        facts |= {"BIND": request.bind, "PORT": request.port}
        found += _check_service(request, facts, model, pending)
    if stage in TRAINED:
        facts |= {"NODES": str(request.nodes), "GPUS": str(request.gpus)}
    found += CLUSTERS[request.cluster].problems(submission)
    if found:
        raise InputError(found)
    submission.files["stage.env"] = rundir.format_env(facts)
    submission.files["args.json"] = dump_json(request.args.get(stage, []))
    return submission


def prepared_data(request: Request) -> Path | None:
    """The sets that DATA names if it is already prepared (a data stage's directory or its sets/), else None."""
    for path in (Path(request.data), Path(request.data, "sets")) if request.data else ():
        if (path / "data.json").exists():
            return path
    return None


def _input_model(request: Request, stage: str, pending: tuple[str, ...]) -> Path | None:
    """FROM, or the newest model before this stage in the run, finished or about to be."""
    if stage == "data":
        return None
    if request.source:
        return Path(request.source)
    before = TRAINED[: TRAINED.index(stage)] if stage in TRAINED else TRAINED
    for name in reversed(before):
        if name in pending or record(stage_dir(request.run, name)):
            return stage_dir(request.run, name) / "model"
    return None


def _add_config(submission: Submission, stage: str, model: str) -> list[str]:
    """Freeze configs/<stage>/<model>.* into the submission as config.*; evaluate takes its tasks and floors along."""
    files = [p for p in sorted((CONFIGS / stage).glob(f"{model}.*")) if p.name.count(".") == 1]
    if not files:
        return [f"configs/{stage}/{model}.*: missing; copy one of {', '.join(sorted(p.name for p in (CONFIGS / stage).glob('*.*')))}"]
    submission.files[f"config{files[0].suffix}"] = files[0].read_text(encoding="utf-8")
    if stage == "evaluate":
        for path in sorted((CONFIGS / stage / "tasks").iterdir()):
            if path.is_file():
                submission.files[f"tasks/{path.name}"] = path.read_text(encoding="utf-8")
        floors = CONFIGS / stage / f"{model}.floors.json"
        if not floors.exists():
            return [f"{_relative(floors)}: missing; deploy needs to know which scores pass"]
        submission.files["floors.json"] = floors.read_text(encoding="utf-8")
    return []


def _check_service(request: Request, facts: dict[str, str], model: Path | None, pending: tuple[str, ...]) -> list[str]:
    found = []
    if not request.port.isdigit() or not 0 < int(request.port) < 65536:
        found.append(f"PORT={request.port}: give a number from 1 to 65535; for example PORT=8001")
    if request.api_key_file:
        facts["API_KEY_FILE"] = _relative(Path(request.api_key_file))
        key = Path(request.api_key_file)
        if not key.exists() or not key.read_text().strip():
            found.append(f"API_KEY_FILE={key}: missing or empty; openssl rand -hex 24 > {key}; chmod 600 {key}")
        elif key.stat().st_mode & 0o077:
            found.append(f"API_KEY_FILE={key}: readable by others; chmod 600 {key}")
    elif request.bind not in ("127.0.0.1", "localhost", "::1"):
        found.append(f"BIND={request.bind}: others can reach that address, so it needs a key of yours: "
                     "(umask 077; openssl rand -hex 24 > api-key) and API_KEY_FILE=api-key")
    if request.force:
        facts["FORCE"] = "1"
    elif model and "evaluate" not in pending:
        found += report.gate_problems(stage_dir(request.run, "evaluate"), model)
    return found


def _relative(path: Path) -> str:
    """Relative to the repository where it lies inside, so that a run directory survives a move."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if ROOT in path.parents else str(path)


# --- running ---------------------------------------------------------------------------------------------------


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
            before, now = rundir.read_env(path), dict(line.split("=", 1) for line in text.splitlines())
            for key in sorted(before.keys() | now.keys()):
                if rundir.format_env({key: before.get(key, "")}) != f"{key}={now.get(key, '')}\n":
                    found.append(f"{key} was {before.get(key, 'not set')}, now {rundir.unquote(now.get(key, 'not set'))}")
        elif name == "args.json":
            found.append(f"ARGS were {shlex.join(rundir.read_json(path))!r}, now {text.split()!r}")
        else:
            found.append(f"{name} has changed since (the run's copy: {_relative(path)})")
    return found


def launch(request: Request, stage: str) -> int:
    """Start one stage, or say that it is done. Returns an exit code."""
    if stage in (*TRAINED, "evaluate") and not prepared_data(request):
        data = stage_dir(request.run, "data")
        if not record(data) or request.data:
            code = launch(request, "data")
            if code:
                return code
    submission = plan(request, stage, pending=("data",))
    kept = record(submission.directory) or (submission.directory / "checkpoints").exists()
    changed = differences(submission) if kept else []  # nothing to lose: a mended ARGS may simply try again
    if changed:
        again = f"make clean RUN={request.run} STAGE={stage}"
        raise InputError([f"{_relative(submission.directory)} exists with other settings: {'; '.join(changed)}. "
                          f"Choose another RUN, or remove this stage and what it made: {again}"])
    if record(submission.directory):
        print(f"{stage}: done already; {report.one_line(submission.directory)}")
        return DONE
    if rundir.running(submission.directory):
        if stage == "deploy":
            print(f"deploy: serving already; {report.one_line(submission.directory)}")
            return DONE
        raise InputError(f"{stage} of run {request.run} is running already; make status RUN={request.run}, or make stop RUN={request.run}")
    write(submission)
    return CLUSTERS[request.cluster].submit(submission)


def write(submission: Submission) -> None:
    """Write the submission. Raises InputError where the directory cannot be written."""
    try:
        for name, text in {**submission.files, "submitted.txt": CLUSTERS["local"].command_line(submission) + "\n"}.items():
            path = submission.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            rundir.write_atomic(path, text)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; runs go under {rundir.runs_root()}, choose another with RUNS=") from None


def pipeline(request: Request) -> int:
    """All stages in order, going on from the first that is not done; the table at the end."""
    stages = [s for s in STAGES if not (s == "data" and prepared_data(request))]
    for stage in stages:
        plan(request, stage, pending=tuple(stages[: stages.index(stage)]))  # every problem before the first minute
    for stage in stages:
        print(f"\n== {stage}", flush=True)
        code = launch(request, stage)
        if code:
            return code
    print("\n" + report.table(request.run))
    return report.sample(request.run)


def show_dry_run(request: Request) -> None:
    """Print what would be written and started; touch nothing."""
    stages = list(STAGES) if request.verb == "pipeline" else [request.verb]
    if request.verb in (*TRAINED, "evaluate") and not prepared_data(request) and not record(stage_dir(request.run, "data")):
        stages.insert(0, "data")
    for stage in stages:
        submission = plan(request, stage, pending=STAGES[: STAGES.index(stage)])
        for name in ("stage.env", "args.json"):
            print(f"# {_relative(submission.directory)}/{name}\n{submission.files[name].strip()}")
        for name in sorted(set(submission.files) - {"stage.env", "args.json"}):
            print(f"# {_relative(submission.directory)}/{name}")
        print(CLUSTERS[request.cluster].command_line(submission) + "\n")


def stop(request: Request) -> int:
    """Stop whatever of the run is running: state is saved where the stage can, the same command goes on."""
    stages = [s for s in STAGES if rundir.running(stage_dir(request.run, s)) and request.stage in ("", s)]
    if not stages:
        print(f"nothing of run {request.run} is running")
    for stage in stages:
        CLUSTERS[request.cluster].stop(stage_dir(request.run, stage))
        print(f"{stage}: stopped")
    return DONE


def clean(request: Request) -> int:
    """Remove a run, or one stage of it; refuses while it runs."""
    target = stage_dir(request.run, request.stage) if request.stage else rundir.runs_root() / request.run
    if not target.exists():
        raise InputError(f"{target}: nothing there; runs: {', '.join(sorted(_names(rundir.runs_root()))) or 'none'}")
    busy = [s for s in STAGES if rundir.running(stage_dir(request.run, s)) and request.stage in ("", s)]
    if busy:
        raise InputError(f"{', '.join(busy)} of run {request.run} is running; first make stop RUN={request.run}")
    shutil.rmtree(target)
    print(f"removed {_relative(target)}")
    return DONE


def main(arguments: list[str]) -> int:
    """Run one verb. Returns its exit code."""
    verbs = {
        **{stage: lambda request: launch(request, request.verb) for stage in STAGES},
        "pipeline": pipeline,
        "status": lambda request: print(report.table(request.run)) or DONE,
        "logs": lambda request: report.logs(request.run, request.stage),
        "lineage": lambda request: report.lineage(request.run),
        "stop": stop,
        "undeploy": lambda request: stop(Request(**{**vars(request), "stage": "deploy"})),
        "clean": clean,
    }
    verb = arguments[0] if len(arguments) == 1 else ""
    try:
        if verb not in verbs:
            raise InputError(f"{' '.join(arguments) or 'no verb'}: unknown; known: {', '.join(verbs)}")
        request = read_request(verb, dict(os.environ))
        if request.dry_run and verb in (*STAGES, "pipeline"):
            show_dry_run(request)
            return DONE
        return verbs[verb](request)
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
