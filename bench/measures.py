"""What finished runs left behind: lm-eval's logged samples and their statistics, loss curves.

Benches and tests read it here; nothing in bench imports tests.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from scripts.run import layout, stages

ROOT, STAGES, TRAINED = layout.ROOT, stages.line(), stages.trained()
RUNS = Path(os.environ.get("RUNS") or ROOT / "runs")  # the folder of all runs, read once


def stage_dir(run: str, stage: str) -> Path:
    """Return the directory of one stage of a run."""
    return RUNS / run / stage


def quiet(words: list[str], env: dict[str, str] | None = None, cwd: Path = ROOT) -> float:
    """Return the seconds that a command took; its output is shown only if it fails."""
    began = time.monotonic()
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return time.monotonic() - began


def samples(folder, task):
    """Return the rows that lm-eval logged for a task below a folder of an evaluate stage (results,
    before/<stage>), by document order."""
    file = max(folder.rglob(f"samples_{task}_2*.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def mean_and_error(values):
    """Return the mean and its standard error."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def paired_t(before, after):
    """Return t of the differences after − before."""
    mean, error = mean_and_error([b - a for a, b in zip(before, after)])
    return mean / error


def mcnemar_p(before, after):
    """Return p of the two-sided exact McNemar test on paired 0/1 outcomes: binomial on the
    discordant pairs."""
    gained = sum(a < b for a, b in zip(before, after))
    lost = sum(a > b for a, b in zip(before, after))
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def metric(folder, task, name):
    """Return a task's per-item values of one metric below a folder of an evaluate stage."""
    return [row[name] for row in samples(folder, task)]


def loss_curve(folder: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of every logged step of a stage, from its metrics/attempt-<n>/.

    A later attempt's value wins."""
    return sorted({step: loss for step, loss, _ in _logged(folder)}.items())


def step_times(folder: Path) -> list[tuple[int, float]]:
    """Return (step, seconds since the epoch when it was logged), as loss_curve."""
    return sorted({step: when for step, _, when in _logged(folder)}.items())


def _logged(folder: Path) -> list[tuple[int, float, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    def attempt(path: Path) -> int:  # not the time in the name: clocks can go back
        return int(path.relative_to(folder).parts[0].partition("-")[2])

    found = []
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=attempt):
        events = EventAccumulator(
            str(file), {"scalars": 0, "tensors": 0}
        ).Reload()  # 0: every step, not a sample
        tags = events.Tags()
        for tag in {"loss", "loss_metrics/global_avg_loss"}.intersection(tags["scalars"]):
            found += [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)]
        for tag in {"loss"}.intersection(tags["tensors"]):  # torchtune's writer
            found += [
                (e.step, make_ndarray(e.tensor_proto).item(), e.wall_time)
                for e in events.Tensors(tag)
            ]
    return found
