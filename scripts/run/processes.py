"""Processes: none outlives its parent, one is told from another, and how one ended."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path
from typing import Optional

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when its parent dies: torchrun starts ranks in
    sessions of their own, so a killed parent otherwise leaves writers behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def bound(
    command: list[str], number: signal.Signals, ignored: Optional[signal.Signals] = None
) -> list[str]:
    """Return the command that starts `command` bound to this process: it gets signal `number`
    when this process dies, and ignores `ignored`, as all below it do.

    A command of its own sets this up and then becomes `command`: between fork and exec of a
    process with threads, Python code (preexec_fn) may wait for a lock that nobody holds.
    """
    words = [str(os.getpid()), str(int(number)), str(int(ignored or 0))]
    return [sys.executable, "-I", "-S", __file__, *words, *command]


def process_start(pid: int) -> Optional[str]:
    """Return the kernel's start time of a process in clock ticks since boot (proc(5), field 22);
    None if it is gone. With the pid it names one process: a reused pid starts later."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def boot_id() -> str:
    """Name this boot of this machine: after a reboot no recorded process can be alive."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def tail(path: Path, lines: int = 25) -> str:
    """Return the last lines of a file without terminal colours and carriage returns."""
    text = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return "\n".join(line.split("\r")[-1] for line in text.splitlines()[-lines:])


def how_it_ended(code: int) -> str:
    """Say a child's return code in words; negative: the signal that killed it."""
    if code >= 0:
        return f"exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def _become(parent: int, number: int, ignored: int, command: list[str]) -> None:
    """Bind this process to its parent, then become the command."""
    if ignored:
        signal.signal(ignored, signal.SIG_IGN)
    die_with_parent(signal.Signals(number))
    if os.getppid() != parent:
        sys.exit(f"{command[0]}: its parent died while it was started")
    os.execvp(command[0], command)  # noqa: S606  a list of words of our own


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
