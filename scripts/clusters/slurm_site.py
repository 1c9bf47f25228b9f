"""What keeps a job out of the queue and can be seen without Slurm: slurm/site.env, the files it
names, and the headers of the sbatch files."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from scripts.clusters.commands import ask
from scripts.run.layout import ROOT
from scripts.run.preflight import venv_problems

SITE = "slurm/site.env"
RUNTIMES = ("none", "pyxis", "apptainer", "oci")
TOLD = re.compile("(SBATCH|RELAY|NCCL|GLOO|FI)_")  # what of its variables a dry run shows


class Site:
    """Hold the environment as site.env leaves it; `problems` if it cannot be read."""

    def __init__(self, environment: Mapping[str, str]):
        self.problems: list[str] = []
        self.variables: dict[str, str] = {}
        try:
            (ROOT / SITE).read_text(encoding="utf-8")
        except OSError as error:
            self.problems = [f"{SITE}: {error.strerror}; restore it: git checkout {SITE}"]
            return
        script = f"set -eu; set -a; . {SITE} >&2; env -0"
        tried = ask("bash", "-c", script, environment=environment)
        if tried.returncode:
            said = tried.stderr.strip().replace(f"{SITE}: ", "").replace("bash: line 1: ", "")
            said = said or f"a command in it ends with {tried.returncode}"
            self.problems = [f"{SITE}: {said}; mend it"]
            return
        entries = (entry for entry in tried.stdout.split("\0") if "=" in entry)
        self.variables = dict(entry.split("=", 1) for entry in entries)
        runtime = self.get("RELAY_RUNTIME", "none")
        if runtime not in RUNTIMES:
            known = ", ".join(RUNTIMES)
            self.problems = [f"{SITE}: RELAY_RUNTIME={runtime}: unknown; known: {known}"]
        elif runtime != "none" and not self.get("RELAY_IMAGE"):
            self.problems = [f"{SITE}: RELAY_RUNTIME={runtime} needs RELAY_IMAGE"]

    def get(self, name: str, default: str = "") -> str:
        """Return a variable's value, `default` if it is empty or not set."""
        return self.variables.get(name) or default

    def told(self) -> str:
        """Format the variables that a dry run shows, on one line: a value with a line break in it
        would leave the comment that it stands in, and run when it is pasted."""
        shown = sorted((k, v) for k, v in self.variables.items() if v and TOLD.match(k))
        return " ".join(
            f"{k}={shlex.quote(v) if v.isprintable() else json.dumps(v)}" for k, v in shown
        )

    def image_problems(self) -> list[str]:
        """Tell whether what jobs run in is there."""
        runtime, image = self.get("RELAY_RUNTIME", "none"), self.get("RELAY_IMAGE")
        if runtime == "none":
            return [
                f"{problem} (RELAY_RUNTIME=none runs jobs in it)" for problem in venv_problems()
            ]
        # Anything else is a name in a registry, which is not asked.
        is_file = image.startswith(("/", ".")) or image.endswith((".sqsh", ".sif"))
        missing = is_file and not (ROOT / image).exists()
        return [f"{SITE}: RELAY_IMAGE={image}: no such file"] if missing else []

    def secret_problems(self) -> list[str]:
        """List the secret files that others can read."""
        path = Path(self.get("HF_TOKEN_PATH", "/dev/null"))
        try:
            open_to_others = path.is_file() and path.stat().st_mode & 0o077
        except OSError as error:
            return [f"HF_TOKEN_PATH={path}: {error.strerror}"]
        mend = f"chmod 600 {path}"
        return [f"HF_TOKEN_PATH={path}: readable by others; {mend}"] if open_to_others else []

    def time_problems(self, stage: str) -> list[str]:
        """Tell whether a stage's time limit leaves nothing before its signal."""
        lines, file = header(stage), f"slurm/{stage}.sbatch"
        limit = self.get("SBATCH_TIMELIMIT", lines.get("time", ""))
        signal = self.get("SBATCH_SIGNAL", lines.get("signal", ""))
        try:
            lead = int(signal.partition("@")[2] or "60")
            if limit_seconds(limit) > lead:
                return []
        except ValueError:
            return [f"{file}: --time={limit} --signal={signal}: not as man sbatch has them"]
        return [
            f"{file}: --time={limit} is not more than the {lead} s of --signal={signal}: it would "
            "leave as soon as it starts; give more time (SBATCH_TIMELIMIT=…), or a shorter lead "
            "(SBATCH_SIGNAL=USR1@…)"
        ]


def header(stage: str) -> dict[str, str]:
    """Read {option: value} from a stage's #SBATCH lines."""
    text = (ROOT / f"slurm/{stage}.sbatch").read_text(encoding="utf-8")
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", text, re.M))


def limit_seconds(limit: str) -> float:
    """Convert a time limit of Slurm (man sbatch, --time) to seconds; 0 means none: infinity.

    Raises ValueError for what sbatch would not take.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, rest = limit.rpartition("-")
    if not re.fullmatch(r"\d+(:\d+){0,2}", rest) or (dash and not days.isdecimal()):
        raise ValueError(limit)
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, (minutes, secs) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs or float("inf")
