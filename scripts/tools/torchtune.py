"""torchtune around the pinned release: a stock recipe checked, run and reported.

Finetune and align differ in their config and in the set they train on, nowhere else.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import sys
from pathlib import Path

from scripts.job.parent import Parent
from scripts.job.rank import Left, Rank
from scripts.run import preflight
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.run.modeldir import hand_over, parameter_count, problems, untrainable
from scripts.tools.data_check import tokenizer_differs
from scripts.tools.torchtune_config import device, load_config, teacher_of, wrong_keys
from scripts.tools.torchtune_config_keys import DISTRIBUTED, KEYS, SINGLE_DEVICE, STARTS_GROUP

WANTED = {"sft": "conversations to finetune on", "preference": "pairs of answers to align on"}
KIND = {"sft": "chat", "preference": "pair"}  # data.json's words for what the folders hold


def main(stage: Parent) -> dict:
    """Check that the input model is whole, run the ranks, hand over the last epoch's weights;
    an adapter, which they contain, stays in adapter/ in PEFT's format.

    Returns what goes into stage.json. Raises InputError, Stopped after a stop that was asked for,
    RankFailed if a rank fails.
    """
    source, data = stage.path("FROM"), stage.path("DATA")
    found = problems(source) or untrainable(source / "config.json")
    if found:
        raise InputError(found)
    stage.ranks()
    epochs = (stage.directory / "checkpoints").glob("epoch_*")
    newest = max(epochs, key=lambda path: int(path.name.split("_")[1]))
    for leftover in newest.glob("*.pt"):
        leftover.unlink()  # adapters as pickle: only safetensors go between stages
    if (newest / "adapter").exists():
        # Beside the merged weights transformers would apply it a second time.
        shutil.rmtree(stage.directory / "adapter", ignore_errors=True)
        os.replace(newest / "adapter", stage.directory / "adapter")
    stage.phase("hands the model over")
    model = hand_over(newest, source, stage.directory / "model", stage.digests)
    teacher = teacher_of(stage.arguments)
    more = {"teacher": stage.digests.describe(teacher)} if teacher else {}
    describe = stage.digests.describe
    return {
        "inputs": {"model": describe(source), "data": describe(data), **more},
        "outputs": {"model": model},
        "summary": stage.progress,
    }


def train(stage: Rank, dataset: str) -> None:
    """Do one rank's work: configuration, checks, the recipe.

    `dataset` is the folder of DATA to train on. Raises InputError, and Left when asked to stop.
    """
    from scripts.tools import patches

    stage.phase("imports torchtune")
    if device(stage.config.read_text(encoding="utf-8"), stage.arguments) == "cpu":
        # Where there is a GPU, torchtune takes its kernels for packed rows, whatever `device` says.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    patches.torchtune(stage.environment.world)
    import torch.distributed as dist
    from torchtune.training import get_distributed_backend

    from scripts.tools.decoder import tell_unproven
    from scripts.tools.torchtune_resume import Resumable

    cfg = load_config(stage, dataset)
    world = stage.environment.world
    recipe_class = find_recipe(cfg.recipe, world)
    check(stage, cfg, dataset)
    if is_distributed(cfg.recipe, world) and cfg.recipe not in STARTS_GROUP:
        dist.init_process_group(get_distributed_backend(cfg.device))
    tell_unproven(stage, stage.path("FROM"))
    stage.phase("loads the model")
    recipe = recipe_class(cfg=cfg)
    recipe.setup(cfg=cfg)
    batches = Resumable(stage, recipe, cfg.get("save_every_n_steps") or 0)
    batches.resume()
    _report_progress(stage, recipe)
    try:
        recipe.train()
    except Left:
        _report(stage, recipe)
        raise
    _report(stage, recipe)
    batches.wait()
    recipe.cleanup()


def is_distributed(name: str, world: int) -> bool:
    """Return whether `world` processes run the recipe's distributed variant.

    One process does where torchtune has no other.
    """
    return world > 1 or name not in SINGLE_DEVICE


def find_recipe(name: str, world: int) -> type:
    """Return the stock recipe's class for `world` processes. Raises InputError if there is none."""
    import torchtune
    from torchtune.recipe_interfaces import FTRecipeInterface

    known = KEYS if world == 1 else DISTRIBUTED
    if name not in known:
        raise InputError(
            f"recipe: {name}: torchtune has none of this name for {world} process(es); "
            f"it has {', '.join(sorted(known))}"
        )
    file = f"{name}_distributed" if is_distributed(name, world) else f"{name}_single_device"
    folder = Path(torchtune.__file__).parent.parent / "recipes"  # files to run, not a package
    spec = importlib.util.spec_from_file_location(f"torchtune_{file}", folder / f"{file}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if FTRecipeInterface in c.__mro__ and c.__module__ == module.__name__
    )


