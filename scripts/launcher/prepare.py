"""From the options to one stage's submission: the files that say what runs, and every problem that
can be found without torch. Writes nothing; the job checks the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from scripts.launcher import sources
from scripts.launcher.options import (
    CONFIGS,
    MODELS,
    MODELS_HERE,
    PIPELINE,
    Options,
    folder_names,
    settings,
)
from scripts.run import gate, modeldir, preflight, stages, suites
from scripts.run.digests import Digests
from scripts.run.errors import InputError
from scripts.run.files import dump_json, format_env, read_env, read_json
from scripts.run.layout import as_fact, finished, from_fact, relative
from scripts.run.stages import StageRow
from scripts.run.submission import Submission

PLACED = {"DATA", "VALIDATION", "FROM"}  # facts that name what the user has, perhaps here alone
LARGE = 4e9  # parameters: to train all, 8 bytes of each in bf16, 16 in fp32, before activations
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def prepare(
    options: Options, row: StageRow, pending: tuple[str, ...] = ()
) -> tuple[Submission, list[str]]:
    """Return the submission of one stage, and the problems found on the way. `pending` names the
    stages that will have finished before it starts."""
    size = (options.nodes, options.gpus) if row.ranks else (1, 1)
    if row.spreads and options.verb == row.name:
        size = (options.nodes, 1)
    submission = Submission(options.run.stage(row.name), *size)
    found: list[str] = []
    model = _model_read(options, row, pending)
    named = options.model and not row.alone and (row.recipe or not model)
    facts = {**({"MODEL": options.model} if named else {}), **_data_fact(options, row)}
    seen = options.here.sees_runs
    if "corpus" in row.reads and (seen or Path(options.data).exists()):
        found += sources.problems(options)
    if model:
        facts["FROM"] = as_fact(model, options.run.root)
        known = seen or (model.exists() and not facts["FROM"].startswith("runs/"))
        if known and not any(model.parent == options.run.stage(name) for name in pending):
            wrong = modeldir.problems(model)
            if row.trains_on and not wrong:
                wrong = modeldir.untrainable(model / "config.json")
            found += wrong
    elif row.from_scratch:
        found += _add_architecture(submission, options.model)
    elif "model" in row.reads:
        first = stages.trained()[0]
        named = (MODELS / options.model / "model.json").exists() and options.model
        download = f", or make download MODEL={options.model}" if named else ""
        run, there = options.run.name, ", ".join(sorted(folder_names(options.run.root))) or "none"
        lacks = "has none" if options.run.directory.is_dir() else f"is not there (runs: {there})"
        found.append(
            f"{row.name} needs a model, and run {run} {lacks}: train one, make {first} "
            f"RUN={run}, or give FROM=<Hugging Face directory>{download}"
        )
    if "corpus" in row.reads:
        if sources.recipe(options).is_file():
            submission.copy(sources.recipe(options), "config.yaml")
    elif row.recipe:
        facts["RECIPE"] = _recipe(options, row, model)
        suite = sources.suite(options, row)
        if suite:
            found += _add_suite(submission, options, suite, facts)
        else:
            found += _add_config(submission, options.model, facts["RECIPE"])
    kinds = sources.kinds(options) if row.trains_on else None
    if kinds is not None and row.trains_on not in kinds and facts["RECIPE"] != row.without_rows:
        found.append(sources.lacks(options, row, kinds))
    if row.makes == "verdict" and model:
        for name, earlier in _before(options, model, pending):
            facts[gate.before_fact(name)] = as_fact(earlier, options.run.root)
        judged = gate.FLOORS in submission.files or gate.before_fact(gate.PARENT) in facts
        if options.verb == PIPELINE and not judged:
            floors = relative((suite or MODELS / options.model) / gate.FLOORS)
            found.append(f"{floors}: missing; the gate needs to know which scores pass")
    if row.serves:
        facts.update(BIND=options.bind, PORT=options.port)
        if options.here.names_services:
            facts["SERVICE"] = options.service or options.run.name
        found += _service_problems(options, facts)
        found += _gate_problems(options, model, pending) if seen else []
        found += _gpu_problems(options, model)
    if row.ranks:
        found += _disk_problems(submission, model) if seen else []
        facts.update(NODES=str(options.nodes), GPUS=str(options.gpus))
    elif submission.nodes > 1:
        facts["NODES"] = str(submission.nodes)
    for name in [*(PLACED & facts.keys()), *suites.staged_facts(facts)]:
        facts[name] = options.here.place(facts[name], options.run)
    submission.files["stage.env"] = format_env(facts)
    words = [*settings(options.model, row.name, row.tool), *options.args.get(row.name, [])]
    submission.files["args.json"] = dump_json(words)
    return submission, found


def _data_fact(options: Options, row: StageRow) -> dict[str, str]:
    """Return DATA as the stage reads it: the corpus, or the prepared sets."""
    if "corpus" in row.reads:
        return sources.facts(options)
    if "sets" not in row.reads or sources.suite(options, row):
        return {}
    maker = stages.maker("sets")
    sets = sources.prepared(options) or options.run.stage(maker.name) / maker.makes
    return {"DATA": as_fact(sets, options.run.root)}


def _model_read(options: Options, row: StageRow, pending: tuple[str, ...]) -> Optional[Path]:
    """Return the model that a stage starts from: FROM, or the newest one before it in the run,
    finished or pending, or the one that was downloaded. None if there is none."""
    if "model" not in row.reads:
        return None
    models = stages.makers()
    if options.from_ and not (options.several and set(models) & set(pending)):
        return Path(options.from_)  # a pipeline starts from it; its later stages follow on
    before = [name for name in stages.before(row.name) if name in models]
    for name in reversed(before):
        if name in pending or finished(options.run.stage(name)):
            return options.run.stage(name) / "model"
    return Path(options.downloaded) if options.downloaded else None


def _before(options: Options, model: Path, pending: tuple[str, ...]) -> list[tuple[str, Path]]:
    """List (stage, model) of what a model of the run was trained from, first to last; the one that
    the run began with is called gate.PARENT. Empty for a model that the run only reads."""
    found: list[tuple[str, Path]] = []
    while model.parent.parent == options.run.directory:
        name = model.parent.name
        facts = model.parent / "stage.env"
        if name in pending:
            earlier = tuple(p for p in pending if p in stages.before(name))
            source = _model_read(options, stages.row(name), earlier)
        elif facts.exists() and "FROM" in read_env(facts):
            source = from_fact(read_env(facts)["FROM"], options.run.root)
        else:
            source = None
        if source is None:
            break
        inside = source.parent.parent == options.run.directory
        found.insert(0, (source.parent.name if inside else gate.PARENT, source))
        model = source
    return found


def _add_architecture(submission: Submission, model: str) -> list[str]:
    """Freeze the architecture of a model that is born here."""
    if not model:
        return [
            "MODEL: which architecture is to be born? Name one of configs/models, or give FROM="
        ]
    path = MODELS / model / "config.json"
    if not path.exists():
        where = "a model born here needs its architecture there, any other its FROM="
        return [f"{relative(path)}: missing; {where}"]
    submission.copy(path, "architecture.json")
    return []


def _recipe(options: Options, row: StageRow, model: Optional[Path]) -> str:
    """Return the recipe that a stage runs: the one that was named, or its own for the size."""
    if row.name in options.recipes:
        return options.recipes[row.name]
    facts = read_json(MODELS / options.model / "model.json") if options.model else None
    try:
        size = (facts or {}).get("parameters") or modeldir.parameter_count(model or Path())
    except (InputError, OSError):
        size = 0  # it is not there yet
    return row.large if row.large and size > LARGE else row.recipe


def _add_config(submission: Submission, model: str, recipe: str) -> list[str]:
    """Add a copy of configs/<stage>/<recipe>.* to the submission as config.*, and of the recipe's
    code under its own name; for a stage that makes a verdict its tasks and the model's floors, too.
    Return what is missing."""
    stage, folder = submission.row.name, CONFIGS / submission.row.name
    files = sorted(folder.glob(f"{recipe}.*"))
    if not files:
        return [f"configs/{stage}/{recipe}.*: missing; the stage's own recipe must be there"]
    for path in files:
        code = path.suffix == ".py"
        submission.copy(path, path.name if code else f"config{path.suffix}")
    if submission.row.makes != "verdict":
        return []
    for path in sorted((folder / "tasks").iterdir()):
        if path.is_file():
            submission.copy(path, f"tasks/{path.name}")
    floors = MODELS / model / gate.FLOORS
    if model and floors.exists():
        submission.copy(floors, gate.FLOORS)
    return []


def _add_suite(
    submission: Submission, options: Options, suite: Path, facts: dict[str, str]
) -> list[str]:
    """Add a copy of a suite's folder, the config that runs it, and facts that name its data sets.
    Return what is missing."""
    recipe = facts["RECIPE"]
    own = "/" in recipe
    if own:
        facts["RECIPE"] = as_fact(suite, options.run.root)
    submission.copy(
        CONFIGS / submission.row.name / f"{suites.OWN if own else recipe}.yaml", "config.yaml"
    )
    try:
        for name, path in suites.files(suite).items():
            submission.copy(path, gate.FLOORS if name == gate.FLOORS else f"{suites.TASKS}/{name}")
        names = sorted(suites.data_sets(suite))
    except InputError as error:
        return error.problems
    models = Path(options.models or MODELS_HERE)
    facts.update(
        suites.facts([as_fact(suites.staged(models, name), options.run.root) for name in names])
    )
    if not options.here.sees_runs and options.models and not models.exists():
        return []  # on the volume: the job looks
    found = suites.unreadable(models) if names else []
    return found or suites.lacking(recipe, models, options.models)


def _disk_problems(submission: Submission, model: Optional[Path]) -> list[str]:
    """Tell whether the run's disk can hold the model that will be handed on, of at least two bytes
    a parameter. Nothing is known of one that is not there yet: the job asks again."""
    folder = model / "config.json" if model else submission.origins.get("architecture.json")
    try:
        architecture = read_json(folder) if folder else None
        size = 2 * preflight.parameters(architecture or {})
    except (KeyError, TypeError, ValueError, InputError):
        return []  # no architecture to count by: that is named where it is read
    return preflight.disk_problems(submission.directory, size, "the model")


def _service_problems(options: Options, facts: dict[str, str]) -> list[str]:
    """Check a service's port and key, and add the key's file to the facts."""
    found = []
    if not options.port.isdecimal() or not 0 < int(options.port) < 65536:
        found.append(f"PORT={options.port}: give a number from 1 to 65535; for example PORT=8001")
    key = Path(options.api_key_file)
    if options.api_key_file:
        facts["API_KEY_FILE"] = as_fact(key, options.run.root)
        if not key.exists() or not key.read_text(encoding="utf-8").strip():
            mend = f"openssl rand -hex 24 > {key}; chmod 600 {key}"
            found.append(f"API_KEY_FILE={key}: missing or empty; {mend}")
        elif key.stat().st_mode & 0o077:
            found.append(f"API_KEY_FILE={key}: readable by others; chmod 600 {key}")
    elif options.bind not in (*LOOPBACK, options.here.listens):
        found.append(
            f"BIND={options.bind}: others can reach that address, so it needs a key of yours: "
            "(umask 077; openssl rand -hex 24 > api-key) and API_KEY_FILE=api-key"
        )
    if options.force:
        facts["FORCE"] = "1"
    return found


def _gpu_problems(options: Options, model: Optional[Path]) -> list[str]:
    """Tell whether this machine would have to serve what its vLLM cannot, before it is made."""
    small = stages.quantizer().name
    if options.cluster != "local" or options.dry_run:
        return []
    files = list((CONFIGS / small).glob(f"{options.recipes.get(small)}.*"))
    files += [model / "config.json"] if model else []
    said = [path.read_text(encoding="utf-8") for path in files if path.exists()]
    return preflight.kernel_problems("\n".join(said), Path("/dev"))


def _gate_problems(options: Options, model: Optional[Path], pending: tuple[str, ...]) -> list[str]:
    """Ask the gate, unless the verdict is still to come: then the job asks it."""
    judging = stages.maker("verdict").name
    if options.force or not model or judging in pending:
        return []
    digests = Digests(options.run, remember=not options.dry_run)
    return gate.problems(options.run.stage(judging), model, digests)
