"""Options of torchtitan 0.2.2: parsed, and those refused that it accepts and that then do harm, or
nothing.

What each of these does was seen in runs on two gloo ranks or read in its source; it is refused
before a step, by name, so that nobody pays for a run to find out.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

from scripts.run.errors import InputError
from scripts.tools.config_check import REFUSES

DENSE = "the models here are dense: it does nothing"
EXPORTED = "this stage writes the Hugging Face directory itself, from a whole checkpoint"
RESUMED = "a killed run would start again at step 0"

# option: the one value that works, and what any other does
WORKS: dict[str, tuple[Any, str]] = {
    "parallelism.pipeline_parallel_degree": (
        1,
        "its gradients are the number of tokens in a batch × too large (torchtitan #2972); "
        "use --parallelism.tensor_parallel_degree or data_parallel_shard_degree",
    ),
    "parallelism.expert_parallel_degree": (1, DENSE),
    "parallelism.expert_tensor_parallel_degree": (1, DENSE),
    "parallelism.expert_parallel_comm_backend": ("standard", DENSE),
    "debug.moe_force_load_balance": (False, DENSE),
    "parallelism.enable_async_tensor_parallel": (False, "it needs compile.enable"),
    "compile.enable": (False, "a compiled model's checkpoint cannot be resumed"),
    "fault_tolerance.enable": (
        False,
        "torchft is not installed and torchtitan trains without it; a stopped run is resumed by "
        "the same command",
    ),
    "memory_estimation.enable": (False, "torchtitan's trainer ignores it"),
    "comm.mode": ("default", "the ranks would train without exchanging anything"),
    "optimizer.early_step_in_backward": (
        False,
        "it steps before training.max_norm is applied, and once for each microbatch",
    ),
    "checkpoint.enable": (True, RESUMED),
    "checkpoint.load_only": (False, RESUMED),
    "checkpoint.last_save_model_only": (False, "the last checkpoint could not be resumed"),
    "checkpoint.last_save_in_hf": (False, EXPORTED),
    "checkpoint.create_seed_checkpoint": (False, EXPORTED),
    "checkpoint.load_step": (-1, "each attempt would go back to that step; the newest is taken"),
    "checkpoint.initial_load_in_hf_quantized": (False, "torchtitan's Llama ignores it"),
}
GPU_ALONE: dict[str, tuple[Any, str]] = {
    "parallelism.context_parallel_degree": (1, "its attention has no kernel for a CPU"),
    "training.enable_cpu_offload": (False, "on a CPU there is nothing to offload from"),
    "profiling.enable_profiling": (False, "torchtitan's profiler asks for a GPU"),
    "profiling.enable_memory_snapshot": (False, "it records a GPU's memory"),
}
# What transformers' models have no form of here; torchtitan's own do: --model.name llama3 or qwen3.
OWN_ALONE: dict[str, Any] = {
    "parallelism.tensor_parallel_degree": 1,
    "parallelism.context_parallel_degree": 1,
    "model.converters": [],
}
CONVERTERS = ("linear.float8", "linear.mx", "grouped_mm.float8", "grouped_mm.mx")


def parse(words: list[str]) -> Any:
    """Return the JobConfig of a command line. Raises InputError with torchtitan's own words."""
    from torchtitan.config import ConfigManager

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return ConfigManager().parse_args(words)
    except SystemExit:
        print(said.getvalue(), file=sys.stderr)
        raise InputError(
            f"torchtitan {REFUSES}: {refusal(said.getvalue())} (all that it takes: "
            ".venv/bin/python -m torchtitan.config.manager --help)"
        ) from None


def refusal(said: str) -> str:
    """Return what tyro, torchtitan's parser, says of a wrong argument, below its title and up to a
    line that is drawn: which one it is, and the first of those that it takes to be meant."""
    lines = [line.strip("│ ") for line in said.strip().splitlines()[1:]]
    parts = [" ".join(part.split()) for part in re.split(r"^[\W_]*$", "\n".join(lines), flags=re.M)]
    near = re.search(r"Perhaps you meant:\W*(--[\w.]+)", said)
    return next(filter(None, parts), said) + (f"; did you mean {near[1]}?" if near else "")


