"""The launcher: every bad input is refused by name with its mend, exit 64, and leaves nothing
behind."""

import json
import os
import resource
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.clusters.local import Local
from scripts.launcher import options as launcher_options
from scripts.launcher.plan import plan
from scripts.launcher.start import submit_lock
from scripts.run import attempts, files, layout, preflight
from scripts.run.errors import InputError
from tests.support.goldens import CASES, FOLDER, dry_run
from tests.support.lanes import lacking
from tests.support.launching import assert_refused, launch
from tests.support.models import write_sets
from tests.support.runs import ROOT


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("pretrain", {"MODEL": "gpt5"}, ["MODEL=gpt5", "`make models`"]),
        ("pretrain", {"MODEL": "qwen3_8"}, ["MODEL=qwen3_8: unknown; did you mean qwen3_8b"]),
        ("finetune", {"RECIPE": "lara"}, ["RECIPE=lara: unknown; known:", "lora", "qlora"]),
        ("data", {"RECIPE": "full"}, ["RECIPE=full: data takes none"]),
        ("pipeline", {"RECIPE": "lora"}, ["RECIPE", "FINETUNE_RECIPE"]),
        ("pretrain", {"CLUSTER": "mars"}, ["CLUSTER=mars", "not yet", "local"]),
        ("train", {}, ["train", "unknown", "pretrain"]),
        ("clean", {"RUN": "x", "STAGE": "serve"}, ["STAGE=serve", "deploy"]),
        ("pretrain", {"RUN": "my run"}, ["RUN='my run'", "a-z"]),
        ("pretrain", {"RUN": "a/../b"}, ["RUN=", "a-z"]),
        ("pretrain", {"RUN": "v1.0"}, ["RUN=", "a-z"]),
        ("pretrain", {"RUN": "MyRun"}, ["RUN=", "a-z"]),
        ("pretrain", {"RUN": "r" * 80}, ["RUN=", "40"]),
        ("pretrain", {"NODES": "2"}, ["NODES=2", "local is one machine", "GPUS=2"]),
        ("pretrain", {"GPUS": "0"}, ["GPUS=0", "GPUS=2"]),
        ("pretrain", {"GPUS": "x"}, ["GPUS=x"]),
        ("pipeline", {"ARGS": "--training.steps 1"}, ["ARGS", "PRETRAIN_ARGS"]),
        ("pretrain", {"ARGS": "--x 'open"}, ["ARGS", "quotation"]),
        ("data", {"ARGS": "--x"}, ["ARGS: --x: give key=value"]),
        ("data", {"COLUMNS": "prompt"}, ["COLUMNS=prompt", "prompt=question"]),
        ("data", {"COLUMNS": "80", "DATA": "/no/such"}, ["DATA=/no/such"]),
        ("data", {"VALIDATION": "/no/such"}, ["VALIDATION=/no/such", "no such file"]),
        ("data", {"DATA": "mine.yaml"}, ["DATA=mine.yaml: no such recipe"]),
        (
            "pipeline",
            {"DATA": "owner/name"},
            ["what it holds is seen when it is read", "make data"],
        ),
        ("data", {"DATA": "/no/such.txt"}, ["DATA=/no/such.txt", "no such file"]),
        ("finetune", {"FROM": "/no/such", "DATA": "{sets}"}, ["/no/such", "no such directory"]),
        ("finetune", {"DATA": "{sets}"}, ["needs a model", "make pretrain", "FROM="]),
        (
            "finetune",
            {"FROM": "LICENSE", "DATA": "{sets}"},
            ["LICENSE: a file; give the directory"],
        ),
        ("evaluate", {"RUN": "x", "DATA": "{sets}"}, ["run x is not there (runs: none)"]),
        ("nccl-check", {}, ["one rank has no other to talk to", "GPUS=2 or NODES=2"]),
        ("nccl-check", {"GPUS": "2", "ARGS": "--x"}, ["ARGS=--x: nccl-check takes none"]),
        ("deploy", {"PORT": "http"}, ["PORT=http", "number"]),
        ("deploy", {"PORT": "70000"}, ["PORT=70000"]),
        ("deploy", {"BIND": "0.0.0.0"}, ["BIND=0.0.0.0", "API_KEY_FILE", "openssl"]),
        ("deploy", {"API_KEY_FILE": "/no/key"}, ["API_KEY_FILE", "missing"]),
        ("status", {"RUN": "nothing"}, ["RUN=nothing", "no such run"]),
        ("logs", {"RUN": "nothing"}, ["no such run"]),
        ("clean", {"RUN": "nothing"}, ["nothing there"]),
        ("lineage", {"RUN": "nothing"}, ["no such run"]),
        ("chat", {"RUN": "../x"}, ["RUN='../x'", "a-z"]),
        ("chat", {"RUN": "nothing"}, ["no such run"]),
        ("data", {"DATA": "LICENSE"}, ["DATA=LICENSE", "not a file that can be read", ".jsonl"]),
        ("clean", {"RUN": "nothing", "DRY_RUN": "1"}, ["clean has no dry run", "make status"]),
        ("align", {"DRY_RUN": "1"}, ["align needs a model", "FROM="]),
    ],
)
def test_bad_input_is_refused(runs, tmp_path, verb, options, words):
    sets = write_sets(tmp_path / "sets")
    options = {k: v.replace("{sets}", str(sets)) for k, v in options.items()}
    assert_refused(launch(verb, **options), *words)
    assert not runs.exists() or not list(runs.rglob("*")), "a refusal must leave nothing"


