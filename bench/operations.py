"""What the line costs beside its work: the tables of docs/benchmarks.md. Ratios within one run;
machines are noisy.

    make demo && .venv/bin/python -m bench.operations demo overhead saves restart serving

Every table reads or copies the finished run "demo", which must be served for `serving`. `slurm`
needs a Slurm instead: bench/slurm_pipeline.py.
"""

import inspect
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from bench.measures import ROOT, RUNS, STAGES, TRAINED, quiet, stage_dir, step_times
from bench.slurm_pipeline import slurm
from scripts.job.rank import Rank
from scripts.run import attempts, files

DEMO = RUNS / "demo"
ROUNDS = int(os.environ.get("ROUNDS", "2"))
SET = {"finetune": "sft", "align": "preference"}


def options(stage: str) -> list[str]:
    """Return the options that run a stage of the demo again, in a run of its own."""
    facts = files.read_env(DEMO / stage / "stage.env")
    source = [f"FROM={facts['FROM']}"] if "FROM" in facts else []
    return [f"DATA={DEMO / 'data'}", *source]


def work_seconds(stage: str) -> float:
    """Return the seconds of a stage's own work: the steps of a training, lm-eval's evaluation after
    its imports, all of data's."""
    directory = DEMO / stage
    if stage in TRAINED:
        steps = step_times(directory / "metrics")
        return (steps[-1][1] - steps[0][1]) * steps[-1][0] / (steps[-1][0] - steps[0][0])
    if stage == "evaluate":
        results = json.loads(next(directory.rglob("results_*.json")).read_text())
        return float(results["total_evaluation_time_seconds"])
    return attempts.history(directory)[-1]["seconds"] if stage == "data" else 0.0


def demo() -> None:
    """Work and all else, for each stage of the finished demo."""
    print("| stage | seconds | of it work | start-up and glue |\n|---|---|---|---|")
    walls, works = [], []
    for stage in STAGES:
        wall = (
            json.loads((DEMO / stage / "server.json").read_text())["ready_seconds"]
            if stage == "deploy"
            else None
        )
        walls.append(wall or attempts.history(DEMO / stage)[-1]["seconds"])
        works.append(work_seconds(stage))
        print(f"| {stage} | {walls[-1]:.0f} | {works[-1]:.0f} | {1 - works[-1] / walls[-1]:.0%} |")
    print(f"| all | {sum(walls):.0f} | {sum(works):.0f} | {1 - sum(works) / sum(walls):.0%} |")


BARE_PRETRAIN = """
import sys
from pathlib import Path
directory = Path(sys.argv.pop(1))  # before torchtitan is imported, which reads the arguments then
from scripts.tools import patches
patches.torchtitan_on_cpu()
patches.checkpoints_without_collectives()
from scripts.tools import torchtitan
from scripts.job.rank import Rank
torchtitan._register(Rank(directory))
from torchtitan.train import Trainer, main
main(Trainer)
"""


