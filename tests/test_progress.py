"""What ranks tell their stage script, and the line that it shows."""

import io
import sys

import pytest

from scripts.job import progress
from scripts.job.progress import Progress, heard, percent, tell

STEP = '@relay {"step": 1, "total": 40}'


@pytest.mark.parametrize(
    "line",
    [
        STEP + "\n",
        f"[default0]:{STEP}\n",
        # behind a progress bar, which ends in no newline
        f"[default1]: 40%|####  [default0]:{STEP}\n",
        f"[default0]:{STEP}[default1]: 2%|#\n",  # another rank's output came before its newline
    ],
)
def test_a_report_is_heard_whatever_stands_around_it(line):
    assert heard(line) == {"step": 1, "total": 40}


@pytest.mark.parametrize(
    "line", ["loss 1.0\n", "", "@relay \n", STEP[:-3], STEP[:20] + "[default1]: 2%|#\n"]
)
def test_anything_else_is_not(line):
    assert heard(line) is None


def test_a_report_is_one_write(monkeypatch):
    """Of two writes torchrun could pass on the first, and another rank's output before the
    newline."""
    written = []

    class Stream(io.StringIO):
        def write(self, text):
            written.append(text)

    monkeypatch.setattr(sys, "stdout", Stream())
    tell(step=1, total=40)
    assert written == [STEP + "\n"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "Running loglikelihood requests:  40%|####      | 4/10\n",
            "running loglikelihood requests 40 %",
        ),
        ("[default0]:Packing dataset: 100%|##########| 3/3\n", "packing dataset 100 %"),
        ("  7%|7         | 1/14\n", "7 %"),
        ("loss fell by 40% | fine\n", ""),
        ("", ""),
    ],
)
def test_a_progress_bar_of_upstream(line, said):
    assert percent(line) == said


class Terminal(io.StringIO):
    def __init__(self, tty: bool):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


@pytest.fixture
def stdout(monkeypatch):
    """Make stdout a terminal or a file, and the clock one that stands until it is moved."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def make(tty: bool):
        stream = Terminal(tty)
        monkeypatch.setattr(sys, "stdout", stream)

        def move(seconds: float) -> None:
            now[0] += seconds

        return stream, move

    return make


def test_a_terminal_shows_the_phase_each_second(stdout):
    stream, move = stdout(True)
    shown = Progress("evaluate")
    shown.enter("loads the model")
    move(12)
    shown.tick()
    assert stream.getvalue().rstrip() == "\r  evaluate: loads the model, 12 s".rstrip()
    shown.hint("Running requests:  40%|####  | 4/10\n")
    move(1)
    shown.tick()
    assert stream.getvalue().split("\r")[-1].strip() == (
        "evaluate: loads the model, running requests 40 %, 13 s"
    )
    shown.show({"step": 1, "total": 4})
    before = stream.getvalue()
    move(60)
    shown.tick()
    assert stream.getvalue() == before, "steps are shown now"
    shown.end()
    assert stream.getvalue().endswith("\n")


def test_a_log_file_gets_a_line_every_half_minute(stdout):
    stream, move = stdout(False)
    shown = Progress("evaluate")
    shown.enter("loads the model")
    for _ in range(95):
        move(1)
        shown.tick()
    assert stream.getvalue() == "".join(
        f"  evaluate: loads the model, {seconds} s\n" for seconds in (30, 60, 90)
    )
    shown.enter("")
    move(300)
    shown.tick()
    assert stream.getvalue().count("\n") == 3, "a service that answers writes none"


def test_another_node_shows_sentences_alone(stdout):
    stream, _ = stdout(False)
    shown = Progress("pretrain", quiet=True)
    shown.show({"step": 1, "total": 4})
    shown.say("goes on from its checkpoint of step 8")
    assert stream.getvalue() == "  pretrain: goes on from its checkpoint of step 8\n"