def test_all_problems_at_once(runs):
    said = assert_refused(launch("pretrain", MODEL="nope", RUN="No", GPUS="-1", CLUSTER="mars"))
    assert said.count("error:") == 4, f"there are four problems:\n{said}"


def test_a_broken_model_is_refused_before_anything_starts(runs, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2])
    assert_refused(launch("evaluate", FROM=str(model), RUN="x"), "cut short")
    assert not runs.exists(), "a refusal must leave nothing"


def test_no_write_permission(runs):
    runs.parent.mkdir(exist_ok=True)
    runs.write_text("a file where the folder should be")
    assert_refused(launch("data", RUN="x"), "RUNS=")


def test_a_read_only_disk(runs):
    runs.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(runs)], capture_output=True
    ).returncode:
        lacking("a read-only disk needs root to mount it")
    try:
        assert_refused(launch("data", RUN="x"), "Read-only file system", "RUNS=")
    finally:
        subprocess.run(["umount", str(runs)], check=True)


@pytest.mark.parametrize("name", CASES)
def test_golden_dry_runs(name):
    assert dry_run(*CASES[name]) == (FOLDER / name).read_text(), "if this is meant: make golden"


@pytest.mark.parametrize(
    "verb", ["pipeline", "data", "pretrain", "finetune", "align", "evaluate", "deploy"]
)
def test_every_target_has_a_dry_run(verb, model):
    out = dry_run(verb, {"RUN": "x", "FROM": str(model), "FORCE": "1"})
    assert "stage.env" in out, f"the dry run of {verb} does not show stage.env:\n{out}"


def test_data_for_a_model_needs_no_architecture_of_our_own(model):
    """README's line for LoRA: a FROM without a name takes the recipe as it is."""
    out = dry_run("finetune", {"RUN": "x", "FROM": str(model), "RECIPE": "lora"})
    assert out.count(f"FROM={model}") == 2, "its data uses the model's tokenizer"
    assert "cp configs/finetune/lora.yaml runs/x/finetune/config.yaml" in out
    assert "MODEL=" not in out
    assert "args.json << 'EOF'\n[]\nEOF" in out