def problems(config: Any, world: int, on_cpu: bool) -> list[str]:
    """List the options of a JobConfig that torchtitan accepts and then ignores, or does harm with,
    for `world` ranks; more `on_cpu`."""
    found = []
    for name, (works, why) in {**WORKS, **(GPU_ALONE if on_cpu else {})}.items():
        value = attrgetter(name)(config)
        if value != works:
            found.append(f"{name} must be {json.dumps(works)}, not {json.dumps(value)}: {why}")
    for name, works in OWN_ALONE.items() if config.model.name == "decoder" else ():
        if attrgetter(name)(config) != works:
            why = (
                "the model is transformers'; torchtitan's own has it: --model.name llama3 or qwen3"
            )
            found.append(f"{name} must be {json.dumps(works)}: {why}")
    if config.activation_checkpoint.mode == "memory_budget":
        found.append('activation_checkpoint.mode "memory_budget" needs compile.enable; use "full"')
    if on_cpu and config.checkpoint.async_mode == "async_with_pinned_mem":
        found.append('checkpoint.async_mode "async_with_pinned_mem" needs a GPU; use "async"')
    if 0 < config.checkpoint.keep_latest_k < 3:
        found.append(
            "checkpoint.keep_latest_k must be 0 (all) or at least 3: the one being written "
            "counts, two stay whole"
        )
    if config.metrics.enable_wandb and not find_spec("wandb"):
        found.append("metrics.enable_wandb: wandb is not installed; use metrics.enable_tensorboard")
    return found + _quantisation(config, on_cpu) + _degrees(config, world)


def data_parallel(config: Any, world: int) -> int:
    """Return how many of `world` ranks read different data."""
    sizes = config.parallelism
    others = sizes.tensor_parallel_degree * sizes.context_parallel_degree
    return max(1, world // (others * sizes.pipeline_parallel_degree))


def _quantisation(config: Any, on_cpu: bool) -> list[str]:
    found = []
    for name in CONVERTERS:
        settings = attrgetter(f"quantize.{name}")(config)
        chosen = f"quantize.{name}" in config.model.converters
        if chosen and name.startswith("grouped_mm"):
            found.append(f"model.converters quantize.{name}: {DENSE}")
        elif chosen and on_cpu and not getattr(settings, "emulate", False):
            emulated = "; --quantize.linear.float8.emulate runs" if name == "linear.float8" else ""
            found.append(f"model.converters quantize.{name} needs a GPU{emulated}")
        elif not chosen and settings != type(settings)():
            found.append(f"quantize.{name} does nothing without --model.converters quantize.{name}")
    return found


def _degrees(config: Any, world: int) -> list[str]:
    """Hold the degrees of parallelism against the ranks: torchtitan stops at an assertion."""
    sizes, found = config.parallelism, []
    tensor, context = sizes.tensor_parallel_degree, sizes.context_parallel_degree
    pipeline, replicate = sizes.pipeline_parallel_degree, sizes.data_parallel_replicate_degree
    given = tensor * context * pipeline * replicate
    shard = sizes.data_parallel_shard_degree
    shard = world // given if shard == -1 else shard
    if given * shard != world:
        return [
            f"parallelism: data_parallel_replicate_degree {replicate} × data_parallel_shard_degree "
            f"{sizes.data_parallel_shard_degree} × tensor {tensor} × context {context} × pipeline "
            f"{pipeline} is not GPUS × NODES = {world}"
        ]
    batch = config.training.local_batch_size * data_parallel(config, world)
    if config.training.global_batch_size > 0 and config.training.global_batch_size % batch:
        found.append(
            f"training.global_batch_size {config.training.global_batch_size} is no multiple of "
            f"training.local_batch_size × data-parallel ranks = {batch}"
        )
    if tensor > 1 and shard * context == 1:
        if replicate > 1:
            found.append(
                "parallelism.data_parallel_replicate_degree goes with tensor parallelism only if "
                "data_parallel_shard_degree is more than 1"
            )
        if config.training.mixed_precision_param != "float32":
            found.append(
                "training.mixed_precision_param is ignored under tensor parallelism without "
                "sharding; set it to float32, or training.dtype to bfloat16"
            )
    return found
