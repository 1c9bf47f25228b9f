"""Every patch of an upstream tool, each with the reason and the version at which it should go.

All are no-ops where there is a GPU. Call the one for a tool before importing that tool.
"""

from __future__ import annotations

import types
from pathlib import Path


def torchtitan_on_cpu() -> None:
    """torchtitan 0.2.2 takes CUDA for granted where torch reports no accelerator (torch._C has no attribute
    _cuda_setDevice) and asks torch.cpu for functions it lacks. Goes with torchtitan > 0.2.2 if `tools/utils.py`
    learns about CPUs."""
    import torch

    if torch.accelerator.is_available():
        return
    device = types.ModuleType("torch_cpu_device")
    device.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})
    device.current_device = lambda: 0
    device.get_device_name = lambda *_: "CPU"
    device.get_device_properties = lambda *_: types.SimpleNamespace(total_memory=1 << 40, name="CPU")
    device.memory_stats = lambda *_: {}
    device.reset_peak_memory_stats = device.empty_cache = lambda *_: None
    original = torch._utils._get_available_device_type, torch._utils._get_device_module
    torch._utils._get_available_device_type, torch._utils._get_device_module = (lambda: "cpu"), (lambda _: device)
    import torchtitan.tools.utils  # noqa: F401  reads both once; the rest of torch keeps its own

    torch._utils._get_available_device_type, torch._utils._get_device_module = original
    _sum_reduction_on_gloo()


def checkpoints_without_collectives() -> None:
    """On one rank, save without collectives. torch 2.13's dcp.save gathers plans through gloo even there; the threads
    this leaves behind make libgomp stop spinning at its barriers, and every later step takes up to 60 % longer. Goes
    when dcp.save skips collectives at world size 1 by itself."""
    import functools
    import os

    import torch.distributed.checkpoint as dcp

    if os.environ["WORLD_SIZE"] == "1":
        dcp.save = functools.partial(dcp.save, no_dist=True)
        dcp.async_save = functools.partial(dcp.async_save, no_dist=True)


def torchtitan_without_a_nap() -> None:
    """torchtitan 0.2.2's rank 0 sleeps two seconds at its end "for other ranks to complete", on one rank, too, and on
    every stop. Ours meet at a barrier instead. Goes when train() ends with one."""
    import time

    import torchtitan.train

    torchtitan.train.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})


def torchtune_on_cpu() -> None:
    """torchtune 0.6.1's distributed recipes read GPU memory statistics and empty a GPU cache on every device.
    torchtune is no longer developed: goes when it is replaced."""
    import torch

    if torch.accelerator.is_available():
        return
    from torchtune import training
    from torchtune.training import memory

    training.get_memory_stats = memory.get_memory_stats = lambda *_, **__: {}
    training.log_memory_stats = memory.log_memory_stats = lambda *_, **__: None
    torch.cpu.empty_cache = torch.cpu.reset_peak_memory_stats = lambda *_: None
    _sum_reduction_on_gloo()


def _sum_reduction_on_gloo() -> None:
    """FSDP2 of torch 2.13 averages gradients with ReduceOp.PREMUL_SUM, which gloo refuses ("Cannot use
    ReduceOp.PREMUL_SUM with Gloo"). Goes when FSDP picks the operation by backend."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    upstream = FSDPParamGroup.__init__

    def __init__(self, *arguments, **keywords):
        upstream(self, *arguments, **keywords)
        self.force_sum_reduction_for_comms = True

    FSDPParamGroup.__init__ = __init__


def lm_eval_without_bundled_tasks(names: list[str] | None, local: Path) -> None:
    """lm-eval 0.4.13 indexes its 13,986 bundled task files at every start, 7 s, and its command line cannot be told
    not to. Only where every task in `names` lies in the folder `local`."""
    import functools

    import lm_eval.tasks

    if set(names or ["bundled"]) <= {path.stem for path in local.glob("*.yaml")}:
        lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)


def vllm_engine_by_fork() -> None:
    """vLLM 0.32 starts its engine by spawn on a CPU, which pays every import a second time: 17 of 43 s. Nothing has run
    in the API server by then, and with OMP_NUM_THREADS=1 no thread pool is lost, so a fork is safe. Goes when
    `platforms/cpu.py` no longer overwrites VLLM_WORKER_MULTIPROC_METHOD."""
    import multiprocessing
    import os

    from vllm.platforms import current_platform

    if current_platform.is_cpu() and os.environ.get("OMP_NUM_THREADS") == "1":
        import vllm.v1.engine.utils

        vllm.v1.engine.utils.get_mp_context = lambda: multiprocessing.get_context("fork")
