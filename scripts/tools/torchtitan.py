"""torchtitan around the pinned release: this run's model and data registered, its options checked, its trainer run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from scripts.job.rank import Rank
from scripts.run import preflight
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.tools.checkpoints import misfit
from scripts.tools.config_check import against_dataclass

SPEC = "relay"  # the names under which the run's model and text are registered with torchtitan


def overrides(stage: Rank) -> list[str]:
    """What the run decides, as torchtitan's own flags; the user's flags follow and win."""
    flags = {
        "model.name": SPEC,
        "model.flavor": SPEC,
        "model.hf_assets_path": str(_assets(stage)),
        "training.dataset": SPEC,
        "training.dataset_path": str(stage.path("DATA") / "text.jsonl"),
        "job.dump_folder": str(stage.directory),
        "checkpoint.folder": "checkpoints",
        "metrics.save_tb_folder": f"metrics/attempt-{stage.attempt_number}",
    }
    if stage.facts.get("FROM"):
        flags["checkpoint.initial_load_path"] = str(stage.path("FROM"))
    given = [word for key, value in flags.items() for word in (f"--{key}", value)]
    if stage.facts.get("FROM"):
        given += ["--checkpoint.initial_load_in_hf"]
    return given + stage.arguments


def load_config(stage: Rank):
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


def check(stage: Rank, config) -> None:
    """What torchtitan would find out late or not at all. Raises InputError with everything at once."""
    from scripts.tools.architecture import read_architecture

    found = []
    sizes = read_architecture(_assets(stage) / "config.json")
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
    if 0 < config.checkpoint.keep_latest_k < 3:
        found.append("checkpoint.keep_latest_k must be 0 (all) or at least 3: the one being written counts, two stay whole")
    found += _needs(stage, config, world)
    if found:
        raise InputError(found)


def _needs(stage: Rank, config, world: int) -> list[str]:
    """Disk and memory for float32 weights, gradients and Adam's two moments: 4 bytes each a parameter, sharded."""
    import torch

    count = preflight.parameters(read_json(_assets(stage) / "config.json"))
    saves = config.training.steps // config.checkpoint.interval + 1
    # Two more than are kept: torchtitan lists what to remove before a save has made its folder, and not after the last.
    copies = min(saves, config.checkpoint.keep_latest_k + 2) if config.checkpoint.keep_latest_k else saves
    what = f"{copies} checkpoints and the model"
    found = preflight.disk_problems(stage.directory, count * (12 * copies + 4), what)
    share = count * 16 * max(1, config.parallelism.data_parallel_replicate_degree) / world
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info(int(os.environ["LOCAL_RANK"]))[0]
        return found + preflight.memory_problems(share, "training on each GPU", free)
    return found + preflight.memory_problems(share * stage.processes, "training here")


def _assets(stage: Rank) -> Path:
    """The directory with config.json and tokenizer: FROM, or what the parent composed for this attempt."""
    return stage.path("FROM") if "FROM" in stage.facts else stage.directory / "assets"


def train(stage: Rank) -> None:
    """One rank, whole: check, train to the last step from the newest whole checkpoint, export."""
    from scripts.tools import patches

    patches.torchtitan_on_cpu()
    patches.checkpoints_without_collectives()
    config = load_config(stage)
    check(stage, config)
    _register(stage)
    folder, newest = stage.directory / "checkpoints", None
    if os.environ["RANK"] == "0":  # the other ranks wait for this one where they meet
        newest = stage.checkpoint()
    import torch.distributed as dist
    from torchtitan.tools.logging import init_logger

    patches.torchtitan_without_a_nap()
    init_logger()
    trainer = _trainer_class(stage)(config)
    if newest is not None:
        _check_fit(folder / f"step-{newest}", trainer)
    _report_progress(stage, trainer)
    try:
        trainer.train()
        dist.barrier()
        if not trainer.left:
            export(trainer, stage.directory / "export")
    finally:
        trainer.close()
    dist.destroy_process_group()


def _trainer_class(stage: Rank) -> type:
    """torchtitan's trainer, which says where it starts and leaves when the stage is asked to: every rank at the
    same step, with a checkpoint of it. torchtitan 0.2.2 has no hook for either."""
    from torchtitan.train import Trainer

    class StoppableTrainer(Trainer):
        first, left = None, False  # the step it starts from; whether it left before the last

        def should_continue_training(self) -> bool:
            if self.first is None:
                self.first = self.step
                stage.report(step=self.step, total=self.job_config.training.steps)
            if not super().should_continue_training():
                return False
            if not stage.asked_to_stop():
                return True
            # Written over, a whole checkpoint would be torn by a kill: not the one loaded, nor one just saved.
            if self.step != self.first and not self.checkpointer._should_save(self.step):
                self.checkpointer.save(self.step, last_step=True)
            self.checkpointer._async_wait()
            self.left = True
            return False

    return StoppableTrainer


def _check_fit(step: Path, trainer) -> None:
    """Raises InputError if a checkpoint was made by another model or by another number of ranks: torchtitan would
    fail inside its loader, or start the data anew."""
    model = {name: tuple(value.shape) for part in trainer.model_parts for name, value in part.state_dict().items()}
    found = misfit(step, model, "dataloader.dp_rank_", trainer.dataloader.dp_world_size)
    if found:
        raise InputError(found)


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


def _register(stage: Rank) -> None:
    """Make torchtitan know the run's model and text under the name SPEC."""
    from datasets import load_dataset
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets.text_datasets import DATASETS
    from torchtitan.models.llama3 import get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec

    from scripts.tools.architecture import torchtitan_model_args

    model_args = torchtitan_model_args(_assets(stage) / "config.json")
    register_train_spec(SPEC, dataclasses.replace(get_train_spec(), model_args={SPEC: model_args}))
    DATASETS[SPEC] = DatasetConfig(
        path="",
        loader=lambda path: load_dataset("json", data_files=path, split="train"),
        sample_processor=lambda sample: sample["text"],
    )


def _report_progress(stage: Rank, trainer) -> None:
    """Pass each logged step on to the parent, which shows it with the time left."""
    metrics = trainer.metrics_processor
    upstream = metrics.log

    def log(step, loss, *arguments, **keywords):
        import time

        speed = metrics.ntokens_since_last_log / (time.perf_counter() - metrics.time_last_log)
        upstream(step, loss, *arguments, **keywords)
        stage.report(step=step, total=trainer.job_config.training.steps, loss=round(loss, 4), tokens_per_second=round(speed))

    metrics.log = log
