"""The kill table of docs/operations.md: whatever dies, whenever, the same command completes, with the same result.

One chain for each stage: each attempt is ended another way, the last one is left alone. What comes out must be bit for
bit what an unbroken run gives: its weights, and the loss of every step.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, lacking, make
from stats import loss_curve

from scripts.run import attempts, files, layout
from scripts.tools import checkpoints

pytestmark = pytest.mark.slow

TUNED = "epochs=2 max_steps_per_epoch=20 save_every_n_steps=4 log_every_n_steps=1"
ARGS = {
    "pretrain": "--training.steps 40 --checkpoint.interval 4 --metrics.log_freq 1 --lr_scheduler.warmup_steps 4",
    "finetune": TUNED,
    "align": "max_steps_per_epoch=40 save_every_n_steps=4 log_every_n_steps=1 model.lora_dropout=0.1",
}


@pytest.fixture(scope="module")
def base(folder):
    """Data, and an unbroken run of every stage on one process: run "whole"."""
    make("data", RUN="whole")
    for stage in layout.TRAINED:
        make(stage, **options("whole", stage))
    return folder


@pytest.fixture(scope="module")
def pair(base):
    """The same on two processes: run "pair"."""
    for stage in layout.TRAINED:
        make(stage, **options("pair", stage, 2))
    return base


def options(run: str, stage: str, gpus: int = 1, **more: str) -> dict:
    """What every attempt of a chain is called with; each stage starts from the unbroken run's model before it."""
    root = layout.runs_root() / "whole"
    if stage == "data":
        return {"RUN": run}
    before = {"finetune": "pretrain", "align": "finetune", "evaluate": "align"}.get(stage)
    source = {"FROM": str(root / before / "model")} if before else {}
    return {"RUN": run, "DATA": str(root / "data"), "GPUS": str(gpus), "ARGS": ARGS.get(stage, ""), **source, **more}


class Attempt:
    """One call of the launcher, and what hangs below it."""

    def __init__(self, stage: str, **settings: str):
        self.directory = layout.runs_root() / settings["RUN"] / stage
        self.output = tempfile.TemporaryFile("a+")  # noqa: SIM115  not among the runs: their disk will be full
        command = [sys.executable, "-m", "scripts.launch", stage]
        streams = {"stdout": self.output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        self.launcher = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, start_new_session=True, **streams)

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def until(self, condition, seconds: float = 180, every: float = 0.02):
        """Wait for something to be true while the attempt runs; returns it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := condition():
                return found
            if self.launcher.poll() is not None:
                break
            time.sleep(every)
        raise AssertionError(f"it did not come to that:\n{self.said()[-3000:]}")

    def processes(self) -> dict:
        """Pids of this attempt: launcher, stage, and below the stage torchrun and the ranks."""
        attempt = attempts.running(self.directory)
        found = {"launcher": self.launcher.pid, "stage": attempt["pid"], "ranks": []}
        for pid in below(attempt["pid"]):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            environment = Path(f"/proc/{pid}/environ").read_text()
            if "torch.distributed.run" in words:
                found["torchrun"] = pid
            elif "\0RANK=" in environment or environment.startswith("RANK="):
                found["ranks"].append(pid)
        return found

    def watched(self) -> dict:
        """processes(), after noting everything that must be gone at the end."""
        found = self.processes()
        self.all = {pid: attempts.process_start(pid) for pid in [found["launcher"], found["stage"], *below(found["stage"])]}
        return found

    def end(self, seconds: float = 60) -> int:
        """Wait for the launcher and for everything below the stage; returns the launcher's exit code."""
        code = self.launcher.wait(seconds)
        deadline = time.monotonic() + seconds
        while alive := [pid for pid in self.all if attempts.process_start(pid) == self.all[pid]]:
            assert time.monotonic() < deadline, f"still there: {alive}\n{self.said()[-3000:]}"
            time.sleep(0.05)
        return code


