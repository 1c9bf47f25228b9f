"""The few statistics by which a model is said to have learned something, on lm-eval's logged samples."""

import json
import math


def samples(evaluation, task):
    """Rows that lm-eval logged for a task of an evaluate stage, by document order."""
    file = max((evaluation / "results").rglob(f"samples_{task}_2*.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def mean_and_error(values):
    """Mean and its standard error."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def paired_t(before, after):
    """t of the differences after − before."""
    mean, error = mean_and_error([b - a for a, b in zip(before, after)])
    return mean / error


def mcnemar_p(before, after):
    """Two-sided exact McNemar test on paired 0/1 outcomes: binomial on the discordant pairs."""
    gained = sum(a < b for a, b in zip(before, after))
    lost = sum(a > b for a, b in zip(before, after))
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def metric(evaluation, task, name):
    """A task's per-item values of one metric."""
    return [row[name] for row in samples(evaluation, task)]
