"""The parent of a stage's ranks: the stage script that a cluster starts once on each node.

It starts the ranks, shows and records what they tell, passes a stop on, and finds out why they
failed: a failed rank makes torchrun exit 1 whatever it raised, so ranks leave error files.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from scripts.job import faults, nodes
from scripts.job.environment import JobEnvironment
from scripts.job.nodes import Meeting
from scripts.job.progress import heard
from scripts.job.record import Recorder
from scripts.job.stage import RankFailed, Stopped
from scripts.run import attempts, files, layout, preflight, retry
from scripts.run.errors import FAULT, SAVED, InputError
from scripts.run.processes import bound, how_it_ended, tail
from scripts.run.stages import row

STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL, for ranks that have nothing to save
TICK_SECONDS, SAY_SECONDS = 1.0, 3.0  # the latter: for ranks elsewhere that have failed first
COME_SECONDS = 600.0  # for the nodes of a job to come; torchrun's own patience


class Parent(Recorder):
    """A stage as its stage script sees it: with an attempt, and with ranks to start."""

    def __init__(
        self, directory: Path, environment: JobEnvironment, meeting: Optional[Meeting] = None
    ):
        super().__init__(directory, environment)
        self.meeting = meeting or Meeting(self.directory, environment)
        self.lost = ""  # which node is lost, and this attempt ends
        self.hang = ""  # for how long no step has come, and this attempt ends
        self.others_leave = False  # another node was asked to leave
        self.serving = False  # the service has answered
        self.over = threading.Event()  # set when the attempt has ended
        self._child: Optional[subprocess.Popen[str]] = None
        self._kill_at = float("inf")

    # --- the attempt

    def begin(self) -> None:
        """Begin an attempt. Raises InputError if another runs, OSError if none can be written."""
        environment = self.environment
        self.attempt = attempts.begin(self.directory, environment.job, environment.start)
        self.meeting.call(nodes.BEGUN, self.attempt_number)
        self.leave_word()  # now: a script that is killed later leaves none
        self.watch()

    def end(self, code: int, error: str) -> None:
        """Record how the attempt ended. Raises OSError."""
        self.phase("")
        with self._lock:
            attempts.end(self.directory, self.attempt, code, error)
        self.leave_word()

    def stays(self, code: int) -> bool:
        """Tell whether this script begins the next attempt itself, where a lost node is replaced
        alone: after a loss, after another node's leave, after every other fault without progress.
        Else its pod is replaced, too."""
        if not self.environment.pods or self.meeting.leaving or self.meeting.replaced:
            return False
        past, highest = attempts.history(self.directory), attempts.highest_step(self.directory)
        count, _ = retry.counts(past, highest, self.environment.job)
        return code == SAVED or (code == FAULT and (bool(self.lost) or count % 2 == 1))

    def leave_word(self) -> str:
        """Leave the word by which a scheduler decides on another start (retry.py); return it."""
        with self._lock, contextlib.suppress(OSError):  # a full disk: the word before it stands
            return retry.leave_word(self.directory, self.environment.job)
        return retry.AGAIN

    def progressed(self) -> None:
        """Leave another word: an attempt that makes progress is followed by another."""
        self.leave_word()

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

    # --- while the ranks run

    def watch(self) -> None:
        """Do every second what cannot wait for a line of the ranks' output, until over is set."""
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self.over.wait(TICK_SECONDS):
            self._look_at_the_nodes()
            self._look_for_a_hang()
            if time.monotonic() > self._kill_at:
                self.kill()
            if self.environment.nodes > 1 and self._child is not None and not self._spoken_to:
                said = self._overheard()  # rank 0 may be on another node
                if "step" in said:
                    self.steps.saw(said["step"], said["total"])
                    self.shown.show(said)
                elif said and said["name"] != self.shown.phase:
                    self.shown.enter(said["name"])
            self.shown.tick()

    def _look_at_the_nodes(self) -> None:
        """End this node's ranks when they have no right to run, or none to wait for."""
        meeting = self.meeting
        if meeting.over(self.attempt_number):
            self.kill()
        elif self.environment.nodes == 1 or self.environment.node or self._child is None:
            return
        elif self.lost or meeting.lost():
            self.lost = self.lost or meeting.lost()
            self.kill()
        elif meeting.failing():
            self._kill_at = min(self._kill_at, time.monotonic() + nodes.FAULT_SECONDS)
        elif meeting.who_leaves() and not self.others_leave:
            self.others_leave = True
            self.shown.say(meeting.who_leaves())
            self._take_over_what_was_overheard()
            self._ask_to_leave()

    def _look_for_a_hang(self) -> None:
        """End the attempt if no step has come for long, and ask all ranks where they stand."""
        if self.environment.node:
            if self.meeting.asks_for_stacks(self.attempt_number):
                self._ask_for_stacks()
            return
        silent = self.steps.silent(self.environment.hang, bool(self.shown.phase))
        if not silent or self.hang or self.meeting.leaving:
            return
        self.hang = f"no step for {silent:.0f} s: it hangs"
        self.meeting.call(nodes.HANG, self.attempt_number)
        self._ask_for_stacks()
        self._kill_at = time.monotonic() + faults.ANSWER_SECONDS

    def _ask_for_stacks(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, faults.ASKED)

    # --- ranks

    def _gather(self) -> None:
        """Wait until a script of each node is there, then call the attempt's ranks. Raises
        RankFailed where lost nodes are not replaced alone, and one has not come."""
        began, missing = time.monotonic(), [0]
        while absent := self.meeting.absent(began):
            if absent != missing:
                self.phase(f"waits for node {', '.join(map(str, absent))}")
            if not self.environment.pods and time.monotonic() > began + COME_SECONDS:
                raise RankFailed(f"node {absent[0]} has not come for {COME_SECONDS:.0f} s")
            missing = absent
            time.sleep(0.2)
        self.meeting.call(nodes.START, self.attempt_number)

    def ranks(self, extra: Optional[Mapping[str, str]] = None, cwd: Path = layout.ROOT) -> None:
        """Run this stage script as ranks and wait. `extra` goes into their environment.

        A single rank is started directly: torchrun takes five seconds to start one process.
        Raises InputError, Stopped or RankFailed.
        """
        found = preflight.device_problems(self.environment.processes, os.environ, Path("/dev"))
        if found:
            raise InputError(found)
        command = [sys.executable, "-m", f"scripts.{row(self.name).module}", str(self.directory)]
        if self.environment.world > 1:
            if self.environment.nodes > 1:
                if self.environment.node == 0:
                    self._gather()
                if self.environment.pods:
                    nodes.wait_for_name(self.environment.meets_at)
            logs = str(self.directory / "logs")
            torchrun = ["-m", "torch.distributed.run", "--log-dir", logs, "--tee", "3"]
            command[1:1] = torchrun
        environment = self.environment.for_ranks(self.attempt_number, extra or {})
        self.phase("starts")  # what it waited for before is over
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
        self.steps.end()
        self._kill_at = float("inf")
        return code

    def _judge(self, code: int) -> None:
        """Raise what the ranks' end means for the stage, if it is not its success."""
        if self.environment.nodes > 1 and self.environment.node == 0:
            if not self.meeting.leaving:
                self._take_over_what_was_overheard()
            if code and not self.lost:
                time.sleep(SAY_SECONDS)
        errors = faults.errors(self.directory, self.attempt_number)
        if self.environment.node == 0:
            self.stop_file.unlink(missing_ok=True)
        if self.lost:
            raise RankFailed(self.lost)
        if self.hang:
            answers = faults.stacks(self.directory, self.attempt_number)
            where = f"{self.directory}/logs/stacks-{self.attempt_number}-*.txt"
            raise RankFailed(
                f"{self.hang}; {faults.who_hangs(answers)}\n\n{where} has their stacks"
            )
        asked = self.meeting.leaving or self.others_leave
        if asked and (code == 0 or not self.training or not errors):
            raise Stopped
        if errors and errors[0]["problems"]:
            raise InputError(errors[0]["problems"])
        if code != 0:
            first = how_it_ended(code)
            if errors:
                first = f"rank {errors[0]['rank']}: {errors[0]['error']}"
            last = f"last lines of {self.log}:\n{tail(self.log)}"
            raise RankFailed(f"{first}{faults.full_disk(self.directory)}\n\n{last}")

    # --- stops

    def stop(self, number: int, frame: object) -> None:
        """Handle a signal. The first asks ranks that train to save and leave; others get SIGTERM,
        and SIGKILL after STOP_SECONDS, but for a service that answers (vLLM's --shutdown-timeout).
        The second ends all at once. Raises Stopped if no child runs."""
        child, first, training = self._child, not self.meeting.leaving, self.training
        self.meeting.leaving = True
        if self.environment.nodes > 1 and first:
            self._take_over_what_was_overheard()
        if child is None or child.poll() is not None:
            if first:
                raise Stopped
        elif first:
            if training:  # said first: the second signal may come while the ranks are asked
                said = "saving at the end of this step; a second stop leaves unsaved"
                with contextlib.suppress(OSError):  # os.write: print may be at work below
                    os.write(1, f"\n{self.name}: {said}\n".encode())
            self._ask_to_leave()
        else:
            self.training = False
            self.kill()

    def _ask_to_leave(self) -> None:
        """Ask ranks that train to save and leave; send SIGTERM to others."""
        if self.training:
            files.write_atomic(self.stop_file, "")
            return
        self.kill(signal.SIGTERM)
        if not self.serving:
            self._kill_at = time.monotonic() + STOP_SECONDS

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to this node's ranks, if they run."""
        if self._child is not None and self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)
