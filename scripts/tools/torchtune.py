"""torchtune around the pinned release: this run's model and data put into the config, its keys checked, the stock
recipe run. Finetune and align differ in their config and in the set they train on, nowhere else."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any, Optional

from scripts.job.rank import Rank
from scripts.job.stage import Stage
from scripts.run import digests, preflight
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.run.modeldir import hand_over, problems, weight_files
from scripts.tools.config_check import against_signature, unknown, wrong_type

OWN_KEYS = {"recipe", "save_every_n_steps"}  # ours, beside torchtune's: the stock recipe, and how often it saves


def main(stage: Stage) -> dict:
    """Around the ranks: a whole input before, the last epoch's weights handed over after."""
    source, data = stage.path("FROM"), stage.path("DATA")
    found = problems(source)
    if found:
        raise InputError(found)
    stage.ranks()
    newest = max((stage.directory / "checkpoints").glob("epoch_*"), key=lambda p: int(p.name.split("_")[1]))
    for leftover in newest.glob("*.pt"):
        leftover.unlink()  # adapters as pickle: only safetensors go between stages
    for part in newest.glob("adapter_*"):
        part.unlink()
    model = hand_over(newest, source, stage.directory / "model")
    return {
        "inputs": {"model": digests.describe(source), "data": digests.describe(data)},
        "outputs": {"model": model},
        "summary": stage.progress,
    }


def train(stage: Rank, dataset: str) -> None:
    """One rank, whole: configuration, checks, the recipe. `dataset` is the file of DATA to train on."""
    from scripts.tools import patches

    patches.torchtune_on_cpu()
    patches.checkpoints_without_collectives()
    import torch.distributed as dist
    from torchtune.training import get_distributed_backend

    from scripts.tools.torchtune_resume import Resumable

    cfg = load_config(stage, dataset)
    recipe_class = find_recipe(cfg.recipe, stage.nodes * stage.processes)
    check(stage, cfg, recipe_class)
    if stage.nodes * stage.processes > 1 and "init_process_group(" not in inspect.getsource(recipe_class):
        dist.init_process_group(get_distributed_backend(cfg.device))
    recipe = recipe_class(cfg=cfg)
    recipe.setup(cfg=cfg)
    batches = Resumable(stage, recipe, cfg.get("save_every_n_steps") or 0)
    batches.resume()
    _report_progress(stage, recipe)
    recipe.train()
    batches.wait()
    recipe.cleanup()


def load_config(stage: Rank, dataset: str):
    """The frozen YAML, then what the run decides, then the user's key=value arguments. Raises InputError."""
    from omegaconf import OmegaConf
    from torchtune.config._parse import TuneRecipeArgumentParser
    from torchtune.config._utils import _merge_yaml_and_cli_args

    source = stage.path("FROM")
    run = {
        "output_dir": str(stage.directory / "checkpoints"),
        "checkpointer.checkpoint_dir": str(source),
        "checkpointer.checkpoint_files": weight_files(source),
        "checkpointer.output_dir": str(stage.directory / "checkpoints"),
        "model.model_dir": str(source),
        "tokenizer.path": str(source),
        "dataset.data_files": str(stage.path("DATA") / dataset),
        "metric_logger.log_dir": str(stage.directory / "metrics" / f"attempt-{stage.attempt_number}"),
    }
    try:
        parser = TuneRecipeArgumentParser()
        values, arguments = parser.parse_known_args(["--config", str(stage.config), *stage.arguments])
        base = OmegaConf.create(vars(values))
        for key, value in run.items():
            OmegaConf.update(base, key, value, force_add=True)
        values.__dict__ = OmegaConf.to_container(base, resolve=False)
        return _merge_yaml_and_cli_args(values, arguments)
    except Exception as error:  # YAML, OmegaConf and torchtune each raise their own
        raise InputError(f"{stage.config} with ARGS={stage.arguments}: {error}") from None


def find_recipe(name: str, world: int) -> type:
    """The stock recipe class: <name>_single_device for one process where there is one, else <name>_distributed."""
    import torchtune
    from torchtune.recipe_interfaces import FTRecipeInterface

    folder = Path(torchtune.__file__).parent.parent / "recipes"  # files to run, not a package to import
    wanted = [f"{name}_single_device", f"{name}_distributed"] if world == 1 else [f"{name}_distributed"]
    found = [w for w in wanted if (folder / f"{w}.py").exists()]
    if not found:
        known = sorted({re.sub(r"_(single_device|distributed)$", "", p.stem) for p in folder.glob("*_d*.py")})
        raise InputError(f"recipe: {name}: torchtune has no {' or '.join(wanted)}; it has {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(f"torchtune_{found[0]}", folder / f"{found[0]}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if FTRecipeInterface in c.__mro__ and c.__module__ == module.__name__
    )


