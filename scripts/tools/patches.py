"""Every patch of an upstream tool, each with its reason and the version at which it should go.

Call those of a tool before anything else of that tool is imported. Those named …_on_cpu change
nothing where there is a GPU.
"""

from __future__ import annotations

import types
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from scripts.run.errors import InputError


def torchtitan(world: int) -> None:
    """Apply every patch of torchtitan for `world` ranks."""
    torchtitan_on_cpu()
    torchtitan_ddp_gradients()
    torchtitan_without_a_nap()
    checkpoints_without_collectives(world)


def torchtune(world: int) -> None:
    """Apply every patch of torchtune for `world` ranks."""
    torchtune_on_cpu()
    torchtune_merge_into_copies()
    torchtune_dense_masks()
    checkpoints_without_collectives(world)


def torchtitan_on_cpu() -> None:
    """Let torchtitan 0.2.2 run without an accelerator.

    It takes CUDA for granted where torch reports none (torch._C has no attribute _cuda_setDevice)
    and asks torch.cpu for functions that it lacks. Goes with torchtitan > 0.2.2 if
    `tools/utils.py` learns about CPUs.
    """
    import torch

    if torch.accelerator.is_available():
        return
    device = types.ModuleType("torch_cpu_device")
    public = [name for name in dir(torch.cpu) if not name.startswith("__")]
    device.__dict__.update({name: getattr(torch.cpu, name) for name in public})
    memory = types.SimpleNamespace(total_memory=1 << 40, name="CPU")
    device.current_device = lambda: 0
    device.get_device_name = lambda *_: "CPU"
    device.get_device_properties = lambda *_: memory
    device.memory_stats = lambda *_: {}
    device.reset_peak_memory_stats = device.empty_cache = lambda *_: None
    original = torch._utils._get_available_device_type, torch._utils._get_device_module
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda _: device
    import torchtitan.tools.utils  # noqa: F401  reads both once; the rest of torch keeps its own

    torch._utils._get_available_device_type, torch._utils._get_device_module = original
    _sum_reduction_on_gloo()


def torchtitan_ddp_gradients() -> None:
    """Undo DDP's division of the gradients by the number of ranks, on every device.

    torchtitan 0.2.2 divides the summed loss by the tokens of all ranks, so gradients must be
    summed over the ranks. It tells FSDP and HSDP so (`disable_fsdp_gradient_division`) but not
    DDP, whose reducer averages: on N ranks gradients are N × too small, which AdamW hides and
    clipping does not (torchtitan #2318). Here the loss of the backward pass is N × larger under
    DDP; the loss that is shown stays. A communication hook that sums would be wrong with gradient
    accumulation: the reducer takes param.grad whole, with what earlier microbatches have reduced.
    Goes with the release that closes #2318.
    """
    from torchtitan.train import Trainer

    upstream = Trainer.forward_backward_step

    def forward_backward_step(self, *, global_valid_tokens, **batch):
        dims = self.parallel_dims
        ranks = 1 if dims.fsdp_enabled else dims.dp_replicate
        return upstream(self, global_valid_tokens=global_valid_tokens / ranks, **batch) / ranks

    Trainer.forward_backward_step = forward_backward_step


def checkpoints_without_collectives(world: int) -> None:
    """Save without collectives on one rank.

    torch 2.13's dcp.save gathers plans through gloo even there; the threads that this leaves
    behind make libgomp stop spinning at its barriers, and every later step takes up to 60 %
    longer. Goes when dcp.save skips collectives at world size 1 by itself.
    """
    import functools

    import torch.distributed.checkpoint as dcp

    if world == 1:
        dcp.save = functools.partial(dcp.save, no_dist=True)
        dcp.async_save = functools.partial(dcp.async_save, no_dist=True)


def torchtitan_without_a_nap() -> None:
    """Skip the two seconds that torchtitan 0.2.2's rank 0 sleeps at its end.

    It sleeps "for other ranks to complete", on one rank, too, and at every stop. Ours meet at a
    barrier instead. Goes when train() ends with one.
    """
    import time

    import torchtitan.train

    torchtitan.train.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})


def torchtune_on_cpu() -> None:
    """Let torchtune 0.6.1's distributed recipes run without a GPU.

    They read GPU memory statistics and empty a GPU cache on every device. torchtune is no longer
    developed: goes when it is replaced.
    """
    import torch

    if torch.accelerator.is_available():
        return
    from torchtune import training
    from torchtune.training import memory

    training.get_memory_stats = memory.get_memory_stats = lambda *_, **__: {}
    training.log_memory_stats = memory.log_memory_stats = lambda *_, **__: None
    torch.cpu.empty_cache = torch.cpu.reset_peak_memory_stats = lambda *_: None
    _sum_reduction_on_gloo()


