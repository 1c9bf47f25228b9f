"""What a rank tells its stage script, and the one line that a running stage shows of it on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time

MARK = "@relay "  # a rank's line for its stage script; everything else is upstream's own output


def tell(**said: object) -> None:
    """Say something to the stage script. In one write: torchrun passes on what a file holds at that moment, and another
    rank's output would follow a line without its end."""
    sys.stdout.write(MARK + json.dumps(said) + "\n")
    sys.stdout.flush()


def heard(line: str) -> dict | None:
    """What a rank has told in a line of a stage's output; None if it is upstream's own. Whatever stands around it is
    passed over: torchrun copies the files of several ranks into one pipe, and progress bars end in no newline."""
    mark = line.find(MARK)
    try:
        return json.JSONDecoder().raw_decode(line, mark + len(MARK))[0] if mark >= 0 else None
    except ValueError:  # torn in the middle
        return None


class Progress:
    """One line on the terminal: what is done, how fast, how long still. A new line now and then in a log file."""

    def __init__(self, name: str):
        self.name, self.shown, self.first = name, float("-inf"), None

    def __call__(self, numbers: dict) -> None:
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if "total" not in numbers or (now - self.shown < (0.2 if terminal else 10) and numbers["step"] < numbers["total"]):
            return
        self.shown = now
        self.first = self.first or (now, numbers["step"])
        rate = (numbers["step"] - self.first[1]) / (now - self.first[0]) if now > self.first[0] else 0
        left = f"  {(numbers['total'] - numbers['step']) / rate:.0f} s left" if rate else ""
        loss = f"  loss {numbers['loss']:.3f}" if "loss" in numbers else ""
        speed = f"  {numbers['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in numbers else ""
        line = f"  {self.name} {numbers['step']:.0f}/{numbers['total']:.0f}{loss}{speed}{left}"
        self._print(f"\r{line:<78}" if terminal else line, end="" if terminal else "\n")

    def line(self, sentence: str) -> None:
        """Show a sentence that stays."""
        self._print(f"\r  {self.name}: {sentence}")

    def end(self) -> None:
        if self.first and sys.stdout.isatty():
            self._print("")

    @staticmethod
    def _print(text: str, end: str = "\n") -> None:
        with contextlib.suppress(OSError):  # the terminal is gone, or its reader: that must not end the stage
            print(text, end=end, flush=True)
