"""Attempts that are ended in the middle, and the unbroken runs that they are compared with."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measures import loss_curve
from scripts.tools import checkpoints
from tests.support import processes
from tests.support.launching import make
from tests.support.processes import below
from tests.support.runs import (
    BEFORE,
    ROOT,
    finished,
    process_start,
    read_json,
    running,
    runs_root,
    stage_dir,
    status,
)

# Nine attempts of a chain save every 4 steps; each goes on a step or two until it is ended, more on
# a busy machine: the rest is room, so that none reaches the end.
STEPS = 60
ARGS = {
    "pretrain": f"--training.steps {STEPS} --checkpoint.interval 4 --metrics.log_freq 1"
    " --lr_scheduler.warmup_steps 4",
    "finetune": f"epochs=2 max_steps_per_epoch={STEPS // 2} save_every_n_steps=4"
    " log_every_n_steps=1",
    "align": f"max_steps_per_epoch={STEPS} save_every_n_steps=4 log_every_n_steps=1"
    " model.lora_dropout=0.1",
}
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
TRIES = 5  # to be quicker than a save or a hand-over, which takes the machine a tenth of a second


# --- unbroken runs ---


def unbroken(stage: str, gpus: int = 1) -> Path:
    """Return the directory of a stage that nothing happened to, on one process (run "whole") or two
    (run "pair"). Made when it is first asked for, once for all workers of a session."""
    run = {1: "whole", 2: "pair"}[gpus]
    directory = stage_dir(run, stage)
    if not finished(directory):
        settings = options(run, stage, gpus)
        with _claimed(runs_root().parent / f"{run}-{stage}.lock"):
            if not finished(directory):
                make(stage, **settings)
    return directory


def options(run: str, stage: str, gpus: int = 1, **more: str) -> dict[str, str]:
    """Return what every attempt of a chain is called with: each stage starts from the unbroken
    run's model before it."""
    if stage == "data":
        return {"RUN": run}
    source = {"FROM": str(unbroken(BEFORE[stage]) / "model")} if stage in BEFORE else {}
    given = {"RUN": run, "MODEL": "debug", "DATA": str(unbroken("data")), "GPUS": str(gpus)}
    arguments = ARGS.get(stage, "")
    if stage == "pretrain" and gpus > 1:  # batches that a worker has read ahead are not done
        arguments += " --training.dataloader.num_workers 2"
    return {**given, "ARGS": arguments, **source, **more}


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Wait until no other worker is inside. The kernel's lock: it goes with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def assert_same(one: Path, other: Path) -> None:
    """Check that two runs of a stage have the same weights, and the same loss at every step, to the
    last bit."""
    curves = [loss_curve(directory / "metrics") for directory in (one, other)]
    for directory, curve in zip((one, other), curves):
        steps = [step for step, _ in curve]
        assert steps == list(range(1, STEPS + 1)), (
            f"{directory} must have logged each step: {steps}"
        )
    different = [(a, b) for a, b in zip(*curves) if a != b]
    assert not different, f"{other} lost the unbroken run's losses: (step, loss) {different[:3]}"
    digests = [finished(directory)["outputs"]["model"]["digest"] for directory in (one, other)]
    assert digests[0] == digests[1], f"{other} has the losses of {one} and other weights"


# --- attempts ---


def _as_in_a_terminal() -> None:
    """Let a signal do what it does in a terminal: under nohup, or in the background of a shell
    without job control, a child starts with SIGHUP or SIGINT ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def start(verb: str, output, **settings: str) -> subprocess.Popen:
    """Start the launcher in a session of its own, as one in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.launch", verb],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_as_in_a_terminal,
    )


class Attempt:
    """One call of the launcher, and what hangs below it."""

    def __init__(self, stage: str, **settings: str):
        self.directory = stage_dir(settings["RUN"], stage)
        # Not among the runs: their disk will be full.
        self.output = tempfile.TemporaryFile("a+")  # noqa: SIM115
        self.launcher = start(stage, self.output, **settings)
        self.all: dict[int, str | None] = {}

    def said(self) -> str:
        """Return all that it has printed."""
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
        raise AssertionError(
            f"the attempt never came to what was waited for:\n{self.said()[-3000:]}"
        )

    def processes(self) -> dict:
        """Return the pids of this attempt: launcher, stage, and below the stage torchrun and the
        ranks."""
        attempt = running(self.directory)
        assert attempt, f"the attempt was over before it could be ended:\n{self.said()[-3000:]}"
        found = {"launcher": self.launcher.pid, "stage": attempt["pid"], "ranks": []}
        for pid in below(attempt["pid"]):
            if "torch.distributed.run" in processes.words(pid):
                found["torchrun"] = pid
            elif "RANK" in processes.environment(pid):
                found["ranks"].append(pid)
        workers = {pid for rank in found["ranks"] for pid in below(rank)}  # that load its data
        found["ranks"] = [pid for pid in found["ranks"] if pid not in workers]
        return found

    def watched(self) -> dict:
        """Return processes(), after noting everything that must be gone at the end."""
        found = self.processes()
        pids = [found["launcher"], found["stage"], *below(found["stage"])]
        self.all = {pid: process_start(pid) for pid in pids}
        return found

    def end(self, seconds: float = 60) -> int:
        """Wait for the launcher and for everything below the stage; returns the launcher's exit
        code."""
        code = self.launcher.wait(seconds)
        deadline = time.monotonic() + seconds
        while alive := [
            pid for pid, began in self.all.items() if began and process_start(pid) == began
        ]:
            assert time.monotonic() < deadline, f"still there: {alive}\n{self.said()[-3000:]}"
            time.sleep(0.05)
        return code


