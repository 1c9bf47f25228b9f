"""What keeps a job out of the queue and can be seen without Slurm: slurm/site.env, what it names, and the sbatch files.

Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from scripts.run.layout import ROOT
from scripts.run.preflight import venv_problems

SITE = "slurm/site.env"


def site_problems() -> list[str]:
    """Whether site.env can be read, has no syntax error and says what jobs run in."""
    try:
        (ROOT / SITE).read_text(encoding="utf-8")
    except OSError as error:
        return [f"{SITE}: {error.strerror}; restore it: git checkout {SITE}"]
    tried = ask("bash", "-c", f"set -eu; set -a; . {SITE}")
    if tried.returncode:
        said = tried.stderr.strip().replace(f"{SITE}: ", "").replace("bash: line 1: ", "")
        return [f"{SITE}: {said or 'a command in it ends with ' + str(tried.returncode)}; mend it"]
    site = read_site()
    runtime = site.get("RELAY_RUNTIME", "none")
    if runtime not in ("none", "pyxis", "apptainer"):
        return [f"{SITE}: RELAY_RUNTIME={runtime}: unknown; known: none, pyxis, apptainer"]
    return [] if runtime == "none" or site.get("RELAY_IMAGE") else [f"{SITE}: RELAY_RUNTIME={runtime} needs RELAY_IMAGE"]


def read_site() -> dict[str, str]:
    """The environment as site.env leaves it."""
    listed = ask("bash", "-c", f"set -a; . {SITE} >&2; env -0").stdout
    return dict(entry.split("=", 1) for entry in listed.split("\0") if "=" in entry)


def image_problems(site: dict[str, str]) -> list[str]:
    """Whether what jobs run in is there."""
    runtime, image = site.get("RELAY_RUNTIME", "none"), site.get("RELAY_IMAGE", "")
    if runtime == "none":
        return [f"{problem} (RELAY_RUNTIME=none runs jobs in it)" for problem in venv_problems()]
    is_file = image.startswith(("/", ".")) or image.endswith((".sqsh", ".sif"))  # else a registry's name
    return [f"{SITE}: RELAY_IMAGE={image}: no such file"] if is_file and not (ROOT / image).exists() else []


def secret_problems(site: dict[str, str]) -> list[str]:
    """Secret files that others can read."""
    path = Path(site.get("HF_TOKEN_PATH") or "/dev/null")
    try:
        open_to_others = path.is_file() and path.stat().st_mode & 0o077
    except OSError as error:
        return [f"HF_TOKEN_PATH={path}: {error.strerror}"]
    return [f"HF_TOKEN_PATH={path}: readable by others; chmod 600 {path}"] if open_to_others else []


def header(stage: str) -> dict[str, str]:
    """{option: value} of a stage's #SBATCH lines."""
    text = (ROOT / f"slurm/{stage}.sbatch").read_text(encoding="utf-8")
    return {name: value for name, value in re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", text, re.M)}


def seconds(limit: str) -> float:
    """Slurm's ways to write a time limit (man sbatch, --time), in seconds."""
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, (minutes, secs) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def time_problems(stage: str, site: dict[str, str]) -> list[str]:
    """A time limit that leaves nothing before its signal."""
    lines = header(stage)
    limit, signal = site.get("SBATCH_TIMELIMIT") or lines.get("time", ""), site.get("SBATCH_SIGNAL") or lines.get("signal", "")
    try:
        lead = int(signal.partition("@")[2] or "60")
        if seconds(limit) > lead:
            return []
    except ValueError:
        return [f"slurm/{stage}.sbatch: --time={limit} --signal={signal}: not as man sbatch has them"]
    return [
        f"slurm/{stage}.sbatch: --time={limit} is not more than the {lead} s of --signal={signal}: it would leave as soon as it "
        "starts; give more time (SBATCH_TIMELIMIT=…), or a shorter lead (SBATCH_SIGNAL=USR1@…)"
    ]


def ask(*words: str, env: dict[str, str] | None = None, timeout: float = 30) -> subprocess.CompletedProcess:
    """Run a command in the repository; never raises: what went wrong is in its stderr."""
    try:
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, "", f"{words[0]}: not on PATH; is this a login node of the cluster?")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"no answer in {timeout:.0f} s")
