"""What one GPU does with a model of Llama 3.2 1B's shape and random weights: tokens/s, MFU, memory.

    .venv/bin/python -m bench.gpu                       # ten minutes at most, nothing downloaded
    .venv/bin/python -m bench.gpu pretrain full lora    # some of the rows
    .venv/bin/python -m bench.gpu --shape debug         # a dry trial, on a CPU, too

torchtitan's Trainer and torchtune's recipes run as they are, each in a process of its own; the
numbers are those that they log: the median after the warm-up, the highest memory. torchtitan
logs MFU (989 TFLOP/s for an H100, attention counted as if it were not causal), torchtune none.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.measures import ROOT

# https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# shape: architecture, then (tokens in a row, rows in a batch) of pretrain and of the recipes
SHAPES = {
    "1b": (LLAMA, (8192, 2), (4096, 4)),
    "debug": ({**LLAMA, **TINY}, (128, 2), (128, 2)),
}
# Llama 3.1 8B on 8 and on 128 H100 of 500 W, eager and compiled (torchtitan's repository,
# benchmarks/llama3_h100_202412_torchtitan.md)
PUBLISHED = {"pretrain": "33 %", "pretrain-compiled": "39 %"}
WARM = 10  # steps

PRETRAIN = """
import sys
shape = sys.argv.pop(1)  # before torchtitan is imported, which reads the arguments then
from scripts.tools import patches
patches.torchtitan_on_cpu()
from bench.gpu import register
register(shape)
from torchtitan.train import Trainer, main
main(Trainer)
"""


def register(config_json: str) -> None:
    """Register the shape with torchtitan, as "bench", with rows of random tokens: torchtitan's own
    Llama, which cannot tie the embeddings (0.26 billion parameters more, which no MFU counts), or
    transformers' model, which does, as BENCH_MODEL says."""
    import dataclasses

    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.protocols.train_spec import register_train_spec

    from scripts.tools.torchtitan_model import train_spec

    spec = train_spec(os.environ["BENCH_MODEL"], "bench", Path(config_json).parent)
    vocabulary = json.loads(Path(config_json).read_text())["vocab_size"]

    class RandomTokens(BaseDataLoader):
        def __init__(self, job_config, **_):
            training = job_config.training
            self.size = (training.local_batch_size, training.seq_len + 1)

        def __iter__(self):
            while True:
                rows = torch.randint(vocabulary, self.size)
                yield {"input": rows[:, :-1]}, rows[:, 1:]

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    register_train_spec(
        "bench",
        dataclasses.replace(spec, build_dataloader_fn=RandomTokens, build_tokenizer_fn=None),
    )


class RandomWeights:
    """Hand a torchtune recipe random weights of the shape, and save nothing (a checkpointer)."""

    def __init__(self, folder: str, device: str, dtype: str, **_):
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype

    def load_checkpoint(self) -> dict:
        from torchtune import training

        from scripts.components import decoder

        with training.set_default_dtype(training.get_dtype(self.dtype, self.device)), self.device:
            weights = decoder(self.folder).state_dict()
        return {"model": {name: value.cpu() for name, value in weights.items()}}

    def save_checkpoint(self, *_, **__) -> None:
        pass


def random_rows(tokenizer, *, rows: int, vocabulary: int, **_):
    """Make a torchtune dataset of full packed rows, of random documents of 100 to 1,000 tokens."""
    import random

    from torchtune.datasets import PackedDataset

    chance, length, documents = random.Random(0), tokenizer.max_seq_len, []
    while sum(map(len, documents)) < (rows + 1) * length:
        documents.append([chance.randrange(vocabulary) for _ in range(chance.randint(100, 1000))])
    samples = [{"tokens": ids, "labels": ids} for ids in documents]
    return PackedDataset(samples, max_seq_len=length, max_packs=rows, split_across_pack=True)


def titan(name: str, folder: Path, shape: str, steps: int, batch: int, gpu: bool) -> list[str]:
    """Return torchtitan's command line for a row of the table."""
    architecture, (length, _), _ = SHAPES[shape]
    untied = {**architecture, "tie_word_embeddings": name.endswith("decoder")}
    (folder / "config.json").write_text(json.dumps(untied))
    options = {
        "model.name": "bench",
        "model.flavor": "bench",
        "training.steps": steps,
        "training.seq_len": length,
        "training.local_batch_size": batch,
        "training.mixed_precision_param": "bfloat16" if gpu else "float32",
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
        "metrics.log_freq": 5,
        "job.dump_folder": folder,
    }
    words = [sys.executable, "-c", PRETRAIN, str(folder / "config.json")]
    words += [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    words += ["--metrics.disable_color_printing"]
    return words + (["--compile.enable"] if name.endswith("compiled") else [])


def tune(name: str, folder: Path, shape: str, steps: int, batch: int, gpu: bool) -> list[str]:
    """Return the command line of torchtune's recipe for a row of the table: the debug model's
    configuration, but for what is measured here."""
    architecture, _, (length, _) = SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(architecture))
    config, recipe = "full", "full_finetune_single_device.py"
    layers: dict = {}
    if name.startswith("lora"):
        config, recipe = "lora", "lora_finetune_single_device.py"
        projections = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
        layers = {"model.lora_attn_modules": f"[{projections}]"}
    device = {"device": "cuda", "dtype": "bf16"} if gpu else {"device": "cpu", "dtype": "fp32"}
    options = {
        **device,
        **layers,
        "gradient_accumulation_steps": 1,
        "enable_activation_checkpointing": False,
        **{f"checkpointer.{key}": value for key, value in device.items()},
        "checkpointer": "bench.gpu.RandomWeights",
        "checkpointer.folder": folder,
        "model.model_dir": folder,
        "tokenizer": "types.SimpleNamespace",
        "tokenizer.pad_id": 0,
        "tokenizer.max_seq_len": length,
        "dataset": "bench.gpu.random_rows",
        "dataset.rows": steps * batch,
        "dataset.vocabulary": architecture["vocab_size"],
        "metric_logger": "torchtune.training.metric_logging.DiskLogger",
        "metric_logger.log_dir": folder,
        "metric_logger.filename": "metrics.txt",
        "output_dir": folder,
        "batch_size": batch,
        "epochs": 1,
        "max_steps_per_epoch": steps,
        "log_every_n_steps": 1,
        "log_peak_memory_stats": True,
        "compile": name.endswith("compiled"),
        "optimizer.lr": 2e-5,
    }
    upstream = Path(find_spec("torchtune").origin).parent.parent / "recipes" / recipe
    words = [sys.executable, str(upstream), "--config", f"configs/finetune/{config}.yaml"]
    return words + [f"{key}={value}" for key, value in options.items()]


