"""The parent of a stage's ranks: the stage script that a cluster starts once on each node.

It starts the ranks, shows and records what they tell, passes a stop on, and finds out why they
failed: a failed rank makes torchrun exit 1 whatever it raised, so ranks leave error files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from scripts.job import nodes
from scripts.job.environment import JobEnvironment
from scripts.job.progress import Progress, heard
from scripts.job.stage import RankFailed, Stage, Stopped
from scripts.run import attempts, files, layout, preflight, retry
from scripts.run.errors import InputError
from scripts.run.processes import bound, how_it_ended, tail
from scripts.run.stages import row

STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL, for ranks that have nothing to save


class Parent(Stage):
    """A stage as its stage script sees it: with an attempt, and with ranks to start."""

    def __init__(self, directory: Path, environment: JobEnvironment):
        super().__init__(directory, environment)
        self.attempt: dict[str, Any] = {}
        said = files.read_json(self.directory / "progress.json") or {}
        said.pop("phase", None)
        # An earlier attempt's numbers stand until this one counts steps itself.
        self.counted_by: Optional[int] = said.pop("attempt", None)
        self.progress: dict[str, Any] = said
        self.training = False  # ranks take steps, so they look for stop_file
        self.serving = False  # the service has answered
        self.stop_requested = False
        self.shown = Progress(self.name, quiet=environment.node > 0)
        self._spoken_to = False  # rank 0 is on this node
        self._progressed = False  # this attempt has reached a new highest step
        self._lock = threading.RLock()  # tick() and ready() run in threads of their own
        self._child: Optional[subprocess.Popen[str]] = None
        self._kill_at = float("inf")

    @property
    def attempt_number(self) -> int:
        """Return this attempt's number, from 1."""
        return int(self.attempt["attempt"])

    # --- the attempt

    def begin(self) -> None:
        """Begin an attempt. Raises InputError if another runs, OSError if none can be written."""
        environment = self.environment
        self.attempt = attempts.begin(self.directory, environment.job, environment.start)
        self.leave_word()  # now: a script that is killed later leaves none
        threading.Thread(target=self._tick, daemon=True).start()

    def end(self, code: int, error: str) -> None:
        """Record how the attempt ended. Raises OSError."""
        self.phase("")
        with self._lock:
            attempts.end(self.directory, self.attempt, code, error)
        self.leave_word()

    def leave_word(self) -> str:
        """Leave the word by which a scheduler decides on another start (retry.py); return it."""
        with self._lock, contextlib.suppress(OSError):  # a full disk: the word before it stands
            return retry.leave_word(self.directory, self.environment.job)
        return retry.AGAIN

    def ready(self) -> None:
        """Note that the service answers: what failed before it no longer counts as a fault."""
        self.serving = True
        self.phase("")
        with self._lock, contextlib.suppress(OSError):
            if "ended" not in self.attempt:
                self.attempt["served"] = True
                name = f"{self.attempt_number}.json"
                files.write_json(self.directory / "attempts" / name, self.attempt)
        self.leave_word()

    # --- progress

    def phase(self, name: str, detail: str = "") -> None:
        """Show and record what the stage does from now on, for example "loads the model"; "" for
        a phase that needs no clock. The same phase again shows how far it is: `detail`."""
        if name != self.shown.phase:
            self.shown.enter(name)
        self.shown.detail = f", {detail}" if detail else ""
        said = {
            "name": name + self.shown.detail,
            "since": time.time(),
            "attempt": self.attempt_number,
        }
        self._record(said if name else None)

    def _steps(self, said: dict[str, Any]) -> None:
        """Take rank 0's report: step, total, and perhaps loss and tokens_per_second."""
        if not self.training:
            self.training = True
            if said["step"] < said["total"]:
                self.progress.clear()  # an earlier attempt's loss is not this step's
        self.progress.update(said)
        self.counted_by = self.attempt_number
        self.shown.show(self.progress)
        self._record()
        if not self._progressed and said["step"] > self.attempt.get("highest_before", 0):
            self._progressed = True
            self.leave_word()

    def _record(self, phase: Optional[dict[str, Any]] = None) -> None:
        """Write progress.json: the newest steps with the attempt that counted them, the phase."""
        content = {**self.progress}
        if self.counted_by is not None:
            content["attempt"] = self.counted_by
        if phase:
            content["phase"] = phase
        with self._lock, contextlib.suppress(OSError):
            files.write_json(self.directory / "progress.json", content)

    def _overheard(self) -> dict[str, Any]:
        """Return what another node's parent has recorded in this attempt; {} if nothing."""
        with contextlib.suppress(InputError, OSError):
            said = files.read_json(self.directory / "progress.json") or {}
            phase = said.pop("phase", {})
            if said.pop("attempt", None) != self.attempt_number:
                said = {}
            return said or (phase if phase.get("attempt") == self.attempt_number else {})
        return {}

    def _tick(self) -> None:
        """Do once a second what must not wait for a line of the ranks' output."""
        while True:
            time.sleep(1)
            if time.monotonic() > self._kill_at:
                self.kill()
            if self.environment.nodes > 1 and self._child is not None and not self._spoken_to:
                said = self._overheard()  # rank 0 may be on another node
                if "step" in said:
                    self.shown.show(said)
                elif said and said["name"] != self.shown.phase:
                    self.shown.enter(said["name"])
            self.shown.tick()

    # --- ranks

    def ranks(self, extra: Optional[Mapping[str, str]] = None, cwd: Path = layout.ROOT) -> None:
        """Run this stage script as ranks and wait. `extra` goes into their environment.

        A single rank is started directly: torchrun takes five seconds to start one process.
        Raises InputError, Stopped or RankFailed.
        """
        found = preflight.gpu_problems(self.environment.processes, os.environ, Path("/dev"))
        if found:
            raise InputError(found)
        command = [sys.executable, "-m", f"scripts.{row(self.name).module}", str(self.directory)]
        if self.environment.world > 1:
            if self.environment.node == 0:
                nodes.call(self.directory, self.environment, nodes.START, self.attempt_number)
            logs = str(self.directory / "logs")
            torchrun = ["-m", "torch.distributed.run", "--log-dir", logs, "--tee", "3"]
            command[1:1] = torchrun
        environment = self.environment.for_ranks(self.attempt_number, extra or {})
        self.shown.enter("starts")
        self.command(command, environment, cwd)

    def command(self, command: list[str], environment: dict[str, str], cwd: Path) -> None:
        """Run a child as the stage's ranks, its output in the log. Raises as ranks() does."""
        self._judge(self._run(command, environment, cwd))

    def _run(self, command: list[str], environment: dict[str, str], cwd: Path) -> int:
        """Run a child to its end, its output in the log; return its exit code."""
        self.log.parent.mkdir(exist_ok=True)
        with open(self.log, "a", encoding="utf-8", errors="replace") as log:
            # Slurm sends a step's SIGUSR1 to every process in it, and it ends one that does not
            # expect it: below the stage script it is ignored.
            child = subprocess.Popen(
                bound(command, signal.SIGKILL, ignored=signal.SIGUSR1),
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._child = child
            assert child.stdout is not None
            for line in child.stdout:
                said = heard(line)
                if said is not None:
                    self._hear(said)
                    continue
                self.shown.hint(line)
                with contextlib.suppress(OSError):  # a full disk: who stops to read stops the ranks
                    log.write(line)
                    log.flush()
            code = child.wait()
        self.shown.end()
        self._kill_at = float("inf")
        return code

    def _hear(self, said: dict[str, Any]) -> None:
        self._spoken_to = True
        if "say" in said:
            self.shown.say(said["say"])
        elif "phase" in said:
            self.phase(said["phase"], said.get("detail", ""))
        else:
            self._steps(said)

    def _judge(self, code: int) -> None:
        """Raise what the ranks' end means for the stage, if it is not its success."""
        if self.environment.nodes > 1 and self.environment.node == 0:
            if not self.stop_requested:
                self._take_over_what_was_overheard()
            time.sleep(3 if code else 0)  # another node's ranks may have failed first, and say so
        errors = self.errors()
        if self.environment.node == 0:
            self.stop_file.unlink(missing_ok=True)
        if self.stop_requested and (code == 0 or not self.training or not errors):
            raise Stopped
        if errors and errors[0]["problems"]:
            raise InputError(errors[0]["problems"])
        if code != 0:
            first = how_it_ended(code)
            if errors:
                first = f"rank {errors[0]['rank']}: {errors[0]['error']}"
            last = f"last lines of {self.log}:\n{tail(self.log)}"
            raise RankFailed(f"{first}{self.full_disk()}\n\n{last}")

    def _take_over_what_was_overheard(self) -> None:
        """Know what rank 0 has told the parent of its own node."""
        said = self._overheard()
        if "step" in said:
            self.progress, self.training = said, True
            self.counted_by = self.attempt_number

    def errors(self) -> list[dict[str, Any]]:
        """Return what failed ranks of this attempt left, first failure first."""
        found = self.directory.glob(f"logs/error-{self.attempt_number}-*.json")
        return sorted((json.loads(p.read_text()) for p in found), key=lambda e: e["time"])

    def full_disk(self) -> str:
        """Return a sentence if there is no space left, else "": tools say it in many ways, torch
        with "unexpected pos"."""
        free = shutil.disk_usage(self.directory).free
        if free > 32 << 20:
            return ""
        mend = "free some, then the same command goes on"
        return f"\n{self.directory}: no space left ({free >> 20} MiB): {mend}"

    # --- stops

    def stop(self, number: int, frame: object) -> None:
        """Handle a signal. The first asks ranks that train to save and leave (the launcher and the
        scheduler have deadlines of their own), and sends SIGTERM to others, SIGKILL after
        STOP_SECONDS; a service that answers has its own deadline (vLLM's --shutdown-timeout).
        The second ends all at once. Raises Stopped if no child runs."""
        child, first = self._child, not self.stop_requested
        self.stop_requested = True
        if self.environment.nodes > 1 and first:
            self._take_over_what_was_overheard()
        if child is None or child.poll() is not None:
            if first:
                raise Stopped
        elif first and self.training:
            files.write_atomic(self.stop_file, "")
            said = f"\n{self.name}: saving at the end of this step; a second stop leaves unsaved\n"
            with contextlib.suppress(OSError):  # os.write: print may be at work below this handler
                os.write(1, said.encode())
        elif first:
            self.kill(signal.SIGTERM)
            if not self.serving:
                self._kill_at = time.monotonic() + STOP_SECONDS
        else:
            self.training = False
            self.kill()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to this node's ranks, if they run."""
        if self._child is not None and self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)
