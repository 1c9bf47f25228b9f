"""Waiting in tests, with a limit, and with what there is to say when it was reached."""

import time
from typing import Callable


def until(condition: Callable, seconds: float = 120, told: Callable[[], str] = str):
    """Wait for something to be true; returns it. `told` says what the failure shows."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{seconds} s, and it did not come to that:\n{told()}")
        time.sleep(0.2)
    return found