def read_titan(output: str) -> list[tuple[int, float, float, float]]:
    """Return (step, tokens/s, peak GiB reserved, MFU in %) of each step that torchtitan logged."""
    pattern = r"step: +(\d+) .*memory: +(-?[\d.]+)GiB.* tps: ([\d,]+) .* mfu: ([\d.]+)%"
    found = re.findall(pattern, output)
    return [(int(s), float(t.replace(",", "")), float(m), float(u)) for s, m, t, u in found]


def read_tune(text: str) -> list[tuple[int, float, float, float]]:
    """Return the same of torchtune's DiskLogger, whose memory is in GiB, too; it knows no MFU."""
    found = []
    for step, rest in re.findall(r"^Step (\d+) \| (.*)$", text, re.M):
        numbers = dict(word.split(":") for word in rest.split())
        memory = float(numbers.get("peak_memory_reserved", 0))
        found.append((int(step), float(numbers["tokens_per_second_per_gpu"]), memory, 0.0))
    return found


def measure(name: str, shape: str, steps: int, limit: float, gpu: bool) -> str:
    """Return a row of the table. Where memory does not suffice, half the batch is tried."""
    of_titan = name.startswith("pretrain")
    length, batch = SHAPES[shape][1 if of_titan else 2]
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "HF_HUB_OFFLINE": "1"}
    environment["BENCH_MODEL"] = "decoder" if name.endswith("decoder") else "llama3"
    environment |= {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    while True:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            words = (titan if of_titan else tune)(name, folder, shape, steps, batch, gpu)
            with open(folder / "output.txt", "w", encoding="utf-8") as file:
                options = {"stdout": file, "stderr": subprocess.STDOUT, "timeout": limit}
                try:
                    code = subprocess.run(words, cwd=ROOT, env=environment, **options).returncode
                except subprocess.TimeoutExpired:
                    code = f"stopped after {limit:.0f} s"
            output = (folder / "output.txt").read_text(encoding="utf-8")
            metrics = folder / "metrics.txt"
            logged = read_titan(output) if of_titan else []
            if metrics.exists():
                logged = read_tune(metrics.read_text(encoding="utf-8"))
        if code == 0 or batch == 1 or "out of memory" not in output:
            break
        batch //= 2
    timed = [row for row in logged if row[0] > min(WARM, steps // 2)]
    if code != 0 or not timed:
        print(f"{name}: {code}\n{output[-6000:]}", file=sys.stderr)
        return f"| {name} | {length} × {batch} | failed: {code} | | | | |"
    speed, memory = statistics.median(row[1] for row in timed), max(row[2] for row in logged)
    used = f"{statistics.median(row[3] for row in timed):.1f} %" if of_titan and gpu else "–"
    cells = [name, f"{length} × {batch}", f"{speed:,.0f}", used]
    cells.append(PUBLISHED.get(name, "–") if gpu else "–")
    cells += [f"{memory:.1f}" if gpu else "–", f"{time.monotonic() - began:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table, a row as soon as it is measured; return an exit code."""
    rows = ["pretrain", "pretrain-compiled", "pretrain-decoder", "full", "lora"]
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", help=f"{', '.join(rows)} (all), full-compiled, …")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=float, default=180, help="seconds for each row")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and given.shape != "debug":
        print("bench.gpu: torch sees no GPU here; --shape debug runs on a CPU", file=sys.stderr)
        return 64
    name = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"{name}, torch {torch.__version__}, shape {given.shape}, {given.steps} steps\n")
    print("| | tokens × rows | tokens/s | MFU | of the 8B, published | peak GiB | seconds in all |")
    print("|---|---|---|---|---|---|---|", flush=True)
    printed = []
    for row in given.rows or rows:
        printed.append(measure(row, given.shape, given.steps, given.limit, gpu))
        print(printed[-1], flush=True)
    return int(any("failed" in row for row in printed))


if __name__ == "__main__":
    sys.exit(main())
