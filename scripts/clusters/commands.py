"""Run the programs of a cluster: sbatch, squeue, bash and their like."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from scripts.run.layout import ROOT


def ask(
    *words: str, environment: Mapping[str, str], timeout: float = 30, given: bytes = b""
) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository, with `given` as its input; return its end. Never raises:
    what went wrong is in its stderr, with return code 127 if the program is missing and 124 after
    `timeout` seconds."""
    try:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=dict(environment),
            capture_output=True,
            timeout=timeout,
            input=given,
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        return subprocess.CompletedProcess(words, done.returncode, out, err)
    except FileNotFoundError:
        said = f"{words[0]}: not on PATH; is this a login node of the cluster?"
        return subprocess.CompletedProcess(words, 127, "", said)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"no answer in {timeout:.0f} s")
