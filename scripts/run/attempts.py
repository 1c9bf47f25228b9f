"""The attempts of a stage: each is the lock, too."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from scripts.run.errors import InputError
from scripts.run.files import dump_json, read_json, write_atomic
from scripts.run.layout import (
    record,
)


def history(directory: Path) -> list[dict]:
    """Every attempt, oldest first."""
    files = sorted((directory / "attempts").glob("[0-9]*.json"), key=lambda p: int(p.stem))
    return [read_json(path) for path in files]


def process_start(pid: int) -> str | None:
    """The kernel's start time of a process in clock ticks since boot (proc(5), field 22); None if it is gone.
    With the pid it names one process: a reused pid starts later."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def boot_id() -> str:
    """Names this boot of this machine: after a reboot no recorded process can be alive."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def alive(attempt: dict) -> bool:
    """Whether an attempt is still running as far as this host can know. Another host's attempt counts as
    running until it has ended: refusing is safe, a second writer is not."""
    if "ended" in attempt:
        return False
    if attempt["host"] != socket.gethostname():
        return True
    return attempt["boot"] == boot_id() and process_start(attempt["pid"]) == attempt["process_start"]


def running(directory: Path) -> dict | None:
    """The attempt that is running now, or None."""
    last = history(directory)[-1:]
    return last[0] if last and alive(last[0]) else None


def this_start() -> str:
    """Names this start of a job's stage scripts, on all of its nodes: torchrun's rendezvous, new at each requeue, and
    Slurm's step, new where a step alone is started again. "" on one machine."""
    names = (os.environ.get(name) for name in ("PET_RDZV_ID", "SLURM_STEP_ID"))
    return ".".join(name for name in names if name)


def begin_attempt(directory: Path) -> dict:
    """Take the stage for this process. Raises InputError if another attempt runs or wins the race."""
    (directory / "attempts").mkdir(parents=True, exist_ok=True)
    current = running(directory)
    start = {"job": os.environ.get("RELAY_JOB", ""), "start": this_start()}
    if current and start["job"] == current["job"] != "" and start["start"] != current.get("start"):
        current = None  # an earlier start of this job: the scheduler ended it there before it began here
    attempt = {
        "attempt": len(history(directory)) + 1,
        "host": socket.gethostname(),
        "boot": boot_id(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        **start,
        "started": time.time(),
        "monotonic": time.monotonic(),  # durations must not depend on a clock that can be set back
    }
    path = directory / "attempts" / f"{attempt['attempt']}.json"
    if not current:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        write_atomic(temporary, dump_json(attempt))
        try:
            os.link(temporary, path)  # fails if it exists: of two at once exactly one wins, with whole content
            return attempt
        except FileExistsError:
            current = read_json(path)
        finally:
            temporary.unlink()
    raise InputError(already_running(directory, current))


def already_running(directory: Path, attempt: dict) -> str:
    """What to say of a stage that another attempt holds."""
    job = f", job {attempt['job']}" if attempt.get("job") else ""
    said = f"{directory}: running already: attempt {attempt['attempt']} on {attempt['host']}, process {attempt['pid']}{job}; "
    if attempt["host"] == socket.gethostname():
        return said + f"wait for it, or stop it: make stop RUN={directory.parent.name}"
    file = directory / "attempts" / f"{attempt['attempt']}.json"
    return said + f"that host cannot be asked from here: if it is gone, or this run is a copy, rm '{file}'"


def seconds_since(attempt: dict) -> float:
    """How long an attempt of this process has run."""
    return round(time.monotonic() - attempt["monotonic"], 1)


def end_attempt(directory: Path, attempt: dict, exit_code: int, error: str = "") -> None:
    """Record how an attempt ended; the next one may begin."""
    attempt.update(ended=time.time(), seconds=seconds_since(attempt), exit=exit_code, error=error)
    write_atomic(directory / "attempts" / f"{attempt['attempt']}.json", dump_json(attempt))


def bury(directory: Path, attempt: dict, why: str) -> None:
    """Record that another host's attempt is gone without a word: its scheduler says so."""
    content = {**attempt, "ended": time.time(), "exit": None, "error": why}
    write_atomic(directory / "attempts" / f"{attempt['attempt']}.json", dump_json(content))


def status(directory: Path) -> str:
    """One word for a stage: done, running, stopped (saved; run again), refused (bad input), failed, lost
    (its process is gone without a word), submitted, or - for nothing."""
    if record(directory):
        return "done"
    past = history(directory) if directory.exists() else []
    if not past:
        return "submitted" if (directory / "job.json").exists() else "-"
    if alive(past[-1]):
        return "running"
    return {64: "refused", 75: "stopped", None: "lost"}.get(past[-1].get("exit"), "failed")
