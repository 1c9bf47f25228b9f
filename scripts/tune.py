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

from scripts import rundir
from scripts.configcheck import against_signature, unknown, wrong_type
from scripts.errors import InputError
from scripts.modeldir import hand_over, problems, weight_files
from scripts.stage import Stage

OWN_KEYS = {"recipe"}  # ours, beside torchtune's: which stock recipe the config is for


def main(stage: Stage) -> dict:
    """Around the ranks: a whole input before, the last epoch's weights handed over after."""
    source, data = stage.path("FROM"), stage.path("DATA")
    found = problems(source)
    if found:
        raise InputError(found)
    checkpoints = stage.scratch("checkpoints")
    stage.ranks()
    newest = max(checkpoints.glob("epoch_*"), key=lambda p: int(p.name.split("_")[1]))
    for leftover in newest.glob("*.pt"):
        leftover.unlink()  # adapters as pickle: only safetensors go between stages
    for part in newest.glob("adapter_*"):
        part.unlink()
    model = hand_over(newest, source, stage.directory / "model")
    return {
        "inputs": {"model": rundir.describe(source), "data": rundir.describe(data)},
        "outputs": {"model": model},
        "summary": stage.progress,
    }


def train(stage: Stage, dataset: str) -> None:
    """One rank, whole: configuration, checks, the recipe. `dataset` is the file of DATA to train on."""
    from scripts import compat

    compat.torchtune_on_cpu()
    import torch.distributed as dist
    from torchtune.training import get_distributed_backend

    cfg = load_config(stage, dataset)
    recipe_class = find_recipe(cfg.recipe, stage.nodes * stage.processes)
    check(stage, cfg, recipe_class)
    if stage.nodes * stage.processes > 1 and "init_process_group(" not in inspect.getsource(recipe_class):
        dist.init_process_group(get_distributed_backend(cfg.device))
    recipe = recipe_class(cfg=cfg)
    recipe.setup(cfg=cfg)
    _report_progress(stage, recipe)
    recipe.train()
    recipe.cleanup()


def load_config(stage: Stage, dataset: str):
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
        "metric_logger.log_dir": str(stage.directory / "metrics"),
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


def check(stage: Stage, cfg, recipe_class: type) -> None:
    """Unknown keys, wrong types and missing components, all at once: torchtune ignores a misspelt key."""
    found = [f"{stage.config}: {problem}" for problem in wrong_keys(cfg, recipe_class)]
    if found:
        raise InputError(found)
    rows = Path(cfg.dataset.data_files).read_text(encoding="utf-8").count("\n")
    batch = cfg.batch_size * stage.nodes * stage.processes
    if rows < batch:
        raise InputError(
            f"{cfg.dataset.data_files}: {rows} rows are less than one batch of {batch} "
            "(batch_size × processes); give more DATA, or a smaller batch_size"
        )


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
    **dict.fromkeys(("max_steps_per_epoch", "seed"), Optional[int]),
    **dict.fromkeys(("shuffle", "compile", "resume_from_checkpoint", "optimizer_in_bwd", "log_peak_memory_stats"), bool),
    **dict.fromkeys(("output_dir", "device", "dtype", "recipe"), str),
}


def _report_progress(stage: Stage, recipe) -> None:
    """Pass each logged step on to the parent, which shows it with the time left."""
    if os.environ["RANK"] != "0":
        return  # distributed recipes have a logger on rank 0 alone
    logger = recipe._metric_logger
    upstream, total = logger.log_dict, recipe.total_epochs * recipe._steps_per_epoch

    def log_dict(payload, step):
        upstream(payload, step)
        numbers = {k: round(float(payload[k]), 4) for k in ("loss",) if k in payload}
        speed = payload.get("tokens_per_second_per_gpu")
        if speed is not None:
            numbers["tokens_per_second"] = round(float(speed))
        stage.report(step=step, total=total, **numbers)

    logger.log_dict = log_dict
