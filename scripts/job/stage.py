"""Inside the job: what every stage script shares. The parent of the ranks, and the owner of the exit code.

A stage script is one file with two roles: started by a cluster it is the parent (`main`); started by torchrun,
with RANK in the environment, it is one rank (`rank`). A failed rank makes torchrun exit 1 whatever it raised,
so the parent reads the error files that ranks leave and decides:

    0 done    64 the input is wrong, never retried    75 saved and left, run me again    1 anything else
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Callable

from scripts.job import nodes
from scripts.job.progress import Progress, heard
from scripts.run import attempts, files, layout, versions
from scripts.run.errors import DONE, SAVED, WRONG_INPUT, InputError
from scripts.run.processes import below_a_stage, how_it_ended, tail


class RankFailed(Exception):
    """A rank ended with a fault; the message is the first failing rank's error."""


class Stopped(Exception):
    """The stage was asked to stop and its ranks have left."""


class Stage:
    """One stage of one run as its script sees it: facts, paths and the way to start ranks."""

    def __init__(self, directory: Path):
        self.directory = directory.resolve()
        self.name, self.run = self.directory.name, self.directory.parent.name
        self.facts = files.read_env(self.directory / "stage.env")
        self.arguments: list[str] = files.read_json(self.directory / "args.json") or []
        self.nodes = int(os.environ.get("PET_NNODES", "1"))
        self.processes = int(os.environ.get("PET_NPROC_PER_NODE", "1"))
        self.attempt: dict = {}
        self.progress: dict = files.read_json(self.directory / "progress.json") or {}  # an earlier attempt's, until its own
        self.progress.pop("attempt", None)
        self.training = False  # ranks are between their first step and their end: they look for stop_file
        self.stop_requested = False
        self._child: subprocess.Popen | None = None

    def path(self, fact: str) -> Path:
        """The path that a fact names. Raises InputError if it has gone since the submission."""
        path = layout.from_fact(self.facts[fact]).resolve()
        if not path.exists():
            again = f"make clean RUN={self.run} STAGE={self.name}"
            raise InputError(f"{fact}={path}: not there; put it back, or start the stage anew: {again}")
        return path

    @property
    def config(self) -> Path:
        """The frozen copy of the upstream config that runs."""
        return next(p for p in sorted(self.directory.glob("config.*")))

    def read_yaml(self) -> dict:
        """The frozen config, where it is YAML. Raises InputError naming the line that is not."""
        import yaml

        try:
            content = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise InputError(f"{self.config}: not YAML: {error}") from None
        if not isinstance(content, dict):
            raise InputError(f"{self.config}: must hold key: value lines")
        return content

    @property
    def attempt_number(self) -> int:
        """This attempt's number, from 1."""
        return self.attempt.get("attempt") or int(os.environ["RELAY_ATTEMPT"])

    def refuse_a_second_writer(self) -> None:
        """A scheduler that lost sight of a node starts the stage elsewhere, while on that node it may still run."""
        if (self.directory / "attempts" / f"{self.attempt_number + 1}.json").exists():
            raise RankFailed(f"attempt {self.attempt_number + 1} has taken this stage over")

    @property
    def log(self) -> Path:
        """The log of this attempt, on this node."""
        node = f".node{nodes.rank()}" if nodes.rank() else ""
        return self.directory / "logs" / f"attempt-{self.attempt_number}{node}.log"

    @property
    def stop_file(self) -> Path:
        """Exists while the ranks of this attempt are asked to save and leave."""
        return self.directory / "attempts" / f"{self.attempt_number}.stop"

    def scratch(self, name: str) -> Path:
        """An empty working directory inside the stage, never handed on under this name."""
        path = self.directory / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def ranks(self, extra: dict[str, str] | None = None, cwd: Path = layout.ROOT) -> None:
        """Run this stage script as ranks, through torchrun unless there is exactly one, and wait.

        One rank is started directly: torchrun would cost five seconds of imports to start one process.
        Raises InputError, Stopped or RankFailed.
        """
        command = [sys.executable, "-m", f"scripts.{self.name}", str(self.directory)]
        threads = max(1, len(os.sched_getaffinity(0)) // self.processes)
        env = {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            **os.environ,
            **(extra or {}),
            "RELAY_ATTEMPT": str(self.attempt["attempt"]),
            "PYTHONPATH": str(layout.ROOT),
            "PYTHONUNBUFFERED": "1",  # else torchrun keeps 8 KB back: no progress, and a stop would find no training
        }
        if self.nodes * self.processes == 1:
            env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        else:
            if nodes.rank() == 0:
                nodes.call(self.directory, self.attempt_number)
            command[1:2] = ["-m", "torch.distributed.run", "--log-dir", str(self.directory / "logs"), "--tee", "3", "-m"]
        self.command(command, env, cwd)

    def command(self, command: list[str], env: dict[str, str], cwd: Path = layout.ROOT) -> None:
        """Run a child to its end, its output in the log, its progress on this terminal."""
        self.log.parent.mkdir(exist_ok=True)
        with open(self.log, "a", encoding="utf-8", errors="replace") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
            own = {"start_new_session": True, "preexec_fn": below_a_stage}
            child = subprocess.Popen(command, cwd=cwd, env=env, text=True, **streams, **own)
            self._child = child
            show = Progress(self.name)
            for line in child.stdout:
                said = heard(line)
                if said is None:
                    with contextlib.suppress(OSError):  # a full disk: read on, or the ranks wait for ever
                        log.write(line)
                        log.flush()
                    continue
                if "say" in said:
                    show.line(said["say"])
                    continue
                if "step" in said and not self.training:
                    self.training = True
                    if said["step"] < said["total"]:
                        self.progress.clear()  # an earlier attempt's: its loss is not this step's
                self.progress.update(said)
                show(self.progress)
                with contextlib.suppress(OSError):
                    content = {**self.progress, "attempt": self.attempt_number}
                    files.write_atomic(self.directory / "progress.json", files.dump_json(content))
            code = child.wait()
            show.end()
        if self.nodes > 1 and nodes.rank() == 0:
            if not self.stop_requested:
                self._hear()
            time.sleep(3 if code else 0)  # another node's ranks may have failed first, and say so now
        errors = self.errors()
        if nodes.rank() == 0:
            self.stop_file.unlink(missing_ok=True)
        if self.stop_requested and (code == 0 or not self.training or not errors):
            raise Stopped
        if errors and errors[0]["problems"]:
            raise InputError(errors[0]["problems"])
        if code != 0:
            first = f"rank {errors[0]['rank']}: {errors[0]['error']}" if errors else how_it_ended(code)
            raise RankFailed(f"{first}{self.full_disk()}\n\nlast lines of {self.log}:\n{tail(self.log)}")

    def errors(self) -> list[dict]:
        """What ranks of this attempt left behind, first failure first."""
        files = self.directory.glob(f"logs/error-{self.attempt_number}-*.json")
        return sorted((json.loads(p.read_text()) for p in files), key=lambda e: e["time"])

    def _hear(self) -> None:
        """Take over what rank 0 has told the parent on its own node, which may be another."""
        said = files.read_json(self.directory / "progress.json") or {}
        if said.pop("attempt", None) == self.attempt_number:
            self.progress, self.training = said, True

    def full_disk(self) -> str:
        """A sentence where there is no space left: tools say it in many ways, torch with "unexpected pos"."""
        free = shutil.disk_usage(self.directory).free
        if free > 32 << 20:
            return ""
        return f"\n{self.directory}: no space left ({free >> 20} MiB): free some, then the same command goes on"

    def stop(self, number: int, frame: object) -> None:
        """Signal handler. Ranks that train are asked to save and leave; whatever has nothing to save is ended, and
        so is everything at the second signal."""
        child, first = self._child, not self.stop_requested
        self.stop_requested = True
        if self.nodes > 1 and first:
            self._hear()
        if child is None or child.poll() is not None:
            if first:
                raise Stopped
        elif first and self.training:
            files.write_atomic(self.stop_file, "")
            with contextlib.suppress(OSError):  # os.write: the signal may have come in the middle of a print
                os.write(1, f"\n{self.name}: saving at the end of this step; once more to leave without\n".encode())
        else:
            self.training = False
            self.kill(signal.SIGTERM if first else signal.SIGKILL)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the ranks of this node, if there are any."""
        if self._child is not None and self._child.poll() is None:
            os.killpg(self._child.pid, number)


def run(main: Callable[[Stage], dict], rank: Callable | None = None) -> None:
    """Entry point of a stage script: `python -m scripts.<stage> runs/<run>/<stage>`. Exits, never returns.

    `main` returns what goes into stage.json: {"inputs": {…}, "outputs": {…}, "summary": {…}}.
    """
    if len(sys.argv) != 2 or not Path(sys.argv[1], "stage.env").exists():
        print(f"usage: python -m scripts.<stage> runs/<run>/<stage> (with its stage.env); got {sys.argv[1:]}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    os.environ["RUNS"] = str(Path(sys.argv[1]).resolve().parent.parent)  # facts name paths below it
    if "RANK" in os.environ:
        from scripts.job.rank import run_rank

        run_rank(Path(sys.argv[1]), rank)
        return
    stage = Stage(Path(sys.argv[1]))
    if layout.record(stage.directory):
        print(f"{stage.name}: done already")  # a second job of it, or a requeue; no node may wait for another's call
        sys.exit(DONE)
    if nodes.rank():
        nodes.follow(stage)
    try:
        stage.attempt = attempts.begin_attempt(stage.directory)
    except (InputError, OSError) as problem:
        written = f"cannot write {stage.directory}: {getattr(problem, 'strerror', '')}; mend its permissions"
        print(f"{stage.name}: {problem if isinstance(problem, InputError) else written}", file=sys.stderr)
        with contextlib.suppress(OSError):
            nodes.call(stage.directory, None)
        sys.exit(WRONG_INPUT)
    code, error = DONE, ""
    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    try:
        for number in stops:
            signal.signal(number, stage.stop)
        result = main(stage)
        _finish(stage, result)
    except InputError as problem:
        code, error = WRONG_INPUT, str(problem)
    except Stopped:
        code, error = SAVED, "stopped; the same command continues"
    except RankFailed as fault:
        code, error = 1, str(fault)
    except Exception:
        code, error = 1, stage.full_disk().strip() or traceback.format_exc()
    for number in stops:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # a full disk: the process is gone all the same, and the next attempt may begin
        attempts.end_attempt(stage.directory, stage.attempt, code, error)
    with contextlib.suppress(OSError):
        nodes.call(stage.directory, None)
    with contextlib.suppress(OSError):
        if error:
            print(f"\n{stage.name}: {error}", file=sys.stderr)
    sys.exit(code)


def _finish(stage: Stage, result: dict) -> None:
    """Write stage.json: from here on the stage is done."""
    stage.refuse_a_second_writer()
    history = attempts.history(stage.directory)
    content = {
        "stage": stage.name,
        "run": stage.run,
        "status": "done",
        "facts": stage.facts,
        "arguments": stage.arguments,
        "attempts": len(history),
        "started": history[0]["started"],
        "ended": time.time(),
        "seconds": attempts.seconds_since(stage.attempt),
        "versions": versions.versions(),
        "git_commit": versions.git_commit(),
        **result,
    }
    files.write_atomic(stage.directory / "stage.json", files.dump_json(content))
