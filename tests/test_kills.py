"""The kill table of docs/operations.md: whatever dies, whenever, the same command completes, with
the same result.

One chain for each stage: each attempt is ended another way, the last one is left alone. What comes
out must be bit for bit what an unbroken run gives: its weights, and the loss of every step.

Every test has runs of its own, and takes the unbroken ones from kills.unbroken, which makes them
once: so workers may share these tests out among them in any way.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.support import kills, processes
from tests.support.kills import (
    WAYS,
    Attempt,
    assert_same,
    attempt_until_saved,
    end_by,
    kill,
    options,
    unbroken,
    whole_steps,
)
from tests.support.lanes import lacking
from tests.support.launching import assert_refused, make
from tests.support.runs import (
    STAGES,
    TRAINED,
    finished,
    history,
    process_start,
    read_json,
    running,
    stage_dir,
    status,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("folder")]


def assert_not_handed_over(directory):
    assert not (directory / "model").exists(), (
        f"{directory} must hand nothing over before it is done"
    )


# --- the longest first: where workers share tests out, the last ones should be short ---


@pytest.mark.nightly
def test_twenty_random_kills_over_one_pipeline(folder):
    """Anything of it is killed, at any moment; then it completes, with what an unbroken run
    gives."""
    seed = int(os.environ.get("SOAK_SEED", time.time()))
    print(f"SOAK_SEED={seed}")
    chance = random.Random(seed)
    settings = {"RUN": "soak", "PORT": "8032", "FORCE": "1"}
    settings |= {f"{stage.upper()}_ARGS": kills.ARGS[stage] for stage in TRAINED}
    with open(folder / "soak.out", "w") as output:
        for _ in range(20):
            launcher = kills.start("pipeline", output, **settings)
            time.sleep(chance.uniform(1, 20))
            with contextlib.suppress(ProcessLookupError):
                victims = [launcher.pid, *processes.below(launcher.pid)]
                os.kill(chance.choice(victims), signal.SIGKILL)
            launcher.wait(120)
            while any(running(stage_dir("soak", stage)) for stage in STAGES[:-1]):
                time.sleep(0.1)
    make("pipeline", **settings)
    make("undeploy", RUN="soak")
    tries = {stage: len(history(stage_dir("soak", stage))) for stage in STAGES}
    print(tries)
    assert sum(tries.values()) >= 20, (
        f"most kills must have met a stage (SOAK_SEED={seed}): {tries}"
    )
    for stage in TRAINED:
        assert_same(unbroken(stage), stage_dir("soak", stage))


# Align is torchtune's, too, and under LoRA: finetune is killed on two ranks of a night.
NIGHTLY = {"finetune": pytest.mark.nightly}
EACH = [pytest.param(stage, marks=NIGHTLY.get(stage, ())) for stage in TRAINED]


@pytest.mark.parametrize("stage", EACH)
def test_two_processes(stage):
    """With torchrun between the stage and its ranks; the loss is that of an unbroken run on two
    processes."""
    run, directory = f"killed-pair-{stage}", stage_dir(f"killed-pair-{stage}", stage)
    settings = options(run, stage, 2)
    ways = (
        "kill -9 of torchrun",
        "SIGTERM to the stage",
        "kill -9 of a rank",
        "kill -9 of the stage",
    )
    for way in ways:
        attempt, found = attempt_until_saved(stage, **settings)
        assert len(found["ranks"]) == 2, f"two ranks must be running: {found}"
        end_by(way, attempt, found)
    attempt, found = attempt_until_saved(stage, **settings, RELAY_HANG="10")
    os.kill(found["ranks"][1], signal.SIGSTOP)  # a rank that hangs: the other waits for it
    code, said = attempt.end(), attempt.said()
    assert code == 1, f"a hang must end the attempt as a fault:\n{said[-3000:]}"
    assert re.search(r"no step for 1\d s: it hangs; rank 1 on \S+, process \d+: no answer", said)
    make(stage, **settings)
    assert_same(unbroken(stage, 2), directory)


@pytest.mark.parametrize("stage", TRAINED)
def test_one_process(stage):
    run, directory = f"killed-{stage}", stage_dir(f"killed-{stage}", stage)
    settings = options(run, stage)
    kills.kill_during_first_save(stage, **settings)
    for way in (way for way in WAYS if way != "kill -9 of torchrun"):
        attempt, found = attempt_until_saved(stage, **settings)
        end_by(way, attempt, found)
        assert_not_handed_over(directory)
    attempt, found = attempt_until_saved(stage, **settings)
    assert make("cancel", RUN=run).stdout == f"{stage}: cancelled\n", (
        "cancel must say what it ended"
    )
    code, said = attempt.end(), attempt.said()
    assert code == 75, f"a cancelled launcher ended with {code}, not 75:\n{said[-3000:]}"
    assert "saving at the end of this step" in said, (
        f"the first of its two signals is not said:\n{said[-3000:]}"
    )
    kills.kill_before_done(stage, **settings)
    make(stage, **settings)
    assert_same(unbroken(stage), directory)
    kept = whole_steps(directory)
    assert len(kept) >= 2, f"two whole checkpoints must stay, there are {kept}"


@pytest.mark.parametrize("gpus", [2, 1])
def test_lora_sft(gpus):
    """Adapters alone are trained and saved: the same exactness, on one process and on two."""

    def settings(run: str) -> dict[str, str]:
        return options(run, "finetune", gpus, RECIPE="lora")

    whole, killed = f"lora-{gpus}", f"lora-{gpus}-killed"
    make("finetune", **settings(whole))
    for way in ("SIGTERM to the stage", "kill -9 of the stage"):
        attempt, found = attempt_until_saved("finetune", **settings(killed))
        end_by(way, attempt, found)
    make("finetune", **settings(killed))
    assert_same(stage_dir(whole, "finetune"), stage_dir(killed, "finetune"))


# --- checkpoints that something happened to ---


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_damaged_and_deleted_checkpoints(stage):
    """A shard cut short: the whole step before it is taken. All deleted while it runs: it runs on
    and saves anew."""
    settings, directory = options(f"odd-{stage}", stage), stage_dir(f"odd-{stage}", stage)
    attempt, found = attempt_until_saved(stage, **settings)
    attempt.until(lambda: len(whole_steps(directory)) == 2)
    code = kill(attempt, found, "stage", signal.SIGTERM)
    assert code == 75, f"a stopped launcher ended with {code}, not 75:\n{attempt.said()[-3000:]}"
    newest = max(whole_steps(directory))
    shard = next((directory / "checkpoints" / f"step-{newest}").glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    attempt = Attempt(stage, **settings)
    attempt.until(lambda: max(whole_steps(directory), default=0) > newest + 4)
    kills.remove_checkpoints_of(attempt)
    code, said = attempt.launcher.wait(120), attempt.said()
    assert code == 0, (
        f"it must run on without its checkpoints, and ended with {code}:\n{said[-3000:]}"
    )
    assert "is damaged: " in said, f"the damage is not said:\n{said[-3000:]}"
    assert "set aside as damaged-" in said, (
        f"where the damaged step went is not said:\n{said[-3000:]}"
    )
    assert whole_steps(directory), "it must save anew after its checkpoints were deleted"
    assert_same(unbroken(stage), directory)


@pytest.mark.parametrize(
    ("stage", "origin", "gpus", "words"),
    [
        ("pretrain", "finetune", 1, "holds no tok_embeddings.weight"),
        ("pretrain", "pretrain", 2, "saved by 2 data-parallel ranks, this run has 1"),
        ("finetune", "finetune", 2, "saved by 2 data-parallel ranks, this run has 1"),
    ],
)
def test_somebody_elses_checkpoints_are_refused(stage, origin, gpus, words):
    run = f"foreign-{stage}-{origin}"
    source, directory = unbroken(origin, gpus) / "checkpoints", stage_dir(run, stage)
    ignored = shutil.ignore_patterns("epoch_*")
    shutil.copytree(source, directory / "checkpoints", ignore=ignored)
    attempt = Attempt(stage, **options(run, stage))
    code = attempt.launcher.wait(120)
    ended = subprocess.CompletedProcess(f"{stage} of {run}", code, "", attempt.said())
    assert_refused(ended, words)
    assert_not_handed_over(directory)


# --- a service ---


def test_a_service_that_died_is_replaced():
    """Serving is said only while the process is there and /health answers; nothing of vLLM outlives
    the stage."""
    source = str(unbroken("align") / "model")
    settings = {"RUN": "served", "MODEL": "debug", "FROM": source, "FORCE": "1", "PORT": "8031"}
    directory = stage_dir("served", "deploy")

    def assert_said(word: str, after: str) -> None:
        table = make("status", RUN="served").stdout
        assert re.search(rf"^deploy +{word}\b", table, re.M), (
            f"after {after} not {word!r}:\n{table}"
        )

    def family() -> dict[int, str | None]:
        pid = running(directory)["pid"]
        return {p: process_start(p) for p in [pid, *processes.below(pid)]}

    for victim, word in (("stage", "lost"), ("engine", "failed")):
        make("deploy", **settings)
        assert_said("serving", "make deploy")
        alive, stage = family(), running(directory)["pid"]
        engines = [p for p in alive if "EngineCore" in "".join(processes.words(p))]
        os.kill(engines[0] if victim == "engine" else stage, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while left := [p for p, began in alive.items() if began and process_start(p) == began]:
            assert time.monotonic() < deadline, f"processes {left} of vLLM outlive the stage"
            time.sleep(0.1)
        assert_said(word, f"kill -9 of the {victim}")
    make("deploy", **settings)
    assert_said("serving", "make deploy")
    for pid in family():
        os.kill(pid, signal.SIGSTOP)
    assert_said("silent", "SIGSTOP to all of it")
    out = make("deploy", **settings).stdout
    assert "does not answer any more" in out, f"why it starts anew is not said:\n{out}"
    assert_said("serving", "make deploy")
    make("undeploy", RUN="served")
    assert_said("stopped", "make undeploy")


# --- stages that save nothing ---


@pytest.mark.parametrize("stage", ["evaluate", "data"])
def test_what_saves_nothing_starts_whole(stage):
    settings, directory = options(f"killed-{stage}", stage), stage_dir(f"killed-{stage}", stage)
    ways = ["kill -9 of the launcher", "kill -9 of the stage", "Ctrl-C", "kill -9 of a rank"]

    def in_the_middle() -> bool:
        attempt = running(directory)
        if not attempt:
            return False
        if stage == "evaluate":  # its rank has begun to speak
            log = directory / "logs" / f"attempt-{attempt['attempt']}.log"
            return log.exists() and log.stat().st_size > 0
        phase = (read_json(directory / "progress.json") or {}).get("phase") or {}
        return phase.get("attempt") == attempt["attempt"]  # its passes: tests/test_sets.py

    for way in ways[:3] if stage == "data" else ways:
        attempt = Attempt(stage, **settings)
        attempt.until(in_the_middle)
        end_by(way, attempt, attempt.watched())
    make(stage, **settings)
    assert status(directory) == "done", f"{directory} must be done in the end"
    if stage == "data":
        one, other = (
            finished(d)["outputs"]["sets"]["digest"] for d in (unbroken("data"), directory)
        )
        assert one == other, "the sets of a killed data stage are not those of an unbroken one"


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 160 MB."""
    words = ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(tmp_path)]
    if subprocess.run(words, capture_output=True).returncode:
        lacking("a small tmpfs needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("stage", reversed(STAGES[:5]))
def test_a_full_disk_loses_nothing(small_disk, monkeypatch, stage):
    """During a save, where the stage saves; else in the middle of it."""
    settings = options("full", stage)
    whole = unbroken(stage) if stage in TRAINED else None
    monkeypatch.setenv("RUNS", str(small_disk))
    directory, ballast = stage_dir("full", stage), small_disk / "ballast"
    attempt = Attempt(stage, **settings)
    attempt.until(lambda: whole_steps(directory) if whole else running(directory))
    with contextlib.suppress(OSError), open(ballast, "wb") as file:
        while True:
            file.write(bytes(1 << 20))
    code, said = attempt.launcher.wait(120), attempt.said()
    assert code == 1, f"a full disk is a fault, exit 1, not {code}:\n{said[-3000:]}"
    assert "no space left" in said, f"that the disk is full is not said:\n{said[-3000:]}"
    assert "the same command goes on" in said, f"what to do is not said:\n{said[-3000:]}"
    ballast.unlink()
    make(stage, **settings)
    assert status(directory) == "done", f"{directory} must be done in the end"
    if whole:
        assert_same(whole, directory)
