"""Why the ranks of an attempt have failed: what they left, where they stand, a full disk."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shutil
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import Any, Optional

ASKED = signal.SIGUSR2  # a rank that gets it writes down where each of its threads stands
ANSWER_SECONDS = 8.0  # for ranks to answer: on other nodes after a beat and a half
LONG = 600.0  # seconds without a step that are never a hang, however short steps are
UNMEASURED = 3600.0  # the same before steps were seen, and while a rank saves or evaluates
STEPS = 10  # times the longest step up to now


def patience(gaps: list[float], measured: bool, site: float) -> float:
    """Return for how many seconds no step may come, after steps that took `gaps`. Saves and
    evaluations between two steps are among them; `measured` says that none is under way that could
    be the first. A site may say it: `site`, 0 where it does not."""
    longest = max(gaps, default=0.0)
    least = LONG if measured and len(gaps) >= 3 else UNMEASURED
    return site or max(least, STEPS * longest)


def errors(directory: Path, attempt: int) -> list[dict[str, Any]]:
    """Return what failed ranks of an attempt left, first failure first."""
    found = directory.glob(f"logs/error-{attempt}-*.json")
    return sorted((json.loads(p.read_text()) for p in found), key=lambda e: e["time"])


def full_disk(directory: Path) -> str:
    """Return a sentence if there is no space left, else "": tools say it in many ways, torch with
    "unexpected pos"."""
    free = shutil.disk_usage(directory).free
    if free > 32 << 20:
        return ""
    mend = "free some, then the same command goes on"
    return f"\n{directory}: no space left ({free >> 20} MiB): {mend}"


# --- where ranks stand


def _file(directory: Path, attempt: int, rank: int) -> Path:
    return directory / "logs" / f"stacks-{attempt}-{rank}.txt"


def answer_with_stacks(directory: Path, attempt: int, rank: int) -> None:
    """Make this process, a rank, answer ASKED in logs/stacks-<attempt>-<rank>.txt: also while it
    waits in a library that does not return to Python. Raises OSError."""
    file = open(_file(directory, attempt, rank), "w", encoding="utf-8")  # noqa: SIM115  it stays
    file.write(f"rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
    file.flush()
    faulthandler.register(ASKED, file=file, all_threads=True)


def remove_unasked(directory: Path, attempt: int) -> None:
    """Remove the files of ranks that nobody has asked."""
    if not any(len(text.splitlines()) > 1 for text in stacks(directory, attempt).values()):
        for file in directory.glob(f"logs/stacks-{attempt}-*.txt"):
            file.unlink(missing_ok=True)


def stacks(directory: Path, attempt: int) -> dict[int, str]:
    """Return what the ranks of an attempt have answered, with their first line, by rank."""
    found = directory.glob(f"logs/stacks-{attempt}-*.txt")
    return {int(p.stem.rpartition("-")[2]): p.read_text(errors="replace") for p in found}


def who_hangs(answers: dict[int, str]) -> str:
    """Say which ranks hold the others up: those that do not answer, else those that stand where the
    fewest stand. In a collective all others wait in one place."""
    names = {rank: text.partition("\n")[0] for rank, text in sorted(answers.items())}
    places = {rank: _place(answers[rank]) for rank in names}
    silent = [names[rank] for rank, place in places.items() if place is None]
    if silent:
        return f"{'; '.join(silent)}: no answer: stopped, or held by the kernel or a device"
    if not places:
        return "no rank has answered"
    count = Counter(places.values())
    (most, _), fewest = count.most_common(1)[0], count.most_common()[-1][1]
    apart = [rank for rank, place in places.items() if count[place] == fewest]
    if len(count) == 1:
        return f"all ranks stand at {most}"
    if len(count) == 2 and fewest == len(places) / 2:
        apart = list(places)  # two halves: neither is the one that waits
    return "; ".join(f"{names[rank]}: at {places[rank]}" for rank in apart)


def _place(answer: str) -> Optional[str]:
    """Return where the main thread of a rank stands: the innermost line of Python in it, as the
    newest answer says; None without an answer."""
    threads = re.split(r"^(?:Current thread|Thread) .*\n", answer, flags=re.M)[1:]
    main = [text for text in threads if "in <module>" in text or "_run_code" in text] or threads
    if not main:
        return None
    found = re.search(r'File "([^"]+)", line (\d+) in (\S+)', main[-1])
    return f"{found[1]}:{found[2]} in {found[3]}" if found else "no line of Python"
