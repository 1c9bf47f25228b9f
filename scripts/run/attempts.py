"""The attempts of a stage, attempts/<n>.json. An attempt file is the lock, too: attempt n + 1 may
begin only when attempt n has ended or its process is gone, and making the file is what wins."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from scripts.run.errors import DONE, SAVED, WRONG_INPUT, InputError
from scripts.run.files import dump_json, read_json, write_atomic, write_json
from scripts.run.layout import finished
from scripts.run.processes import boot_id, process_start


def history(directory: Path) -> list[dict[str, Any]]:
    """Read every attempt of a stage, oldest first."""
    files = sorted((directory / "attempts").glob("[0-9]*.json"), key=lambda p: int(p.stem))
    return [read_json(path) for path in files]


def alive(attempt: dict[str, Any]) -> bool:
    """Tell whether an attempt still runs, as far as this host can know. Another host's counts as
    running until it has ended: to refuse is safe, a second writer is not."""
    if "ended" in attempt:
        return False
    if attempt["host"] != socket.gethostname():
        return True
    same = process_start(attempt["pid"]) == attempt["process_start"]
    return bool(attempt["boot"] == boot_id() and same)


def running(directory: Path) -> Optional[dict[str, Any]]:
    """Return the attempt that runs now, None if there is none."""
    last = history(directory)[-1:]
    return last[0] if last and alive(last[0]) else None


def highest_step(directory: Path) -> int:
    """Return the highest step that any attempt has reached: what the newest attempt found when it
    began, or what its progress says since; 0 where no attempt counts steps."""
    found = max((a.get("highest_before", 0) for a in history(directory)), default=0)
    progress = read_json(directory / "progress.json") or {}
    return int(max(found, progress.get("step", 0)))


def begin(directory: Path, job: str = "", start: str = "") -> dict[str, Any]:
    """Take the stage for this process and return its attempt.

    `job` names the scheduler's job, "" on one machine; `start` one start of that job: an attempt
    of an earlier start of the same job was ended by the scheduler before this one began.
    Raises InputError if another attempt runs, or wins the race.
    """
    (directory / "attempts").mkdir(parents=True, exist_ok=True)
    past = history(directory)  # once: another launch may begin in between, and both would win
    current = past[-1] if past and alive(past[-1]) else None
    if current and job == current["job"] != "" and start != current.get("start"):
        current = None
    attempt = {
        "attempt": len(past) + 1,
        "host": socket.gethostname(),
        "boot": boot_id(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "job": job,
        "start": start,
        "started": time.time(),
        "monotonic": time.monotonic(),  # durations must not depend on a clock that is set back
        "highest_before": highest_step(directory),
    }
    path = directory / "attempts" / f"{attempt['attempt']}.json"
    if not current:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        write_atomic(temporary, dump_json(attempt))
        try:
            os.link(temporary, path)  # fails if it exists: of two at once one wins, whole
            return attempt
        except FileExistsError:
            current = read_json(path)
        finally:
            temporary.unlink()
    assert current is not None
    raise InputError(already_running(directory, current))


def already_running(directory: Path, attempt: dict[str, Any]) -> str:
    """Say that another attempt holds a stage, and what to do about it."""
    job = f", job {attempt['job']}" if attempt.get("job") else ""
    where = f"attempt {attempt['attempt']} on {attempt['host']}, process {attempt['pid']}{job}"
    said = f"{directory}: running already: {where}; "
    if attempt["host"] == socket.gethostname():
        return said + f"wait for it, or stop it: make stop RUN={directory.parent.name}"
    file = directory / "attempts" / f"{attempt['attempt']}.json"
    return (
        f"{said}that host cannot be asked from here: "
        f"if it is gone, or this run is a copy, rm '{file}'"
    )


def seconds_since(attempt: dict[str, Any]) -> float:
    """Return how many seconds an attempt of this process has run."""
    return round(time.monotonic() - float(attempt["monotonic"]), 1)


def end(directory: Path, attempt: dict[str, Any], exit_code: int, error: str = "") -> None:
    """Record how an attempt ended; the next one may begin."""
    took = seconds_since(attempt)
    attempt.update(ended=time.time(), seconds=took, exit=exit_code, error=error)
    write_json(directory / "attempts" / f"{attempt['attempt']}.json", attempt)


def record_lost(directory: Path, attempt: dict[str, Any], why: str) -> None:
    """Record the end of an attempt that could not do so itself: its scheduler says it is gone."""
    content = {**attempt, "ended": time.time(), "exit": None, "error": why}
    write_json(directory / "attempts" / f"{attempt['attempt']}.json", content)


def status(directory: Path) -> str:
    """Say a stage's state in one word: done, running, stopped (saved; run again), refused (wrong
    input), failed, lost (its process is gone without a word), submitted, or - for nothing."""
    if finished(directory):
        return "done"
    past = history(directory) if directory.exists() else []
    if not past:
        return "submitted" if (directory / "job.json").exists() else "-"
    if alive(past[-1]):
        return "running"
    words = {WRONG_INPUT: "refused", SAVED: "stopped", DONE: "stopped", None: "lost"}
    return words.get(past[-1].get("exit"), "failed")


def learned(numbers: Mapping[str, Any]) -> str:
    """Say what training is judged by: "loss 2.345", or "reward 0.500"; "" where neither is told."""
    return next((f"{k} {numbers[k]:.3f}" for k in ("loss", "reward") if k in numbers), "")
