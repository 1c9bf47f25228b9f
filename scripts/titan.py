"""torchtitan around the pinned release: this run's model and data registered, its options checked, its trainer run."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path

from scripts.configcheck import against_dataclass
from scripts.errors import InputError
from scripts.rundir import read_json
from scripts.stage import Stage

SPEC = "relay"  # the names under which the run's model and text are registered with torchtitan


def keep_whole_checkpoints(folder: Path) -> None:
    """Remove step folders that were cut short, and the folder if nothing is left.

    torchtitan takes a folder that exists but holds no whole step for a fresh start and trains from random
    weights without a word, even with an initial_load_path. `.metadata` is written last, so it tells.
    """
    for step in folder.glob("step-*") if folder.exists() else []:
        if not (step / ".metadata").exists():
            shutil.rmtree(step)
    if folder.exists() and not any(folder.glob("step-*")):
        shutil.rmtree(folder)


def overrides(stage: Stage) -> list[str]:
    """What the run decides, as torchtitan's own flags; the user's flags follow and win."""
    flags = {
        "model.name": SPEC,
        "model.flavor": SPEC,
        "model.hf_assets_path": str(_assets()),
        "training.dataset": SPEC,
        "training.dataset_path": str(stage.path("DATA") / "text.jsonl"),
        "job.dump_folder": str(stage.directory),
        "checkpoint.folder": "checkpoints",
        "metrics.save_tb_folder": "metrics",
    }
    if stage.facts.get("FROM"):
        flags["checkpoint.initial_load_path"] = str(stage.path("FROM"))
    given = [word for key, value in flags.items() for word in (f"--{key}", value)]
    if stage.facts.get("FROM"):
        given += ["--checkpoint.initial_load_in_hf"]
    return given + stage.arguments


def load_config(stage: Stage):
    """torchtitan's JobConfig from the frozen TOML, the run and the user's arguments.

    Raises InputError with every unknown section, unknown key and wrong type at once.
    """
    import tomllib
    from torchtitan.config import ConfigManager, JobConfig

    try:
        values = tomllib.loads(stage.config.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{stage.config}: not TOML: {error}") from None
    found = [f"{stage.config}: {problem}" for problem in against_dataclass(JobConfig, values)]
    if found:
        raise InputError(found)
    try:
        return ConfigManager().parse_args(["--job.config_file", str(stage.config), *overrides(stage)])
    except SystemExit:  # the parser has already printed which argument and why
        raise InputError(
            f"ARGS={stage.arguments}: torchtitan refuses them (its words are in {stage.log}); "
            "every option: python -m torchtitan.config.manager --help"
        ) from None


def check(stage: Stage, config) -> None:
    """What torchtitan would find out late or not at all. Raises InputError with everything at once."""
    from scripts.architecture import read_architecture

    found = []
    sizes = read_architecture(_assets() / "config.json")
    tokens = (read_json(stage.path("DATA") / "data.json") or {}).get("tokens", 0)
    world = stage.nodes * stage.processes
    batch = config.training.seq_len * max(config.training.global_batch_size, config.training.local_batch_size * world)
    if tokens and tokens < batch:
        found.append(
            f"{stage.path('DATA')}: {tokens} tokens are less than one batch of {batch} "
            "(seq_len × batch size × processes); give more DATA, or a smaller --training.local_batch_size"
        )
    if config.training.seq_len > sizes["context"]:
        found.append(
            f"training.seq_len {config.training.seq_len} is more than the model's max_position_embeddings {sizes['context']}"
        )
    if not config.checkpoint.enable or config.checkpoint.last_save_model_only:
        found.append("checkpoint.enable must be true and last_save_model_only false: else a killed run starts at step 0")
    if found:
        raise InputError(found)


def _assets() -> Path:
    """The directory with config.json and tokenizer that the parent chose for this attempt."""
    return Path(os.environ["RELAY_ASSETS"])


def train(stage: Stage) -> None:
    """One rank, whole: check, train to the last step from the newest whole checkpoint, export."""
    from scripts import compat

    compat.torchtitan_on_cpu()
    compat.checkpoints_without_collectives()
    config = load_config(stage)
    check(stage, config)
    _register(stage)
    import torch.distributed as dist
    from torchtitan.tools.logging import init_logger
    from torchtitan.train import Trainer

    init_logger()
    trainer = Trainer(config)
    _report_progress(stage, trainer)
    try:
        trainer.train()
        export(trainer, stage.directory / "export")
    finally:
        trainer.close()
    dist.destroy_process_group()


def export(trainer, directory: Path) -> None:
    """Write the trained weights as Hugging Face safetensors, from rank 0.

    torchtitan's own export reorders the heads of sharded tensors and fails where the number of heads does not divide
    by the number of shards ("Cannot unflatten unevenly sharded tensor"); so each tensor is gathered first, one at a
    time, and only rank 0 keeps it, in main memory.
    """
    import torch.distributed as dist
    from huggingface_hub import save_torch_state_dict
    from torchtitan.config import TORCH_DTYPE_MAP

    dtype = TORCH_DTYPE_MAP[trainer.job_config.checkpoint.export_dtype]
    whole = {}
    for name, tensor in trainer.checkpointer.states["model"].state_dict().items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if dist.get_rank() == 0:
            whole[name] = tensor.detach().to("cpu", dtype)
    if dist.get_rank() == 0:
        weights = trainer.checkpointer.sd_adapter.to_hf(whole)
        directory.mkdir()
        save_torch_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, directory)
    dist.barrier()


def _register(stage: Stage) -> None:
    """Make torchtitan know the run's model and text under the name SPEC."""
    from datasets import load_dataset
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets.text_datasets import DATASETS
    from torchtitan.models.llama3 import get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec

    from scripts.architecture import torchtitan_model_args

    model_args = torchtitan_model_args(_assets() / "config.json")
    register_train_spec(SPEC, dataclasses.replace(get_train_spec(), model_args={SPEC: model_args}))
    DATASETS[SPEC] = DatasetConfig(
        path="",
        loader=lambda path: load_dataset("json", data_files=path, split="train"),
        sample_processor=lambda sample: sample["text"],
    )


def _report_progress(stage: Stage, trainer) -> None:
    """Pass each logged step on to the parent, which shows it with the time left."""
    metrics = trainer.metrics_processor
    upstream = metrics.log

    def log(step, loss, *arguments, **keywords):
        import time

        speed = metrics.ntokens_since_last_log / (time.perf_counter() - metrics.time_last_log)
        upstream(step, loss, *arguments, **keywords)
        stage.report(step=step, total=trainer.job_config.training.steps, loss=round(loss, 4), tokens_per_second=round(speed))

    metrics.log = log


def loss_curve(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every logged step, from the TensorBoard events under metrics/; a later attempt's value wins."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: dict[int, float] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if re.search(r"(^|/)(global_avg_loss|loss)$", tag):
                points.update((e.step, e.value) for e in events.Scalars(tag))
    return sorted(points.items())
