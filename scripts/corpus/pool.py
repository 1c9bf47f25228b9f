"""One pass over the units, on all cores; of several nodes each takes every n-th unit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from scripts.corpus import filters, passes, writer
from scripts.corpus.passes import Work
from scripts.run.errors import InputError
from scripts.run.processes import die_with_parent

SMALL = 8 << 20  # bytes of input that one process reads sooner than two are started
PASSES: dict[str, tuple[str, Callable[[Work, int], None]]] = {
    "look": ("reads the rows", passes.look),
    "sift": ("filters the texts", filters.sift),
    "match": ("looks for near-duplicates", filters.match),
    "collect": ("collects what is held out", passes.collect),
    "compare": ("looks for held-out text in training rows", passes.compare),
    "write": ("writes the sets", writer.write),
}
Show = Callable[[str, str], None]  # shows a phase, and how far it is


def run_pass(name: str, work: Work, show: Show, node: int = 0, nodes: int = 1) -> None:
    """Run one pass over every unit of this node that it has not finished. Raises what a process
    raises, InputError for rows that were not understood."""
    phase, function = PASSES[name]
    # A node asks after its own units alone: NFS remembers a "not there" of the others for a minute.
    left = [n for n in range(node, len(work.units), nodes) if not work.done(name, n)]
    sizes = {n: size(work, n) for n in left}
    began, done = time.monotonic(), 0
    share = f"on this of {nodes} nodes, " if nodes > 1 else ""
    show(phase, "")
    for number in _each(function, work, sizes):
        if name == "look":
            _refuse_bad_rows(work, number)
        done += sizes[number]
        rate = done / max(time.monotonic() - began, 1e-9)
        seconds = (sum(sizes.values()) - done) / max(rate, 1)
        said = f"{share}{done / 1e6:,.0f} of {sum(sizes.values()) / 1e6:,.0f} MB"
        show(phase, f"{said}, {rate / 1e6:,.1f} MB/s, {seconds:.0f} s left")


def size(work: Work, number: int) -> int:
    """Return a unit's bytes, roughly."""
    unit = work.units[number]
    if unit.end and unit.file.format != "parquet":
        return unit.end - unit.start
    return unit.file.path.stat().st_size if unit.file.path.exists() else 1


def _each(function: Any, work: Work, sizes: dict[int, int]) -> Iterator[int]:
    """Call a pass for units, on every core; yield each unit's number when it is finished."""
    cores = min(len(os.sched_getaffinity(0)), len(sizes))
    if cores < 2 or sum(sizes.values()) < SMALL:
        for number in sizes:
            function(work, number)
            yield number
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores, _begin_worker) as pool:
        jobs = [(function, work, number) for number in sizes]
        yield from pool.imap_unordered(_call, jobs)


def _refuse_bad_rows(work: Work, number: int) -> None:
    """Raise InputError naming the rows of a unit that were not understood, unless the recipe drops
    them."""
    report = work.report("look", number)
    if work.recipe.bad_rows == "drop" or not report["bad"]:
        return
    more = report["bad_rows"] - len(report["bad"])
    rest = [f"… and {more} more in this part"] if more else []
    mend = "mend them, or ARGS=bad_rows=drop to leave such rows out, counted"
    raise InputError([*report["bad"], *rest, mend])


def _begin_worker() -> None:
    """Make a worker one thread that dies with the stage."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # tokenizers': the workers are as many as the cores
    for number in (signal.SIGINT, signal.SIGUSR1):  # a terminal and Slurm send them to all
        signal.signal(number, signal.SIG_IGN)  # the stage ends its workers, by SIGTERM
    die_with_parent()


def _call(job: tuple[Any, Work, int]) -> int:
    function, work, number = job
    function(work, number)
    return number
