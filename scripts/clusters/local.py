"""CLUSTER=local: this machine. A stage runs in the foreground, a service in the background."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional

from scripts.clusters import containers
from scripts.clusters.interface import (
    Cluster,
    Job,
    Started,
    child_environment,
    say_what_is_left_out,
)
from scripts.run import attempts, preflight
from scripts.run.errors import InputError
from scripts.run.layout import ROOT, Run, relative
from scripts.run.processes import bound, process_start
from scripts.run.stages import row
from scripts.run.submission import Submission

# Seconds until a stage that was asked to leave is killed. A save of a large model takes minutes;
# nothing else does, but a library in C may not listen at all.
SAVE_GRACE, LEAVE_GRACE = 600, 30


class Local(Cluster):
    """Run stages on this machine, one after the other."""

    name = "local"
    listens = "127.0.0.1"

    def problems(self, submission: Submission, dry_run: bool) -> list[str]:
        """List what on this machine keeps a stage from running: .venv, a service's port."""
        runtime = containers.engine(self.environment)
        if dry_run:
            return []
        found = containers.problems(self.environment) if runtime else preflight.venv_problems()
        if submission.row.serves and not attempts.running(submission.directory):
            bind, port = submission.facts["BIND"], int(submission.facts["PORT"])
            found += preflight.port_problems(bind, port, patience=1)
        return found

    def render(self, submission: Submission, after: str = "") -> str:
        """Format the stage script's command with torchrun's own PET_* variables before it."""
        variables, words = self._command(submission)
        return " ".join([*(f"{k}={v}" for k, v in variables.items()), shlex.join(words)])

    def _command(self, submission: Submission) -> tuple[dict[str, str], list[str]]:
        """Return the variables that make a stage script's environment, and its command line."""
        variables = {
            "PET_NNODES": str(submission.nodes),
            "PET_NPROC_PER_NODE": str(submission.gpus),
        }
        words = ["-m", f"scripts.{submission.row.module}", relative(submission.directory)]
        if containers.engine(self.environment):
            words = ["python3", *words]
            return {}, containers.command(submission, variables, words, self.environment)
        return variables, [".venv/bin/python", *words]

    def submit(self, submission: Submission, after: str = "") -> Started:
        """Run the stage in the foreground and return its exit code; a service in the background
        until it answers."""
        submission.write(self.render(submission))
        say_what_is_left_out(self.environment)
        variables, words = self._command(submission)
        environment = {**child_environment(self.environment), **variables}
        if submission.row.serves:
            return Started(_serve(submission, words, environment))
        # In a session of its own: the terminal's Ctrl-C would reach the stage beside the one that
        # is passed on, and a second one means to leave without saving. A closed terminal kills the
        # launcher; bound to it, the stage then saves and leaves.
        bound_words = bound(words, signal.SIGTERM)
        child = subprocess.Popen(bound_words, cwd=ROOT, env=environment, start_new_session=True)
        code = _wait(child, submission.row.ranks, submission.directory)
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
            print(f"{submission.row.name}: {how}; the same command goes on", file=sys.stderr)
        return Started(code if code >= 0 else 128 - code)  # as a shell tells of a signal

    def jobs(self, run: Run) -> dict[str, Job]:
        """Return nothing: there is no queue here, the run directory says it all."""
        return {}

    def stop(self, directory: Path, save: bool) -> None:
        """Signal the stage script and wait until it is gone; kill it when its time is over."""
        attempt = attempts.running(directory)
        if not attempt:
            return
        if attempt["host"] != socket.gethostname():  # its pid names some other process here
            raise InputError(attempts.already_running(directory, attempt))
        pid, start = attempt["pid"], attempt["process_start"]
        os.kill(pid, signal.SIGTERM)
        if not save:
            # The second signal; another one, since two alike may arrive as one.
            os.kill(pid, signal.SIGUSR1)
        grace = SAVE_GRACE if save and row(directory.name).ranks else LEAVE_GRACE
        deadline = time.monotonic() + grace
        while process_start(pid) == start:
            time.sleep(0.1)
            if time.monotonic() > deadline:
                print(f"{directory.name}: did not leave in {grace} s: killed", file=sys.stderr)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # all below it is bound to it
                deadline = float("inf")


def _wait(child: subprocess.Popen[bytes], saves: bool, directory: Path) -> int:
    """Wait for a stage script, pass Ctrl-C and SIGTERM on to it, and kill it if it does not leave
    in time after that: Python code runs no signal handler while a library in C works."""
    asked: list[float] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(time.monotonic())
        child.send_signal(signal.SIGTERM)

    old = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    code: Optional[int] = None
    while code is None:
        try:
            code = child.wait(1)
        except subprocess.TimeoutExpired:
            grace = SAVE_GRACE if saves and len(asked) == 1 else LEAVE_GRACE
            if asked and time.monotonic() > asked[-1] + grace:
                print(f"it did not leave in {grace} s: killed", file=sys.stderr)
                attempt = attempts.running(directory)
                if attempt:  # in a container it outlives the engine's command
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(attempt["pid"], signal.SIGKILL)
                child.kill()
                code = child.wait()
    for number, handler in old.items():
        signal.signal(number, handler)
    return code


def _serve(submission: Submission, words: list[str], environment: dict[str, str]) -> int:
    """Start a service in a session of its own and wait until it answers. Returns an exit code."""
    name, address = submission.row.name, submission.directory / "server.json"
    address.unlink(missing_ok=True)  # a killed service's: it would pass for ready
    log = submission.directory / "service.log"
    with open(log, "w", encoding="utf-8") as output:
        child = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    began, terminal = time.monotonic(), sys.stdout.isatty()
    try:
        while child.poll() is None and not address.exists():
            time.sleep(0.2)
            if terminal:
                print(f"\r  {name}: loads, {time.monotonic() - began:.0f} s", end="", flush=True)
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        return 130
    if terminal:
        print()
    if not address.exists():
        print(log.read_text(encoding="utf-8").strip(), file=sys.stderr)
        return child.returncode
    return 0
