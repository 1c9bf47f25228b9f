"""What ranks tell their stage script through torchrun, which tears and mixes their lines."""

import io
import sys

import pytest

from scripts.job.progress import heard, tell

STEP = '@relay {"step": 1, "total": 40}'


@pytest.mark.parametrize(
    "line",
    [
        STEP + "\n",
        f"[default0]:{STEP}\n",
        f"[default1]: 40%|####  [default0]:{STEP}\n",  # behind a progress bar, which ends in no newline
        f"[default0]:{STEP}[default1]: 2%|#\n",  # another rank's output came before its newline
    ],
)
def test_a_report_is_heard_whatever_stands_around_it(line):
    assert heard(line) == {"step": 1, "total": 40}


@pytest.mark.parametrize("line", ["loss 1.0\n", "", "@relay \n", STEP[:-3], STEP[:20] + "[default1]: 2%|#\n"])
def test_anything_else_is_not(line):
    assert heard(line) is None


def test_a_report_is_one_write(monkeypatch):
    """Of two writes torchrun could pass on the first, and another rank's output before the newline."""
    written = []

    class Stream(io.StringIO):
        def write(self, text):
            written.append(text)

    monkeypatch.setattr(sys, "stdout", Stream())
    tell(step=1, total=40)
    assert written == [STEP + "\n"]
