"""What ranks tell their stage script, and the one line that a running stage shows of it."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Optional

from scripts.run import attempts

MARK = "@relay "  # a rank's line for its stage script; all else is upstream's own output
IN_A_LOG = 30.0  # seconds between two lines where stdout is a file
# tqdm's bar: "Running requests:  40%|####      | 4/10"
BAR = re.compile(r"(?:([A-Za-z][\w ]{0,40}):)?\s+(\d{1,3})%\|")


def tell(**said: object) -> None:
    """Tell the stage script something, in one write: torchrun passes on what a rank's file holds
    at that moment, and of two writes another rank's output could come between."""
    sys.stdout.write(MARK + json.dumps(said) + "\n")
    sys.stdout.flush()


def heard(line: str) -> Optional[dict[str, Any]]:
    """Read what a rank told in a line of output; None if it is upstream's own output.

    The mark may stand anywhere in the line: torchrun copies the files of several ranks into one
    pipe, and progress bars end in no newline.
    """
    mark = line.find(MARK)
    try:
        return json.JSONDecoder().raw_decode(line, mark + len(MARK))[0] if mark >= 0 else None
    except ValueError:  # cut by another rank's output
        return None


def percent(line: str) -> str:
    """Read a tqdm bar in a line of upstream's output: "running requests 40 %", "" without one."""
    found = BAR.search(line)
    return f"{found[1] or ''} {found[2]} %".strip().lower() if found else ""


class Progress:
    """Show one line: a phase with its seconds, or steps with loss, speed and time left.

    On a terminal the line is rewritten; in a log file a new line comes now and then. tick() is
    called each second by another thread than show(), so a lock guards what both change.
    """

    def __init__(self, name: str, quiet: bool = False):
        self.name, self.quiet = name, quiet  # quiet: sentences alone; another node shows the line
        self.lock = threading.RLock()
        self.phase, self.since, self.detail = "", 0.0, ""
        self.shown = time.monotonic()  # when a line was printed last
        self.first: Optional[tuple[float, float]] = None  # time and number of the first step
        self.line_is_open = False
        self.line = ""  # the newest

    def enter(self, phase: str) -> None:
        """Show this phase and its seconds from now on; "" shows none until the next report."""
        with self.lock:
            self.phase, self.since, self.detail = phase, time.monotonic(), ""

    def hint(self, line: str) -> None:
        """Take how far the phase is from a progress bar in upstream's output."""
        if self.phase and (found := percent(line)):
            self.detail = f", {found}"

    def tick(self) -> None:
        """Show how long the phase lasts, if one is on. The parent calls it each second; where
        output is no terminal, only one call in IN_A_LOG seconds prints."""
        with self.lock:
            now, terminal = time.monotonic(), sys.stdout.isatty()
            if not self.phase or (not terminal and now - self.shown < IN_A_LOG):
                return
            self._show(f"  {self.name}: {self.phase}{self.detail}, {now - self.since:.0f} s")

    def show(self, numbers: Mapping[str, Any]) -> None:
        """Show {"step", "total"} and, if known, "loss" or "reward", and "tokens_per_second"."""
        with self.lock:
            self.phase = ""
            now, step, total = time.monotonic(), numbers["step"], numbers["total"]
            between = 0.2 if sys.stdout.isatty() else 10
            if self.first and now - self.shown < between and step < total:
                return
            self.first = self.first or (now, step)
            began, since = self.first
            rate = (step - since) / (now - began) if now > began else 0
            line = f"  {self.name} {step:.0f}/{total:.0f}"
            line += f"  {learned}" if (learned := attempts.learned(numbers)) else ""
            if "tokens_per_second" in numbers:
                line += f"  {numbers['tokens_per_second']:,.0f} tokens/s"
            line += f"  {(total - step) / rate:.0f} s left" if rate else ""
            if line != self.line:  # the last step is told once more where training ends
                self._show(line)

    def say(self, sentence: str) -> None:
        """Show a sentence that stays."""
        with self.lock:
            line = f"  {self.name}: {sentence}"
            self._print(f"\r{line:<78}" if self.line_is_open else line)
            self.line_is_open = False

    def end(self) -> None:
        """Close the line, so that the next output begins its own."""
        with self.lock:
            self.phase = ""
            if self.line_is_open:
                self._print("")
            self.line_is_open = False

    def _show(self, line: str) -> None:
        if self.quiet:
            return
        self.shown, self.line = time.monotonic(), line
        self.line_is_open = sys.stdout.isatty()
        if self.line_is_open:
            self._print(f"\r{line:<78}", end="")
        else:
            self._print(line)

    @staticmethod
    def _print(text: str, end: str = "\n") -> None:
        # The terminal may be gone, or its reader: that must not end the stage.
        with contextlib.suppress(OSError):
            print(text, end=end, flush=True)
