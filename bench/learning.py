"""What the demo's settings learn, over seeds, with the controls: the tables and the picture of
docs/demo.md.

    make data RUN=demo && .venv/bin/python -m bench.learning 0 1 2

It takes about six minutes a seed on two cores.

Runs are named seed-<n>-…; finished stages are not run again, so an interrupted bench goes on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.measures import (
    ROOT,
    TRAINED,
    loss_curve,
    mcnemar_p,
    mean_and_error,
    metric,
    paired_t,
    stage_dir,
)

TASKS = "--tasks relay_text,relay_choice,relay_choice_shuffled,relay_preference"


def make(target: str, run: str, **options: str) -> None:
    """Run one make target; its output is not shown unless it fails."""
    options = {"DATA": str(stage_dir("demo", "data")), **options}
    words = ["make", "-s", target, f"RUN={run}", *(f"{k}={v}" for k, v in options.items())]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ})


def evaluate(run: str, model: Path) -> dict:
    """Return per-item outcomes and bits per byte of one model on every task."""
    make("evaluate", run, FROM=str(model), ARGS=TASKS)
    evaluation = stage_dir(run, "evaluate")
    results = evaluation / "results"
    return {
        "bits": json.loads((evaluation / "verdict.json").read_text())["scores"][
            "relay_text/bits_per_byte"
        ],
        "choice": metric(results, "relay_choice", "acc_mutual_info"),
        "plain": metric(results, "relay_choice", "acc"),
        "shuffled": metric(results, "relay_choice_shuffled", "acc_mutual_info"),
        "margin": metric(results, "relay_preference", "margin"),
    }


def seed_rows(seed: str) -> list[str]:
    """Return the Markdown rows of one seed: the model untrained and after each stage."""
    run = f"seed-{seed}"
    make(
        "pretrain",
        f"{run}-untrained",
        ARGS=f"--debug.seed {seed} --training.steps 1 --optimizer.lr 0",
    )
    make("pretrain", run, ARGS=f"--debug.seed {seed}")
    make("finetune", run, ARGS=f"seed={seed}")
    make("align", run, ARGS=f"seed={seed}")
    models = {"untrained": stage_dir(f"{run}-untrained", "pretrain") / "model"}
    models |= {stage: stage_dir(run, stage) / "model" for stage in TRAINED}
    found = {name: evaluate(f"{run}-after-{name}", model) for name, model in models.items()}
    rows = []
    for name, values in found.items():
        cells = [
            f"{m:.3f} ± {e:.3f}"
            for m, e in (mean_and_error(values[k]) for k in ("choice", "plain", "shuffled"))
        ]
        margin, error = mean_and_error(values["margin"])
        note = ""
        if name == "finetune":
            p = mcnemar_p(found["pretrain"]["choice"], values["choice"])
            note = f"McNemar against pretrain: p = {p:.1g}"
        if name == "align":
            t = paired_t(found["finetune"]["margin"], values["margin"])
            note = f"margin against finetune: paired t = {t:.1f}"
        cells = [seed, name, f"{values['bits']:.3f}", *cells, f"{margin:.2f} ± {error:.2f}", note]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def picture(seeds: list[str], path: Path) -> None:
    """Draw the pretraining loss curves of all seeds as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "demo"  # the same curves give the same file
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for seed in seeds:
        points = loss_curve(stage_dir(f"seed-{seed}", "pretrain") / "metrics")
        axes.plot(*zip(*points), label=f"seed {seed}", linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Pretraining")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    seeds = sys.argv[1:] or ["0", "1", "2"]
    print(
        "| seed | after | bits per byte | choice (mutual information) | choice (plain) "
        "| shuffled questions | margin, nats | |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for seed in seeds:
        print("\n".join(seed_rows(seed)), flush=True)
    picture(seeds, ROOT / "docs" / "demo-loss.svg")
