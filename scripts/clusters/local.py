"""CLUSTER=local: this machine. A cluster module has problems(), command_line(), submit() and stop().

Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from scripts.launcher import report
from scripts.run import attempts, layout, preflight
from scripts.run.errors import DONE, InputError
from scripts.run.processes import die_with_parent

BIND = "127.0.0.1"  # where deploy listens unless told otherwise


def look(run: str) -> dict:
    """No queue here: the run directory says it all."""
    return {}


def problems(submission) -> list[str]:
    """What on this machine keeps a stage from running; none that the stage itself would not say."""
    return [] if os.environ.get("DRY_RUN") else preflight.venv_problems()


def command(submission) -> tuple[dict[str, str], list[str]]:
    """Environment (torchrun's own PET_* names) and command line of the in-job script."""
    env = {"PET_NNODES": str(submission.nodes), "PET_NPROC_PER_NODE": str(submission.gpus)}
    return env, [".venv/bin/python", "-m", f"scripts.{submission.stage}", layout.relative(submission.directory)]


def command_line(submission, after: str = "") -> str:
    """The same as one line that works pasted into a shell, in the repository."""
    env, words = command(submission)
    return " ".join([*(f"{key}={value}" for key, value in env.items()), shlex.join(words)])


def show(submission, after: str = "") -> str:
    """What a dry run shows."""
    return command_line(submission)


def submit(submission, after: str = "") -> int:
    """Run the stage in the foreground; deploy in the background until it serves. Returns its exit code."""
    env, words = command(submission)
    environment = {**os.environ, **env}
    for name in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        environment.pop(name, None)  # make's own; a make inside a stage would take them for its own
    if submission.stage == "deploy":
        return _serve(submission, words, environment)
    # In a session of its own: the terminal's Ctrl-C would reach the stage beside the one that is passed on, and a
    # second one means: leave without saving. A closed terminal kills the launcher, and the stage saves and leaves.
    child = subprocess.Popen(
        words, cwd=layout.ROOT, env=environment, start_new_session=True, preexec_fn=lambda: die_with_parent(signal.SIGTERM)
    )
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda *_: child.send_signal(signal.SIGTERM))
    code = child.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if code == DONE:
        print(f"{submission.stage}: {report.one_line(submission.directory)}", flush=True)
    if code < 0:
        print(f"{submission.stage}: killed by {signal.Signals(-code).name}; the same command goes on", file=sys.stderr)
    return code if code >= 0 else 128 - code  # as a shell tells of a signal


def _serve(submission, words: list[str], environment: dict[str, str]) -> int:
    """Start the service in a session of its own and wait until it is ready."""
    address = submission.directory / "server.json"
    address.unlink(missing_ok=True)  # a killed service's: it would pass for ready
    said = submission.directory / "service.log"
    with open(said, "w", encoding="utf-8") as output:
        child = subprocess.Popen(
            words, cwd=layout.ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    began, terminal = time.monotonic(), sys.stdout.isatty()
    try:
        while child.poll() is None and not address.exists():
            time.sleep(0.2)
            if terminal:
                print(f"\r  deploy: loading, {time.monotonic() - began:.0f} s", end="", flush=True)
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        return 130
    if terminal:
        print()
    if not address.exists():
        print(said.read_text(encoding="utf-8").strip(), file=sys.stderr)
        return child.returncode
    print(f"deploy: {report.one_line(submission.directory)}", flush=True)
    return DONE


def stop(directory: Path, save: bool) -> None:
    """Ask the running stage to save and leave, or to leave, and wait until its process is gone. A service has nothing to
    save: if it has not left after half a minute, it is killed."""
    attempt = attempts.running(directory)
    if not attempt:
        return
    if attempt["host"] != socket.gethostname():  # its pid names some other process here
        raise InputError(attempts.already_running(directory, attempt))
    os.kill(attempt["pid"], signal.SIGTERM)
    if not save:
        os.kill(attempt["pid"], signal.SIGUSR1)  # the second signal; another one, since two alike may arrive as one
    asked = time.monotonic()
    while attempts.process_start(attempt["pid"]) == attempt["process_start"]:
        time.sleep(0.1)
        if directory.name == "deploy" and time.monotonic() - asked > 30:
            os.kill(attempt["pid"], signal.SIGKILL)