def check(stage: Rank, cfg, dataset: str) -> None:
    """Raise InputError with every wrong key, or else with all that data and machine lack."""
    found = [f"{stage.config}: {problem}" for problem in wrong_keys(cfg)]
    if found:
        raise InputError(found)  # what follows trusts types
    folder, made = stage.path("DATA"), read_json(stage.path("DATA") / "data.json")
    rows, batch = made["rows"][dataset], cfg.batch_size * stage.environment.world
    if not rows:
        found.append(f"{folder}: holds no {WANTED[dataset]}; give DATA some")
    elif rows < batch:
        found.append(
            f"{folder}/{dataset}: {rows} rows are less than one batch of {batch} "
            "(batch_size × processes); give more DATA, or a smaller batch_size"
        )
    longest = made["lengths"][KIND[dataset]].get("most", 0)
    if longest > (cfg.tokenizer.max_seq_len or longest):
        found.append(
            f"tokenizer.max_seq_len {cfg.tokenizer.max_seq_len}: the longest row of {folder} has "
            f"{longest} tokens; prepare it so: make data ARGS=max_seq_len=…"
        )
    found += tokenizer_differs(made, stage.path("FROM"))
    found += _needs(stage, cfg)
    if found:
        raise InputError(found)


def _needs(stage: Rank, cfg) -> list[str]:
    """Return what the machine lacks of disk and memory.

    Counted in bytes: weights, and unless adapters alone are trained, gradients and Adam's two
    moments; on the disk two finished step folders and one being written, with the moments.
    """
    from torchtune.training import get_dtype

    weights = parameter_count(stage.path("FROM")) * get_dtype(cfg.dtype).itemsize
    full = "save_adapter_weights_only" not in KEYS[cfg.recipe]  # else it has adapters to save
    reference = weights if cfg.recipe.startswith("full_dpo") else 0
    share = (weights * (4 if full else 1) + reference) / stage.environment.nodes
    disk = weights * cfg.epochs + (3 * 3 * weights if full else 0)
    found = preflight.disk_problems(stage.directory, disk, "checkpoints and the model")
    return found + (
        preflight.memory_problems(share, "training here") if cfg.device == "cpu" else []
    )


def _report(stage: Rank, recipe, **numbers: float) -> None:
    """Report the recipe's step, which the last log need not have told."""
    total = recipe.total_epochs * recipe._steps_per_epoch
    stage.report(**{"step": recipe.global_step, "total": total, **numbers})


def _report_progress(stage: Rank, recipe) -> None:
    """Wrap the recipe's log_dict on rank 0, to report step, loss and speed to the parent, too."""
    _report(stage, recipe)
    if not stage.first:
        return  # distributed recipes have a logger on rank 0 alone
    logger = recipe._metric_logger
    upstream = logger.log_dict

    def log_dict(payload, step):
        upstream(payload, step)
        numbers = {k: round(float(payload[k]), 4) for k in ("loss",) if k in payload}
        speed = payload.get("tokens_per_second_per_gpu")
        if speed is not None:
            numbers["tokens_per_second"] = round(float(speed))
        _report(stage, recipe, step=step, **numbers)

    logger.log_dict = log_dict