def torchtune_merge_into_copies() -> None:
    """Keep torchtune 0.6.1's LoRA save from changing the model that is being trained.

    `get_merged_lora_ckpt` adds B·A in place. On a CPU the recipes' `.cpu()` copies nothing, so
    training goes on from base + B·A with the adapter still on top, and every later save holds
    each earlier one's B·A again. Here each base weight is copied before it is merged: one tensor
    more on top of a GPU's own copy. Goes with torchtune.
    """
    from torchtune.modules import peft
    from torchtune.modules.peft._utils import _get_lora_modules

    upstream = peft.get_merged_lora_ckpt

    def get_merged_lora_ckpt(state_dict, rank, alpha):
        for name in _get_lora_modules(state_dict):
            state_dict[f"{name}.weight"] = state_dict[f"{name}.weight"].clone()
        return upstream(state_dict, rank, alpha)

    peft.get_merged_lora_ckpt = get_merged_lora_ckpt


def torchtune_dense_masks() -> None:
    """Make torchtune 0.6.1 describe the documents of a packed row by a mask that is a tensor.

    On a GPU it makes a BlockMask of flex attention, for the attention of its own classes alone
    (seen on an H200: 'BlockMask' object has no attribute 'device'). Goes with torchtune.
    """
    from torchtune.modules import attention_utils

    attention_utils._SUPPORTS_FLEX_ATTENTION = False


def _sum_reduction_on_gloo() -> None:
    """Make FSDP2 sum gradients on gloo and divide afterwards.

    torch 2.13 averages with ReduceOp.PREMUL_SUM, which gloo refuses ("Cannot use
    ReduceOp.PREMUL_SUM with Gloo"). Goes when FSDP picks the operation by backend.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    upstream = FSDPParamGroup.__init__

    def __init__(self, *arguments, **keywords):
        upstream(self, *arguments, **keywords)
        self.force_sum_reduction_for_comms = True

    FSDPParamGroup.__init__ = __init__


def lm_eval_without_bundled_tasks(names: Iterable[str], known: Container[str]) -> None:
    """Keep lm-eval 0.4.13 from indexing its 13,986 bundled task files, 7 s: wholly where every task
    in `names` is one of those `known`, of the run's own; else but for the first time.

    Its command line cannot be told not to, and builds the index anew for every model.
    """
    import functools

    import lm_eval.tasks
    from lm_eval.tasks.manager import TaskIndex

    if all(name in known for name in names):
        manager = lm_eval.tasks.TaskManager
        lm_eval.tasks.TaskManager = functools.partial(manager, include_defaults=False)
    upstream, built = TaskIndex.build, {}

    def build(paths):
        key = tuple(map(str, paths))
        if key not in built:
            built[key] = upstream(paths)
        return dict(built[key])

    TaskIndex.build = staticmethod(build)


def lm_eval_reads_staged(staged: Mapping[str, Path]) -> None:
    """Let the tasks of lm-eval 0.4.13 read data sets of the hub from folders: `staged`, by name.

    datasets 5.2 finds offline only what it has prepared itself, in a cache whose form is its own,
    and a task's YAML can name another path only task by task. Goes when lm-eval can be told where a
    data set lies. One that is not staged raises InputError, where the hub may not be asked.
    """
    import datasets
    import lm_eval.api.task
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as readers

    def load_dataset(path, name=None, **keywords):
        if path in staged:
            keywords.pop("revision", None)  # it was chosen when it was staged
            return datasets.load_dataset(str(staged[path]), name, **keywords)
        of_the_hub = path not in readers and not Path(path).exists()
        if of_the_hub and datasets.config.HF_HUB_OFFLINE:
            raise InputError(
                f"{path}: a data set of the hub that was not staged for this run; name it in the "
                f'suite\'s suite.json, {{"data": {{"{path}": "main"}}}}, then make download '
                "RECIPE=<the suite> (docs/evaluate.md)"
            )
        return datasets.load_dataset(path, name, **keywords)

    known = {**vars(datasets), "load_dataset": load_dataset}
    lm_eval.api.task.datasets = types.SimpleNamespace(**known)


def vllm_engine_by_fork() -> None:
    """Start vLLM 0.32's engine on a CPU by fork instead of spawn.

    A spawn pays every import a second time: 17 of 43 s. Nothing has run in the API server by
    then, and with OMP_NUM_THREADS=1 no thread pool is lost, so a fork is safe. Goes when
    `platforms/cpu.py` no longer overwrites VLLM_WORKER_MULTIPROC_METHOD.
    """
    import multiprocessing
    import os

    from vllm.platforms import current_platform

    if current_platform.is_cpu() and os.environ.get("OMP_NUM_THREADS") == "1":
        import vllm.v1.engine.utils

        vllm.v1.engine.utils.get_mp_context = lambda: multiprocessing.get_context("fork")
