"""What one rank holds of a named model at its full shape, without a GPU: built on the meta device
and sharded over a group that is pretended.

    .venv/bin/python -m bench.shapes                             the table of docs/models.md
    .venv/bin/python -m bench.shapes llama3_1_8b 8 [--torchtitan.option …]
"""

import os
import subprocess
import sys
import tempfile

from bench.measures import ROOT

TP8 = "--model.name llama3 --parallelism.tensor_parallel_degree 8"
SHAPES = [
    ("llama3_1_8b", 8, ""),
    ("llama3_1_8b", 8, "--model.name llama3"),
    ("qwen3_32b", 32, ""),
    ("llama3_1_70b", 64, ""),
    ("llama3_1_70b", 64, TP8),
    ("llama3_1_405b", 512, TP8),
]
HEAD = "| model | ranks | options | parameters | of them a rank | GB of states a rank |"
STATES = 16  # bytes a parameter: weights, gradients and Adam's two moments in float32


def on_one_rank(model: str, ranks: int, options: list[str]) -> tuple[int, int]:
    """Return the parameters of a model and those that rank 0 of so many holds, as pretrain shards
    it. Raises InputError for options that pretrain refuses. Once a process: it pretends a group."""
    from scripts.launcher.options import MODELS, settings
    from scripts.run.errors import InputError
    from scripts.tools import patches

    os.environ |= {"NGPU": str(ranks), "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(ranks)}
    patches.torchtitan_on_cpu()
    import torch
    from torchtitan.config import ConfigManager
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as distributed

    from scripts.tools.torchtitan_model import train_spec
    from scripts.tools.torchtitan_options import problems

    config = ["--job.config_file", str(ROOT / "configs/pretrain/full.toml")]
    with tempfile.TemporaryDirectory() as folder:
        words = [*config, *settings(model, "pretrain"), "--job.dump_folder", folder, *options]
        job = ConfigManager().parse_args(words)
        if found := problems(job, ranks, on_cpu=False):
            raise InputError(found)
        job.comm.mode = "fake_backend"
        distributed.init_distributed(job.comm, False, folder)
    how = job.parallelism
    dims = ParallelDims(
        dp_shard=how.data_parallel_shard_degree,
        dp_replicate=how.data_parallel_replicate_degree,
        cp=how.context_parallel_degree,
        tp=how.tensor_parallel_degree,
        pp=how.pipeline_parallel_degree,
        ep=how.expert_parallel_degree,
        etp=how.expert_tensor_parallel_degree,
        world_size=ranks,
    )
    dims.build_mesh()
    spec = train_spec(job.model.name, "full", MODELS / model)
    arguments = spec.model_args["full"]
    arguments.update_from_config(job)
    with torch.device("meta"):
        whole = spec.model_cls(arguments)
    total = sum(p.numel() for p in whole.parameters())
    spec.parallelize_fn(whole, dims, job)
    return total, sum(p.to_local().numel() for p in whole.parameters())


def main(given: list[str]) -> None:
    """Print a line for the shape that is given, or the whole table, each in its own process."""
    if not given:
        print(f"{HEAD}\n|---|---:|---|---:|---:|---:|", flush=True)
        for model, ranks, options in SHAPES:
            words = [sys.executable, "-m", "bench.shapes", model, str(ranks), *options.split()]
            subprocess.run(words, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        return
    model, ranks, *options = given
    total, own = on_one_rank(model, int(ranks), options)
    cells = [model, ranks, " ".join(options), f"{total:,}", f"{own:,}", f"{own * STATES / 1e9:.1f}"]
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
