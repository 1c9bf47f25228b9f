"""Processes as /proc shows them: what is below one, what it was started with, how much memory it
holds."""

import contextlib
import re
from pathlib import Path

PROC = Path("/proc")


def below(root: int) -> list[int]:
    """Return the pids of all descendants of a process."""
    children: dict[int, list[int]] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [root]
    while todo:
        new = children.get(todo.pop(), [])
        found += new
        todo += new
    return found


def environment(pid: int) -> dict[str, str]:
    """Return what a process was started with; empty once it is gone or where it may not be read."""
    with contextlib.suppress(OSError):
        lines = (PROC / str(pid) / "environ").read_text(errors="replace").split("\0")
        return dict(line.split("=", 1) for line in lines if "=" in line)
    return {}


def words(pid: int) -> list[str]:
    """Return the command line of a process; empty once it is gone."""
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")
    return []


def all_pids() -> list[int]:
    """Return every pid of this machine."""
    return [int(process.name) for process in PROC.glob("[0-9]*")]


def memory(root: int) -> int:
    """Return the bytes that a process and all below it hold; shared pages count once (Pss)."""
    total = 0
    for pid in (root, *below(root)):
        with contextlib.suppress(OSError, AttributeError):
            rollup = (PROC / str(pid) / "smaps_rollup").read_text()
            total += int(re.search(r"^Pss:\s+(\d+)", rollup, re.M).group(1)) * 1024
    return total