def bare_command(stage: str, folder: Path) -> tuple[list[str], dict[str, str], Path]:
    """Return how the upstream tool alone does a stage's work: command, environment, working
    directory."""
    os.environ["RELAY_ATTEMPT"] = "1"
    rank, python = Rank(DEMO / stage), sys.executable
    one = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    one |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if stage == "pretrain":
        from scripts.tools.torchtitan import overrides

        words = [
            python,
            "-c",
            BARE_PRETRAIN,
            str(rank.directory),
            "--job.config_file",
            str(rank.config),
            *overrides(rank),
        ]
        return [*words, "--job.dump_folder", str(folder)], one, ROOT
    if stage == "evaluate":
        words = [
            python,
            "-m",
            "lm_eval",
            "run",
            "--config",
            str(rank.config),
            "--include_path",
            str(rank.directory / "tasks"),
        ]
        words += [
            "--model_args",
            f"pretrained={rank.path('FROM')},dtype=float32",
            "--output_path",
            str(folder),
            "--log_samples",
        ]
        return (
            words,
            {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
            rank.path("DATA"),
        )
    from omegaconf import OmegaConf

    from scripts.tools.torchtune import OWN_KEYS, find_recipe, load_config

    config = load_config(rank, SET[stage])
    recipe = sys.modules[find_recipe(config.recipe, 1).__module__].__file__
    for key in OWN_KEYS:
        config.pop(key, None)
    config.output_dir = config.checkpointer.output_dir = str(folder / "out")
    config.metric_logger.log_dir = str(folder / "metrics")
    OmegaConf.save(config, folder / "config.yaml")
    return [python, str(recipe), "--config", str(folder / "config.yaml")], one, ROOT


def overhead() -> None:
    """A stage through make against its upstream tool alone, by turns, ROUNDS times; medians."""
    print("| stage | through make, s | bare upstream, s | ratio |\n|---|---|---|---|")
    for stage in (*TRAINED, "evaluate"):
        ours, bare = [], []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                words, env, cwd = bare_command(stage, Path(folder))
                bare.append(quiet(words, env, cwd))
            shutil.rmtree(RUNS / "bench", ignore_errors=True)
            ours.append(quiet(["make", "-s", stage, "RUN=bench", *options(stage)]))
        a, b = statistics.median(ours), statistics.median(bare)
        print(f"| {stage} | {a:.1f} | {b:.1f} | {a / b:.2f} |", flush=True)


ARGS = {
    "pretrain": "--training.steps 100 --checkpoint.interval 20 --metrics.log_freq 1",
    "finetune": "epochs=1 max_steps_per_epoch=100 save_every_n_steps=20 log_every_n_steps=1",
    "align": "max_steps_per_epoch=80 save_every_n_steps=20 log_every_n_steps=1",
}


def saves() -> None:
    """What a save adds to the five steps after it, against the same steps of runs that save nothing
    before their end: by turns, ROUNDS times; medians. Its staging falls into the next step, the
    write behind into some more."""
    print("| stage | step, ms | added by a save, ms | ratio |\n|---|---|---|---|")
    for stage in TRAINED:
        took: dict[str, list] = {"20": [], "1000": []}
        for interval in [*took] * ROUNDS:
            shutil.rmtree(RUNS / "bench", ignore_errors=True)
            arguments = (
                ARGS[stage]
                .replace("interval 20", f"interval {interval}")
                .replace("steps=20", f"steps={interval}")
            )
            quiet(["make", "-s", stage, "RUN=bench", *options(stage), f"ARGS={arguments}"])
            times = dict(step_times(stage_dir("bench", stage) / "metrics"))
            took[interval] += [times[n + 5] - times[n] for n in (20, 40, 60)]
        saving, plain = (statistics.median(five) for five in took.values())
        added, ordinary = saving - plain, plain / 5
        print(
            f"| {stage} | {ordinary * 1000:.0f} | {added * 1000:.0f} | {added / ordinary:.2f} |",
            flush=True,
        )


def restart() -> None:
    """From kill -9 of the stage, at about step 45 with a save each 20, to its first step and to the
    next new one, against a plain start to its first step."""
    print(
        "| stage | start to first step, s | kill to first step, s | to next new step, s | ratio |\n"
        "|---|---|---|---|---|"
    )
    for stage in TRAINED:
        shutil.rmtree(RUNS / "bench", ignore_errors=True)
        directory, words = (
            stage_dir("bench", stage),
            ["make", "-s", stage, "RUN=bench", *options(stage)],
        )
        words += [f"ARGS={ARGS[stage]}"]

        def until_step(step: int, directory: Path = directory) -> int:
            while True:
                found = (files.read_json(directory / "progress.json") or {}).get("step", 0)
                if found >= step:
                    return found
                time.sleep(0.02)

        began = time.monotonic()
        make = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until_step(1)
        plain = time.monotonic() - began
        reached = until_step(45)
        killed = time.monotonic()
        os.kill(attempts.running(directory)["pid"], signal.SIGKILL)
        make.wait()
        make = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        (directory / "progress.json").unlink(missing_ok=True)
        until_step(41)
        first = time.monotonic() - killed
        until_step(reached + 1)
        new = time.monotonic() - killed
        make.wait()
        print(
            f"| {stage} | {plain:.1f} | {first:.1f} | {new:.1f} | {new / plain:.2f} |", flush=True
        )


def serving(tokens: int = 128) -> None:
    """Tokens per second of the served demo model, for 1, 8 and 32 clients that ask one after the
    other."""
    server = json.loads((DEMO / "deploy/server.json").read_text())
    url = f"http://{server['host']}:{server['port']}/v1/completions"
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {(DEMO / 'deploy/api-key').read_text().strip()}",
    }
    body = json.dumps(
        {"model": server["name"], "prompt": "def main", "max_tokens": tokens, "ignore_eos": True}
    ).encode()

    def ask(times: int) -> None:
        for _ in range(times):
            with urllib.request.urlopen(
                urllib.request.Request(url, body, headers), timeout=300
            ) as answer:
                assert json.loads(answer.read())["usage"]["completion_tokens"] == tokens

    ask(2)
    print("| clients | tokens/s |\n|---|---|")
    for clients, times in ((1, 10), (8, 8), (32, 8)):
        threads = [threading.Thread(target=ask, args=(times,)) for _ in range(clients)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(
            f"| {clients} | {clients * times * tokens / (time.monotonic() - began):,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    tables = {
        "demo": demo,
        "overhead": overhead,
        "saves": saves,
        "restart": restart,
        "serving": serving,
        "slurm": slurm,
    }
    for name in sys.argv[1:]:
        print(f"\n{inspect.getdoc(tables[name])}\n")
        tables[name]()
    shutil.rmtree(RUNS / "bench", ignore_errors=True)
