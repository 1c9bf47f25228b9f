"""Child processes: that none outlives its parent, and how one ended. Standard library only."""

from __future__ import annotations

import ctypes
import re
import signal
from pathlib import Path


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel for a signal to this process when its parent dies (prctl(2), PR_SET_PDEATHSIG = 1):
    torchrun starts ranks in sessions of their own, so a killed parent otherwise leaves writers behind."""
    ctypes.CDLL(None).prctl(1, number)


def below_a_stage() -> None:
    """Before a stage's child starts: it dies with the stage, and SIGUSR1 is the stage's alone. Slurm sends a step's
    signal to every process in it, and SIGUSR1 ends one that does not expect it; what is ignored stays so below."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    die_with_parent()


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a file, terminal colours and carriage returns removed."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(line.split("\r")[-1] for line in text.splitlines()[-lines:])


def how_it_ended(code: int) -> str:
    """A child's return code in words; negative: the signal that killed it."""
    if code >= 0:
        return f"exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"
