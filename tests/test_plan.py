"""One plan for a command: what it asks of a cluster, and that a new stage is a row of a table."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.run import files
from tests.support.launching import assert_refused
from tests.support.models import write_model

ROOT = Path(__file__).resolve().parents[1]
STUB = """#!/bin/sh
echo "{name} $*" >> "$CALLS"
{does}
"""
STUBS = {
    "bash": 'exec /bin/bash "$@"',
    "sbatch": 'case "$*" in *--test-only*) ;; *) wc -l < "$CALLS" ;; esac',
    "squeue": """
for job in $(echo "$1" | tr -c "0-9\\n" " "); do
  echo "$job|PENDING|Dependency|1|N/A||"
done""",
    "scontrol": "echo 'ClusterName = stub'",
}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a login node needs, to edit, with a .venv that can be run."""
    folder = tmp_path / "checkout"
    for name in ("scripts", "slurm", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    return folder


@pytest.fixture
def stubs(tmp_path):
    """Slurm's programs and bash as stubs that note each call; returns their environment."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, does in STUBS.items():
        (folder / name).write_text(STUB.format(name=name, does=does))
        (folder / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    return {"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(calls)}


def launch(checkout, verb, **env):
    """Run the launcher of a checkout on an environment of nothing but `env`."""
    settings = {"PATH": os.environ["PATH"], "RUNS": str(checkout.parent / "runs"), **env}
    words = [sys.executable, "-m", "scripts.launch", verb]
    result = subprocess.run(words, cwd=checkout, env=settings, capture_output=True, text=True)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def calls(env, pattern):
    return len(re.findall(pattern, Path(env["CALLS"]).read_text(), re.M))


def test_a_fresh_pipeline_asks_slurm_little(checkout, stubs):
    """It used to plan every stage three times: 18 test-only, 22 scontrol, 16 squeue, 78 shells."""
    result = launch(checkout, "pipeline", CLUSTER="slurm", RUN="x", NODES="2", GPUS="8", **stubs)
    assert result.returncode == 0, result.stderr
    jobs = re.findall(r"^(\w+): job (\d+)(?:, after job (\d+))?", result.stdout, re.M)
    assert [stage for stage, _, _ in jobs] == [
        "data",
        "pretrain",
        "finetune",
        "align",
        "evaluate",
        "deploy",
    ]
    assert [after for _, _, after in jobs] == ["", *(job for _, job, _ in jobs[:-1])]
    assert calls(stubs, "^sbatch .*--test-only") <= 6, Path(stubs["CALLS"]).read_text()
    assert calls(stubs, "^sbatch .*--parsable") == 6
    assert calls(stubs, "^scontrol show config") <= 1
    assert calls(stubs, "^squeue") <= 2
    assert calls(stubs, "^bash") <= 20


def test_a_dry_run_asks_nothing_of_slurm(checkout, stubs):
    result = launch(checkout, "pipeline", CLUSTER="slurm", RUN="x", DRY_RUN="1", **stubs)
    assert result.returncode == 0, result.stderr
    assert calls(stubs, "^(sbatch|squeue|scontrol)") == 0, Path(stubs["CALLS"]).read_text()
    assert not (checkout.parent / "runs").exists(), "a dry run must write nothing"


@pytest.mark.parametrize("value", ["0", "", "1"])
def test_dry_run_means_one_thing(checkout, tmp_path, value):
    """DRY_RUN=0 is no dry run: it used to submit without the checks that a real launch has."""
    tools = tmp_path / "tools"  # a PATH without Slurm
    tools.mkdir()
    for name in ("bash", "env"):
        (tools / name).symlink_to(shutil.which(name))
    result = launch(checkout, "data", CLUSTER="slurm", RUN="x", DRY_RUN=value, PATH=str(tools))
    assert result.returncode == (0 if value == "1" else 64), result.stderr
    assert ("sbatch: not on PATH" in result.stderr) == (value != "1")


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_new_stage_touches_no_launcher_module(checkout, cluster):
    """A row in the table, a script, a config and, for Slurm, a header file are enough."""
    table = checkout / "scripts/run/stages.py"
    row = 'StageRow("distil", ("sets", "model"), "model", ranks=True, recipe="full", in_line=False)'
    row = f"    {row},\n)\n\n\n"
    table.write_text(table.read_text().replace(")\n\n\ndef row", f"{row}def row", 1))
    (checkout / "scripts/distil.py").write_text("")
    (checkout / "configs/distil").mkdir()
    (checkout / "configs/distil/full.yaml").write_text("recipe: knowledge_distillation\n")
    shutil.copy(checkout / "slurm/align.sbatch", checkout / "slurm/distil.sbatch")
    model, sets = checkout.parent / "runs/x/align", checkout.parent / "runs/x/data/sets"
    sets.mkdir(parents=True)
    (sets / "data.json").write_text("{}")
    (model / "model").mkdir(parents=True)
    options = {"CLUSTER": cluster, "RUN": "x", "DATA": str(sets), "GPUS": "2", "DRY_RUN": "1"}
    result = launch(checkout, "distil", **options)
    assert result.returncode == 64, "its input model is empty, and is looked at"
    assert "distil needs a model" in result.stderr
    (model / "stage.json").write_text('{"status": "done"}')
    result = launch(checkout, "distil", **options)
    assert f"{model / 'model'}: no config.json" in result.stderr
    assert "distil" not in launch(checkout, "status", RUN="x").stdout, "it is not of the line"
    (checkout.parent / "runs/x/distil").mkdir()
    assert "distil" in launch(checkout, "status", RUN="x").stdout
    assert "distil" not in launch(checkout, "pipeline", **{**options, "DATA": ""}).stdout
    assert "distil_ARGS".upper() in launch(checkout, "pipeline", ARGS="x").stderr


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("data", "GPUS", "8"),
        *((s, *given) for s in ("evaluate", "deploy") for given in (("GPUS", "8"), ("NODES", "2"))),
    ],
)
def test_nodes_and_gpus_are_refused_where_they_do_nothing(checkout, stage, name, value):
    result = launch(checkout, stage, CLUSTER="slurm", DRY_RUN="1", **{name: value})
    assert result.returncode == 64
    assert f"{name}={value}: {stage} is one process on one node" in result.stderr


def test_a_verdict_tells_of_the_models_before(checkout, tmp_path):
    """Of stages that are still to come as of those that are done; a model that is only read has
    nothing before it."""
    parent = write_model(tmp_path / "llama")
    run = checkout.parent / "runs/x"

    def told(verb, **options):
        shown = launch(checkout, verb, RUN="x", DRY_RUN="1", **options)
        assert shown.returncode == 0, shown.stderr
        text = re.search(r"evaluate/stage.env'? << 'EOF'\n(.*?)EOF", shown.stdout, re.S)[1]
        facts = files.parse_env(text)
        return {key: value for key, value in facts.items() if key[:5] in ("PAREN", "AFTER")}

    assert told("pipeline") == {
        "AFTER_PRETRAIN": "runs/x/pretrain/model",
        "AFTER_FINETUNE": "runs/x/finetune/model",
    }
    for stage, source in (("finetune", parent), ("align", run / "finetune/model")):
        (run / stage).mkdir(parents=True)
        (run / stage / "stage.env").write_text(f"FROM={source}\n")
        (run / stage / "stage.json").write_text('{"status": "done"}')
        write_model(run / stage / "model")
    data = {"DATA": str(run / "data")}
    (run / "data").mkdir()
    (run / "data/data.json").write_text("{}")
    after = {"PARENT": str(parent), "AFTER_FINETUNE": "runs/x/finetune/model"}
    assert told("evaluate", **data) == after
    assert told("evaluate", FROM=str(parent), **data) == {}


@pytest.mark.parametrize("named", ["MODEL=smollm2_135m\n", ""])
def test_a_run_goes_on_with_the_settings_of_its_newest_stage(checkout, tmp_path, named):
    """FROM with a MODEL, or without one: what comes next takes that one's settings, or none; the
    sets that were prepared for its tokenizer name none in either case."""
    parent, run = write_model(tmp_path / "llama"), checkout.parent / "runs/x"
    for stage, facts in (("data", ""), ("finetune", named)):
        (run / stage).mkdir(parents=True)
        (run / stage / "stage.env").write_text(f"{facts}FROM={parent}\n")
        (run / stage / "stage.json").write_text('{"status": "done"}')
    (run / "data/sets").mkdir()
    (run / "data/sets/data.json").write_text('{"rows": {"preference": 9}}')
    write_model(run / "finetune/model")
    shown = launch(checkout, "align", RUN="x", DATA=str(run / "data"), DRY_RUN="1")
    assert shown.returncode == 0, shown.stderr
    assert re.findall(r"^MODEL=.*\n", shown.stdout, re.M) == ([named] if named else [])


def test_a_downloaded_model_is_taken_where_the_run_has_none(checkout, tmp_path):
    """pretrain by itself starts from random weights all the same; a pipeline goes on from it."""
    name = "smollm2_135m"
    options = {"MODEL": name, "MODELS": str(tmp_path / "models"), "RUN": "x", "DRY_RUN": "1"}
    result = launch(checkout, "finetune", **options)
    assert f"give FROM=<Hugging Face directory>, or make download MODEL={name}\n" in result.stderr
    (tmp_path / "models").mkdir()
    model = write_model(tmp_path / "models" / name)
    assert "or make download" in launch(checkout, "finetune", **options).stderr, (
        "not ours: no record"
    )
    (model / "download.json").write_text("{}")

    def sources(verb):
        shown = launch(checkout, verb, **options)
        assert shown.returncode == 0, shown.stderr
        return re.findall(r"^FROM=(.*)$", shown.stdout, re.M)

    assert sources("finetune") == [str(model)] * 2, "data for its tokenizer, then finetune"
    assert sources("pretrain") == []
    run = ["runs/x/pretrain/model", "runs/x/finetune/model", *["runs/x/align/model"] * 2]
    assert sources("pipeline") == [*[str(model)] * 2, *run]


def test_a_downloaded_repository_is_taken_by_its_name(checkout, tmp_path):
    """As FROM would be, without settings; the run is called as the repository is."""
    name, models = "some-org/Tiny_Model", tmp_path / "models"
    options = {"MODEL": name, "MODELS": str(models), "DRY_RUN": "1"}
    assert_refused(launch(checkout, "finetune", **options), f"make download MODEL={name}")
    models.mkdir()
    model = write_model(models / "some-org--Tiny_Model")
    (model / "download.json").write_text("{}")
    shown = launch(checkout, "finetune", **options)
    assert shown.returncode == 0, shown.stderr
    assert re.findall(r"^FROM=(.*)$", shown.stdout, re.M) == [str(model)] * 2
    assert "MODEL=" not in shown.stdout
    assert "runs/tiny-model/finetune/stage.env" in shown.stdout


def test_data_is_spread_over_nodes_where_it_is_asked_for(checkout):
    """Its bytes do not depend on the nodes, so that another number of them is no other setting."""
    here = {"CLUSTER": "slurm", "RUN": "x", "DRY_RUN": "1"}
    result = launch(checkout, "data", NODES="3", **here)
    assert "--nodes=3 slurm/data.sbatch" in result.stdout
    assert "NODES=3" in result.stdout, "slurm/run.sh compares it with what Slurm gave"
    pipeline = launch(checkout, "pipeline", NODES="3", **here).stdout
    assert "--nodes=1 slurm/data.sbatch" in pipeline, "a pipeline spreads what it trains"
    folder = checkout.parent / "runs/x/data"
    folder.mkdir(parents=True)
    (folder / "stage.env").write_text("MODEL=debug\nNODES=3\n")
    (folder / "stage.json").write_text('{"status": "done", "inputs": {}}')
    result = launch(checkout, "data", **here)
    assert result.returncode == 0, result.stderr