def test_a_variable_that_make_does_not_know_is_refused():
    words = ["make", "-s", "pretrain", "STEPS=50", "DRY_RUN=1"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "STEPS: no such variable" in result.stderr
    words[3:4] = ["SBATCH_TIMELIMIT=60", "SBATCH_QOS=high", "RUN=x"]  # programs' own
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0


def test_a_pipeline_starts_from_FROM_and_then_follows_on(model):
    out = dry_run("pipeline", {"RUN": "x", "FROM": str(model), "FORCE": "1"})
    inputs = [line.split("=")[1] for line in out.splitlines() if line.startswith("FROM=")]
    assert inputs == [
        str(model),
        str(model),
        "runs/x/pretrain/model",
        "runs/x/finetune/model",
        "runs/x/align/model",
        "runs/x/align/model",
    ]


def test_arguments_pass_through_make_intact(runs):
    words = ["--a", "two words", "it's", 'say "hi"', "--b=c d"]
    quoted = """--a 'two words' "it's" 'say "hi"' '--b=c d'"""
    env = {**os.environ, "DRY_RUN": "1", "RUNS": str(runs)}
    result = subprocess.run(
        ["make", "-s", "pretrain", f"ARGS={quoted}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    block = result.stdout.split("pretrain/args.json' << 'EOF'\n")[1].split("EOF\n")[0]
    ours = launcher_options.settings("debug", "pretrain")
    assert json.loads(block) == [*ours, *words], f"make changed the arguments: {block}"


class Finetune:
    """A finetune stage of run x, submitted as `launch` would."""

    def __init__(self, model):
        self.options = {"RUN": "x", "FROM": str(model), "DATA": str(model.parent / "sets")}
        write_sets(model.parent / "sets")
        submission = self.step().submission
        self.directory = submission.directory
        submission.write("")

    def step(self, **changes):
        """Plan it, with other options."""
        env = {"PATH": os.environ["PATH"], "RUNS": os.environ["RUNS"], **self.options, **changes}
        return plan(launcher_options.read("finetune", env)).steps[0]

    def changed(self, **changes):
        """List what differs from what was submitted."""
        return self.step(**changes).submission.differences()


@pytest.fixture
def finetune(runs, model):
    return Finetune(model)


def test_a_run_with_other_settings_is_refused_once_it_has_results(finetune):
    assert finetune.changed() == []
    changed = finetune.changed(GPUS="2", ARGS="epochs=3")
    assert "GPUS was 1, now 2" in changed, f"another GPUS is not among the differences: {changed}"
    arguments = [c for c in changed if "ARGS" in c and "epochs=3" in c]
    assert arguments, f"another ARGS is not among the differences: {changed}"
    (finetune.directory / "checkpoints").mkdir()
    options = {**finetune.options, "GPUS": "2"}
    words = ["exists with other settings", "GPUS was 1, now 2", "make clean STAGE=finetune RUN=x"]
    assert_refused(launch("finetune", **options), *words)
    assert_refused(launch("finetune", **options, DRY_RUN="1"), *words)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("", "epochs=2", "ARGS were none, now epochs=2"),
        ("--a 1 --steps 5 --b", "--a 1 --steps 6 --b", "ARGS were … --steps 5, now … --steps 6"),
        ("a=1", "a=1 b=2", "ARGS were …, now … b=2"),
        ("a=1 a=1", "a=1", "ARGS were … a=1, now …"),
    ],
)
def test_of_other_arguments_the_difference_is_told(finetune, before, now, told):
    (finetune.directory / "args.json").write_text(json.dumps(before.split()))
    assert finetune.changed(MODEL="", ARGS=now) == [told]


def test_a_second_launch_of_a_running_stage_is_refused(finetune):
    attempts.begin(finetune.directory)
    assert_refused(launch("finetune", **finetune.options), "running already", "make stop RUN=x")
    assert_refused(launch("clean", RUN="x"), "running", "make stop RUN=x")


def test_of_two_launches_in_one_instant_one_is_refused(finetune):
    """While one submits, no other does; the lock goes with its process."""
    step = finetune.step()
    with submit_lock(step):
        words = ("another make began it a moment ago", "make status RUN=x")
        assert_refused(launch("finetune", **finetune.options), *words)
    with submit_lock(step):
        attempts.begin(finetune.directory)
    with pytest.raises(InputError, match="another make"), submit_lock(step):
        pass


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_is_not_opened_through_a_link(finetune, tmp_path, kind):
    """The file that a link points to was emptied; a pipe blocked for ever."""
    lock, other = finetune.directory / ".lock", tmp_path / "other"
    other.write_text("mine")
    lock.symlink_to(other) if kind == "link" else os.mkfifo(lock)
    assert_refused(launch("finetune", **finetune.options), str(lock))
    assert other.read_text() == "mine"


def test_a_run_that_another_machine_holds_is_left_alone(finetune):
    """A copy of a run, or a shared disk: the pid in the attempt is some other process here."""
    attempt = {**attempts.begin(finetune.directory), "host": "elsewhere"}
    files.write_atomic(finetune.directory / "attempts/1.json", json.dumps(attempt))
    words = ("elsewhere", "cannot be asked from here")
    assert_refused(launch("finetune", **finetune.options), *words, "rm '", "attempts/1.json")
    assert_refused(launch("stop", RUN="x"), *words)


def test_a_finished_stage_is_not_run_twice(finetune):
    (finetune.directory / "stage.json").write_text(json.dumps({"summary": {"loss": 1.5}}))
    result = launch("finetune", **finetune.options)
    assert result.returncode == 0, f"a finished stage is no fault:\n{result.stderr}"
    assert "done already" in result.stdout, f"it must say that it is done:\n{result.stdout}"


def test_a_run_survives_a_move(finetune, runs, monkeypatch):
    """Paths among the runs are kept below runs/, wherever that is."""
    (runs / "x/pretrain").mkdir()
    os.rename(finetune.options["FROM"], runs / "x/pretrain/model")
    finetune.options["FROM"] = str(runs / "x/pretrain/model")
    finetune.step().submission.write("")
    moved = runs.parent / "moved"
    os.rename(runs, moved)
    monkeypatch.setenv("RUNS", str(moved))
    assert finetune.changed(FROM=str(moved / "x/pretrain/model")) == []
    fact = files.read_env(moved / "x/finetune/stage.env")["FROM"]
    assert layout.from_fact(fact, moved) == moved / "x/pretrain/model"


def test_a_stop_of_what_does_not_run_says_so(finetune):
    result = launch("stop", RUN="x")
    assert result.returncode == 0, f"nothing to stop is no fault:\n{result.stderr}"
    assert result.stdout == "nothing of run x is running\n", "it must say that nothing runs"
    assert_refused(launch("stop", RUN="nothing"), "RUN=nothing", "no such run", "there are: x")


def test_a_venv_that_is_gone_is_named(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    submission = finetune.step(DRY_RUN="1").submission
    said = Local({}).problems(submission, dry_run=False)[0]
    assert ".venv: missing" in said
    assert "make setup" in said
    assert Local({}).problems(submission, dry_run=True) == []


def test_a_disk_too_small_for_the_model_is_refused(finetune, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    architecture = json.loads((ROOT / "configs/models/debug/config.json").read_text())
    config = Path(finetune.options["FROM"], "config.json")
    config.write_text(json.dumps({**architecture, **json.loads(config.read_text())}))
    with pytest.raises(InputError, match=r"the model will need .* GB.*RUNS="):
        finetune.step()


def test_the_parameters_of_an_architecture_are_counted():
    """Llama 3.2 1B, Llama 3.1 8B: the numbers that their cards round (1.24 and 8.03 billion)."""
    big = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    big |= {"intermediate_size": 14336, "vocab_size": 128256}
    assert preflight.parameters(big) == 8_030_261_248
    small = {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    small |= {"intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True}
    assert preflight.parameters(small) == 1_235_814_400


def test_memory_that_is_not_there_is_named():
    assert preflight.memory_problems(1, "training") == []
    assert (
        "16.00 GB of memory, 8.00 are free"
        in preflight.memory_problems(16e9, "training", free=8e9)[0]
    )


# --- a service ---


def test_a_taken_port_is_named_before_the_first_stage(runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refusal = launch("pipeline", RUN="x", PORT=str(port))
        assert_refused(refusal, f"PORT={port}", "in use", f"PORT={port + 1}")
        assert not runs.exists(), "a refusal must leave nothing"
    assert preflight.port_problems("127.0.0.1", port) == [], "the port is free again"


def test_a_key_that_others_can_read_is_refused(runs, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o644)
    refusal = launch("deploy", API_KEY_FILE=str(key), BIND="0.0.0.0")
    said = assert_refused(refusal, "readable by others", "chmod 600")
    assert "secret" not in said, "a key must not be shown"


@pytest.mark.parametrize(
    ("processes", "visible", "there", "words"),
    [
        (2, None, ["nvidia0", "nvidiactl", "nvidia-uvm"], "GPUS=2: this machine has 1"),
        (2, None, ["nvidia0", "nvidia1"], ""),
        (4, "0,1", ["nvidia0", "nvidia1", "nvidia2", "nvidia3"], "GPUS=4: this machine has 2"),
        (2, "MIG-a,MIG-b", ["nvidia0"], ""),
        (2, "", ["nvidia0"], ""),
        (8, None, [], ""),
    ],
)
def test_more_processes_than_gpus(tmp_path, processes, visible, there, words):
    """On a machine without any, and where none may be seen, they run on the CPU."""
    for name in there:
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    said = preflight.gpu_problems(processes, environment, tmp_path)
    assert said == [] if not words else said[0].startswith(words)


@pytest.mark.parametrize(
    ("limit", "network", "gpus", "named"),
    [
        (64 << 10, "AWS Libfabric", 1, True),
        (64 << 10, "IB", 1, True),
        (64 << 10, "Socket", 1, False),
        (64 << 10, "IB", 0, False),
        (resource.RLIM_INFINITY, "IB", 1, False),
    ],
)
def test_a_network_that_pins_memory_must_be_let(tmp_path, monkeypatch, limit, network, gpus, named):
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda _: (limit, limit))
    for number in range(gpus):
        (tmp_path / f"nvidia{number}").touch()
    said = preflight.device_problems(1, {"NCCL_NET": network}, tmp_path)
    assert bool(said) == named
    assert all("may pin 64 KiB" in line and "LimitMEMLOCK" in line for line in said)