def below(root: int) -> list[int]:
    """Pids of all descendants of a process."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, todo = [], [root]
    while todo:
        new = children.get(todo.pop(), [])
        found += new
        todo += new
    return found


def whole_steps(directory: Path) -> list[int]:
    folder = directory / "checkpoints"
    return [n for n in checkpoints.steps(folder) if (folder / f"step-{n}" / ".metadata").exists()]


def attempt_until_saved(stage: str, **settings: str) -> tuple[Attempt, dict]:
    """Start; wait until it has made a new checkpoint whole; returns it and its processes."""
    directory = layout.runs_root() / settings["RUN"] / stage
    had = max(whole_steps(directory), default=0)
    attempt = Attempt(stage, **settings)
    attempt.until(lambda: max(whole_steps(directory), default=0) > had)
    return attempt, attempt.watched()


def kill(attempt: Attempt, found: dict, victim: str, number: int) -> int:
    os.kill(found["ranks"][-1] if victim == "rank" else found[victim], number)
    return attempt.end()


WAYS = {  # victim, signal, exit code of the launcher, word of status
    "kill -9 of the launcher": ("launcher", signal.SIGKILL, -9, "stopped"),
    "kill -9 of the stage": ("stage", signal.SIGKILL, 137, "lost"),
    "kill -9 of a rank": ("rank", signal.SIGKILL, 1, "failed"),
    "kill -9 of torchrun": ("torchrun", signal.SIGKILL, 1, "failed"),
    "SIGTERM to the stage": ("stage", signal.SIGTERM, 75, "stopped"),
    "SIGUSR1 to the stage": ("stage", signal.SIGUSR1, 75, "stopped"),
    "Ctrl-C": ("launcher", signal.SIGINT, 75, "stopped"),
    "a closed terminal": ("launcher", signal.SIGHUP, -signal.SIGHUP, "stopped"),
}


def kill_during_first_save(stage: str, **settings: str) -> None:
    """Freeze the rank the moment its first step folder appears, then kill the stage: nothing whole is there."""
    directory = layout.runs_root() / settings["RUN"] / stage
    attempt = Attempt(stage, **settings)
    attempt.until(lambda: attempts.status(directory) == "running" and files.read_json(directory / "progress.json"))
    found = attempt.watched()
    attempt.until(lambda: checkpoints.steps(directory / "checkpoints"), every=0.0005)
    os.kill(found["ranks"][0], signal.SIGSTOP)
    assert whole_steps(directory) == [], "the save was faster than the test"
    kill(attempt, found, "stage", signal.SIGKILL)


def kill_before_done(stage: str, **settings: str) -> None:
    """Kill the stage when its model is there and stage.json is not."""
    directory = layout.runs_root() / settings["RUN"] / stage
    attempt = Attempt(stage, **settings)
    attempt.until(lambda: attempts.status(directory) == "running")
    pid = attempts.running(directory)["pid"]
    attempt.until((directory / "model").exists, every=0.0005)
    os.kill(pid, signal.SIGKILL)
    attempt.all = {}
    assert attempt.end() == 137
    assert not (directory / "stage.json").exists(), "it was done faster than the test"


def assert_same(one: Path, other: Path) -> None:
    """The same weights, and the same loss at every step, in full precision."""
    curves = [loss_curve(d / "metrics") for d in (one, other)]
    assert [step for step, _ in curves[0]] == list(range(1, 41))
    assert curves[0] == curves[1]
    assert layout.record(one)["outputs"]["model"]["digest"] == layout.record(other)["outputs"]["model"]["digest"]


@pytest.mark.parametrize("stage", layout.TRAINED)
def test_one_process(base, stage):
    run, directory = "killed", base / "killed" / stage
    settings = options(run, stage)
    kill_during_first_save(stage, **settings)
    for way in (w for w in WAYS if w != "kill -9 of torchrun"):
        attempt, found = attempt_until_saved(stage, **settings)
        victim, number, code, word = WAYS[way]
        assert kill(attempt, found, victim, number) == code, f"{way}\n{attempt.said()[-3000:]}"
        assert attempts.status(directory) == word, way
        assert not (directory / "model").exists()
    attempt, found = attempt_until_saved(stage, **settings)
    assert make("cancel", RUN=run).stdout == f"{stage}: cancelled\n"
    assert attempt.end() == 75, attempt.said()[-3000:]
    assert "saving at the end of this step" in attempt.said(), "the first of its two signals"
    kill_before_done(stage, **settings)
    make(stage, **settings)
    assert_same(base / "whole" / stage, directory)
    assert len(whole_steps(directory)) >= 2


@pytest.mark.parametrize("stage", layout.TRAINED)
def test_two_processes(pair, stage):
    """The same with torchrun between the stage and its ranks; the loss is that of an unbroken run on two processes."""
    run, directory = "killed-pair", pair / "killed-pair" / stage
    settings = options(run, stage, 2)
    for way in ("kill -9 of torchrun", "SIGTERM to the stage", "kill -9 of a rank", "kill -9 of the stage"):
        attempt, found = attempt_until_saved(stage, **settings)
        assert len(found["ranks"]) == 2
        victim, number, code, word = WAYS[way]
        assert kill(attempt, found, victim, number) == code, f"{way}\n{attempt.said()[-3000:]}"
        assert attempts.status(directory) == word, way
    make(stage, **settings)
    assert_same(pair / "pair" / stage, directory)


@pytest.mark.parametrize("gpus", [1, 2])
def test_lora_sft(base, gpus):
    """Adapters alone are trained and saved: the same exactness, on one process and on two."""
    settings = lambda run: options(run, "finetune", gpus, MODEL="debug-lora")  # noqa: E731
    whole, killed = f"lora-{gpus}", f"lora-{gpus}-killed"
    make("finetune", **settings(whole))
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, 137)):
        attempt, found = attempt_until_saved("finetune", **settings(killed))
        assert kill(attempt, found, "stage", number) == code, attempt.said()[-3000:]
    make("finetune", **settings(killed))
    assert_same(base / whole / "finetune", base / killed / "finetune")


# --- checkpoints that something happened to ---


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_damaged_and_deleted_checkpoints(base, stage):
    """A shard cut short: the whole step before it is taken. All deleted while it runs: it runs on and saves anew."""
    settings, directory = options("odd", stage), base / "odd" / stage
    attempt, found = attempt_until_saved(stage, **settings)
    attempt.until(lambda: len(whole_steps(directory)) == 2)
    assert kill(attempt, found, "stage", signal.SIGTERM) == 75
    shard = next((directory / "checkpoints" / f"step-{whole_steps(directory)[0]}").glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    attempt = Attempt(stage, **settings)
    attempt.until(lambda: max(whole_steps(directory)) > 16)
    shutil.rmtree(directory / "checkpoints")
    assert attempt.launcher.wait(120) == 0, attempt.said()[-3000:]
    assert "is damaged: " in attempt.said()
    assert "set aside as damaged-" in attempt.said()
    assert_same(base / "whole" / stage, directory)


@pytest.mark.parametrize(
    ("stage", "origin", "words"),
    [
        ("pretrain", "whole/finetune", "holds no tok_embeddings.weight"),
        ("pretrain", "pair/pretrain", "saved by 2 data-parallel ranks, this run has 1"),
        ("finetune", "pair/finetune", "saved by 2 data-parallel ranks, this run has 1"),
    ],
)
def test_somebody_elses_checkpoints_are_refused(pair, stage, origin, words):
    directory = pair / "foreign" / stage
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(pair / origin / "checkpoints", directory / "checkpoints", ignore=shutil.ignore_patterns("epoch_*"))
    attempt = Attempt(stage, **options("foreign", stage))
    assert attempt.launcher.wait(120) == 64
    assert words in attempt.said()
    assert not (directory / "model").exists()


# --- stages that save nothing ---


@pytest.mark.parametrize("stage", ["data", "evaluate"])
def test_what_saves_nothing_starts_whole(base, stage):
    settings, directory = options("killed", stage), base / "killed" / stage
    for way in ("kill -9 of the launcher", "kill -9 of the stage", "Ctrl-C", "kill -9 of a rank"):
        victim, number, _, word = WAYS[way]
        if stage == "data" and victim == "rank":
            continue
        attempt = Attempt(stage, **settings)
        attempt.until(lambda: attempts.status(directory) == "running")
        time.sleep(2)  # in the middle of it
        kill(attempt, attempt.watched(), victim, number)
        assert attempts.status(directory) == word, f"{way}\n{attempt.said()[-3000:]}"
    make(stage, **settings)
    assert attempts.status(directory) == "done"
    if stage == "data":
        one, other = (layout.record(base / run / stage)["outputs"]["sets"]["digest"] for run in ("whole", "killed"))
        assert one == other


def test_a_service_that_died_is_replaced(base):
    """Serving is said only while the process is there and /health answers; nothing of vLLM outlives the stage."""
    settings = {"RUN": "served", "FROM": str(base / "whole/align/model"), "FORCE": "1", "PORT": "8031"}
    directory = base / "served/deploy"
    state = lambda: re.search(r"^deploy +(\w+|-)", make("status", RUN="served").stdout, re.M)[1]  # noqa: E731
    for victim, number, word in (
        ("stage", signal.SIGKILL, "lost"),
        ("engine", signal.SIGKILL, "failed"),
        ("stage", signal.SIGSTOP, ""),
    ):
        make("deploy", **settings)
        assert state() == "serving"
        pid = attempts.running(directory)["pid"]
        family = {p: attempts.process_start(p) for p in [pid, *below(pid)]}
        engine = [p for p in family if "EngineCore" in Path(f"/proc/{p}/cmdline").read_text()]
        if number == signal.SIGSTOP:
            for p in family:
                os.kill(p, signal.SIGSTOP)
            assert state() == "silent"
            continue
        os.kill(engine[0] if victim == "engine" else pid, number)
        deadline = time.monotonic() + 60
        while any(attempts.process_start(p) == start for p, start in family.items()):
            assert time.monotonic() < deadline, "a part of vLLM outlives the stage"
            time.sleep(0.1)
        assert state() == word
    assert "does not answer any more" in make("deploy", **settings).stdout
    assert state() == "serving"
    make("undeploy", RUN="served")
    assert state() == "stopped"


# --- a full disk ---


@pytest.fixture
def small_disk(base, tmp_path):
    """A disk of 160 MB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        lacking("a small tmpfs needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("stage", layout.STAGES[:5])
def test_a_full_disk_loses_nothing(base, small_disk, monkeypatch, stage):
    """During a save, where the stage saves; else in the middle of it."""
    settings = options("full", stage)
    monkeypatch.setenv("RUNS", str(small_disk))
    directory, ballast = small_disk / "full" / stage, small_disk / "ballast"
    attempt = Attempt(stage, **settings)
    attempt.until(lambda: whole_steps(directory) if stage in layout.TRAINED else attempts.running(directory))
    with contextlib.suppress(OSError), open(ballast, "wb") as file:
        while True:
            file.write(bytes(1 << 20))
    assert attempt.launcher.wait(120) == 1
    assert "no space left" in attempt.said()
    assert "the same command goes on" in attempt.said()
    ballast.unlink()
    make(stage, **settings)
    assert attempts.status(directory) == "done"
    if stage in layout.TRAINED:
        assert_same(base / "whole" / stage, directory)


# --- a soak ---


def test_twenty_random_kills_over_one_pipeline(base):
    """Anything of it is killed, at any moment; then it completes, with what an unbroken run gives."""
    seed = int(os.environ.get("SOAK_SEED", time.time()))
    print(f"SOAK_SEED={seed}")
    chance = random.Random(seed)
    settings = {"RUN": "soak", "PORT": "8032", "FORCE": "1", **{f"{s.upper()}_ARGS": ARGS[s] for s in layout.TRAINED}}
    with open(base / "soak.out", "w") as output:
        for _ in range(20):
            streams = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            command = [sys.executable, "-m", "scripts.launch", "pipeline"]
            launcher = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, start_new_session=True, **streams)
            time.sleep(chance.uniform(1, 20))
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice([launcher.pid, *below(launcher.pid)]), signal.SIGKILL)
            launcher.wait(120)
            while any(attempts.running(base / "soak" / stage) for stage in layout.STAGES[:-1]):
                time.sleep(0.1)
    make("pipeline", **settings)
    make("undeploy", RUN="soak")
    attempts = {stage: len(attempts.history(base / "soak" / stage)) for stage in layout.STAGES}
    print(attempts)
    assert sum(attempts.values()) >= 20
    for stage in layout.TRAINED:
        assert_same(base / "whole" / stage, base / "soak" / stage)