def check(stage: Rank, cfg, recipe_class: type) -> None:
    """Unknown keys, wrong types and missing components, all at once: torchtune ignores a misspelt key."""
    found = [f"{stage.config}: {problem}" for problem in wrong_keys(cfg, recipe_class)]
    if found:
        raise InputError(found)  # what follows trusts types
    rows = Path(cfg.dataset.data_files).read_text(encoding="utf-8").count("\n")
    batch = cfg.batch_size * stage.nodes * stage.processes
    if rows < batch:
        found.append(
            f"{cfg.dataset.data_files}: {rows} rows are less than one batch of {batch} "
            "(batch_size × processes); give more DATA, or a smaller batch_size"
        )
    found += _needs(stage, cfg)
    if found:
        raise InputError(found)


def _needs(stage: Rank, cfg) -> list[str]:
    """Disk and memory: weights, and unless adapters alone are trained, gradients and Adam's two moments."""
    from torchtune.training import get_dtype

    weights = preflight.parameters(read_json(stage.path("FROM") / "config.json")) * get_dtype(cfg.dtype).itemsize
    full = cfg.recipe.startswith("full")
    reference = weights if cfg.recipe.startswith("full_dpo") else 0
    share = (weights * (4 if full else 1) + reference) / stage.nodes
    disk = weights * cfg.epochs + (3 * 3 * weights if full else 0)
    found = preflight.disk_problems(stage.directory, disk, "checkpoints and the model")
    return found + (preflight.memory_problems(share, "training here") if cfg.device == "cpu" else [])


def wrong_keys(cfg, recipe_class: type) -> list[str]:
    """Unknown keys, wrong types and missing components of a config for this recipe."""
    from torchtune.config._utils import _get_component_from_path

    # One config serves one process and many: a key may be for the other variant of the recipe alone.
    file = Path(sys.modules[recipe_class.__module__].__file__)
    variants = file.parent.glob(re.sub(r"_(single_device|distributed)$", "_[sd]*", file.stem) + ".py")
    source = "".join(p.read_text(encoding="utf-8") for p in variants)
    used = set(re.findall(r"(?<![\w.])cfg(?:\.get\(\s*\"(\w+)\"|\[\"(\w+)\"\]|\.(?!get\b)(\w+))", source))
    known = {name for names in used for name in names if name} | {"profiler"} | OWN_KEYS
    found = []
    for key, value in cfg.items():
        if key not in known:
            found.append(unknown(key, known))
        elif hasattr(value, "items") and "_component_" in value:
            try:
                component = _get_component_from_path(value["_component_"])
            except Exception as error:
                found.append(f"{key}._component_: {error}")
                continue
            arguments = {name: item for name, item in value.items() if name != "_component_"}
            found += against_signature(component, arguments, f"{key}.")
        elif key in TYPES and (problem := wrong_type(value, TYPES[key])):
            found.append(f"{key} = {value!r}: {problem}")
    return found


# Types of the recipes' own keys, as the configs that torchtune ships use them (recipes/configs/).
TYPES: dict[str, Any] = {
    **dict.fromkeys(("batch_size", "epochs", "gradient_accumulation_steps", "log_every_n_steps"), int),
    **dict.fromkeys(("max_steps_per_epoch", "seed", "save_every_n_steps"), Optional[int]),
    **dict.fromkeys(("shuffle", "compile", "resume_from_checkpoint", "optimizer_in_bwd", "log_peak_memory_stats"), bool),
    **dict.fromkeys(("output_dir", "device", "dtype", "recipe"), str),
}


def _report_progress(stage: Rank, recipe) -> None:
    """Pass each logged step on to the parent, which shows it with the time left."""
    total = recipe.total_epochs * recipe._steps_per_epoch
    stage.report(step=recipe.global_step, total=total)
    if os.environ["RANK"] != "0":
        return  # distributed recipes have a logger on rank 0 alone
    logger = recipe._metric_logger
    upstream = logger.log_dict

    def log_dict(payload, step):
        upstream(payload, step)
        numbers = {k: round(float(payload[k]), 4) for k in ("loss",) if k in payload}
        speed = payload.get("tokens_per_second_per_gpu")
        if speed is not None:
            numbers["tokens_per_second"] = round(float(speed))
        stage.report(step=step, total=total, **numbers)

    logger.log_dict = log_dict
