"""The launcher and make as a user calls them, and what a refusal must look like."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.runs import ROOT

KEPT = ("PATH", "HOME", "RUNS", "OMP_NUM_THREADS", "SLURM_CONF")


def launch(
    verb: str, *, checkout: Path = ROOT, environment: dict[str, str] | None = None, **options: str
) -> subprocess.CompletedProcess:
    """Call the launcher as make does, on an environment of nothing but `options` and what every
    shell has."""
    if environment is None:
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    words = [sys.executable, "-m", "scripts.launch", verb]
    env = {**environment, **options}
    return subprocess.run(words, cwd=checkout, env=env, capture_output=True, text=True)


def call_make(*targets: str, timeout: int = 1200, **options: str) -> subprocess.CompletedProcess:
    """Call make and return how it ended."""
    words = ["make", "-s", *targets, *(f"{k}={v}" for k, v in options.items())]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def make(*targets: str, **options: str) -> subprocess.CompletedProcess:
    """Call make; fail the test with what it said where it fails."""
    result = call_make(*targets, **options)
    assert result.returncode == 0, f"{result.args} failed:\n{said(result)}"
    return result


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> str:
    """Check that a command refused its input: exit 64 (make says so as Error 64), no traceback,
    every one of `words` in what it said. Returns that."""
    by_make = result.returncode == 2 and "Error 64" in result.stderr
    assert result.returncode == 64 or by_make, (
        f"{result.args} must refuse this with exit 64, not end with {result.returncode}:\n"
        f"{said(result)}"
    )
    assert "Traceback" not in result.stderr, f"a refusal must not show a traceback:\n{said(result)}"
    missing = [word for word in words if word not in result.stderr]
    assert not missing, f"the refusal does not say {missing}:\n{said(result)}"
    return result.stderr


def said(result: subprocess.CompletedProcess) -> str:
    """Return the end of what a command printed, its errors last."""
    return f"{(result.stdout or '')[-4000:]}\n{(result.stderr or '')[-6000:]}"
