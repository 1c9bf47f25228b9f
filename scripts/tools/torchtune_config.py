"""A run's configuration of torchtune: the frozen YAML completed, merged with ARGS, checked."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any, Optional

from scripts.job.rank import Rank
from scripts.run.digests import sha256
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.run.layout import ROOT
from scripts.run.modeldir import problems, weight_files
from scripts.tools.config_check import against_signature, unknown, wrong_type
from scripts.tools.torchtune_config_keys import KEYS

# Ours: the stock recipe, how often it saves, and the directory of a distillation's teacher.
OWN_KEYS = {"recipe", "save_every_n_steps", "teacher"}
TOKENIZER = "tokenizer.json"


def device(config: str, arguments: list[str]) -> str:
    """Return the device that a config's text and the key=value arguments name, the last argument
    first; "" if none does."""
    given = [word[len("device=") :] for word in arguments if word.startswith("device=")]
    found = re.search(r"^device:\s*[\"']?(\w+)", config, re.M)
    return given[-1] if given else found[1] if found else ""


def load_config(stage: Rank, dataset: str):
    """Merge the frozen YAML, what the run decides, and the user's key=value arguments.

    Later ones win. Returns torchtune's DictConfig. Raises InputError.
    """
    from omegaconf import OmegaConf
    from torchtune.config._parse import TuneRecipeArgumentParser
    from torchtune.config._utils import _merge_yaml_and_cli_args

    source = stage.path("FROM")
    run = {
        "output_dir": str(stage.directory / "checkpoints"),
        **_weights_of("checkpointer", "model", source, stage),
        "tokenizer.path": str(source),
        "tokenizer.max_seq_len": read_json(stage.path("DATA") / "data.json")["max_seq_len"],
        # datasets takes [ ] * ? in a path for a pattern.
        "dataset.data_files": [
            glob.escape(str(path))
            for path in sorted((stage.path("DATA") / dataset).glob("*.jsonl"))
        ],
        "metric_logger.log_dir": str(
            stage.directory / "metrics" / f"attempt-{stage.attempt_number}"
        ),
    }
    try:
        parser = TuneRecipeArgumentParser()
        given = ["--config", str(stage.config), *stage.arguments]
        values, arguments = parser.parse_known_args(given)
        base = OmegaConf.create(vars(values))
        if "ref_checkpointer" in base:
            run.update(_weights_of("ref_checkpointer", "", source, stage))
        if teacher := _teacher(stage, base):
            run.update(_weights_of("teacher_checkpointer", "teacher_model", teacher, stage))
        for key, value in run.items():
            OmegaConf.update(base, key, value, force_add=True)
        values.__dict__ = OmegaConf.to_container(base, resolve=False)
        cfg = _merge_yaml_and_cli_args(values, arguments)
    except InputError:
        raise
    except Exception as error:  # YAML, OmegaConf and torchtune each raise their own
        raise InputError(f"{stage.config} with ARGS={stage.arguments}: {error}") from None
    decide(cfg, source)
    return cfg


def _weights_of(checkpointer: str, model: str, source: Path, stage: Rank) -> dict[str, Any]:
    """Return the keys that point a checkpointer, and a model unless it is "", at a directory."""
    where = {
        f"{checkpointer}.checkpoint_dir": str(source),
        f"{checkpointer}.checkpoint_files": weight_files(source),
        f"{checkpointer}.output_dir": str(stage.directory / "checkpoints"),
    }
    return {**where, **({f"{model}.model_dir": str(source)} if model else {})}


def teacher_of(arguments: list[str]) -> Optional[Path]:
    """Return the directory of a distillation's teacher that the arguments name."""
    given = [word[len("teacher=") :] for word in arguments if word.startswith("teacher=")]
    return ROOT / Path(given[-1]).expanduser() if given and given[-1] else None


def _teacher(stage: Rank, cfg: Any) -> Optional[Path]:
    """Return the directory of the teacher of a config that wants one. Raises InputError."""
    if "teacher" not in cfg:
        return None
    directory, student = teacher_of(stage.arguments), stage.path("FROM")
    if directory is None:
        raise InputError("teacher: missing; give a Hugging Face directory: ARGS=teacher=dir")
    if not directory.is_dir():
        raise InputError(f"teacher={directory}: no such directory; give a Hugging Face directory")
    found = problems(directory)
    if not found and sha256(directory / TOKENIZER) != sha256(student / TOKENIZER):
        found = [
            f"teacher {directory}: has another tokenizer than {student}; its answers would be of "
            "other tokens"
        ]
    if found:
        raise InputError(found)
    return directory


def decide(cfg: Any, source: Path) -> None:
    """Fill in what a config leaves to the machine and to the model: device and dtype (null), and
    the names of the layers that LoRA adapts (all)."""
    import torch

    if cfg.get("device") is None:
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.get("dtype") is None:
        cfg.dtype = "fp32" if cfg.device == "cpu" else "bf16"
    if (cfg.get("model") or {}).get("lora_attn_modules") == ["all"]:
        # Recipes look for adapters by these names, so they must be there.
        from scripts.tools.torchtune_model import decoder, linear_layers

        with torch.device("meta"):
            cfg.model.lora_attn_modules = sorted(linear_layers(decoder(str(source))))


def wrong_keys(cfg) -> list[str]:
    """Return a config's unknown keys, wrong types and missing components, for its recipe."""
    from torchtune.config._utils import _get_component_from_path

    known = KEYS[cfg.recipe] | OWN_KEYS
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
    "batch_size": int,
    "epochs": int,
    "gradient_accumulation_steps": int,
    "log_every_n_steps": int,
    "max_steps_per_epoch": Optional[int],
    "seed": Optional[int],
    "save_every_n_steps": Optional[int],
    "shuffle": bool,
    "compile": bool,
    "resume_from_checkpoint": bool,
    "optimizer_in_bwd": bool,
    "log_peak_memory_stats": bool,
    "output_dir": str,
    "device": Optional[str],
    "dtype": Optional[str],
    "recipe": str,
}