def whole_steps(directory: Path) -> list[int]:
    """Return the steps of a stage whose checkpoint is whole, newest first."""
    folder = directory / "checkpoints"
    return [n for n in checkpoints.steps(folder) if (folder / f"step-{n}" / ".metadata").exists()]


def attempt_until_saved(stage: str, **settings: str) -> tuple[Attempt, dict]:
    """Start an attempt; wait until it has made a new checkpoint whole; returns it and its
    processes."""
    directory = stage_dir(settings["RUN"], stage)
    had = max(whole_steps(directory), default=0)
    attempt = Attempt(stage, **settings)
    attempt.until(lambda: max(whole_steps(directory), default=0) > had, every=0.005)
    return attempt, attempt.watched()


def kill(attempt: Attempt, found: dict, victim: str, number: int) -> int:
    """Send a signal to one process of an attempt; returns the launcher's exit code once all have
    left."""
    os.kill(found["ranks"][-1] if victim == "rank" else found[victim], number)
    return attempt.end()


def end_by(way: str, attempt: Attempt, found: dict) -> None:
    """End an attempt in one of WAYS; check the launcher's exit code and the word of status."""
    victim, number, code, word = WAYS[way]
    ended = kill(attempt, found, victim, number)
    told = f"after {way}\n{attempt.said()[-3000:]}"
    assert ended == code, f"the launcher ended with {ended}, not {code}, {told}"
    said = status(attempt.directory)
    assert said == word, f"status says {said}, not {word}, {told}"


def kill_during_first_save(stage: str, **settings: str) -> None:
    """Freeze the rank the moment its first step folder appears, then kill the stage: nothing whole
    is there. Where the save was quicker than the look at it, take that away and begin again."""
    directory = stage_dir(settings["RUN"], stage)
    for _ in range(TRIES):
        attempt = Attempt(stage, **settings)
        # A phase may be told before there is a rank; a step is told by one.
        attempt.until(lambda: (read_json(directory / "progress.json") or {}).get("step"))
        found = attempt.watched()
        attempt.until(lambda: checkpoints.steps(directory / "checkpoints"), every=0.0005)
        os.kill(found["ranks"][0], signal.SIGSTOP)
        in_time = whole_steps(directory) == []
        kill(attempt, found, "stage", signal.SIGKILL)
        if in_time:
            return
        shutil.rmtree(directory / "checkpoints")
        (directory / "progress.json").unlink(missing_ok=True)
    raise AssertionError(f"{TRIES} first saves were over before their rank could be frozen")


def kill_before_done(stage: str, **settings: str) -> None:
    """Kill the stage when its model is there and its record is not. Where the record was quicker,
    take both away and let the last checkpoint be handed over again."""
    directory = stage_dir(settings["RUN"], stage)
    for _ in range(TRIES):
        attempt = Attempt(stage, **settings)
        pid = attempt.until(lambda: running(directory))["pid"]
        attempt.until((directory / "model").exists, every=0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code = attempt.end()
        if not (directory / "stage.json").exists():
            assert code == 137, (
                f"the launcher ended with {code}, not 137:\n{attempt.said()[-3000:]}"
            )
            return
        (directory / "stage.json").unlink()
        shutil.rmtree(directory / "model")
    raise AssertionError(f"{TRIES} stages were done before they could be killed")


def remove_checkpoints_of(attempt: Attempt) -> None:
    """Remove all checkpoints under a running attempt, its ranks frozen between two saves: in the
    middle of one, the save would fail."""
    folder = attempt.directory / "checkpoints"
    ranks = attempt.processes()["ranks"]

    def between_saves() -> bool:
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        if checkpoints.steps(folder) == whole_steps(attempt.directory):
            return True
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        return False

    attempt.until(between_saves)
    shutil.rmtree(folder)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
