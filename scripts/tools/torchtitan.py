"""One rank of torchtitan: registers model and data, checks the options, trains, exports."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from scripts.corpus.tokens import HELD_TEXT, Tokens
from scripts.job.rank import Rank
from scripts.run import preflight
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.tools import agreement, torchtitan_options
from scripts.tools.checkpoints import misfit
from scripts.tools.config_check import against_dataclass
from scripts.tools.data_check import tokenizer_differs

FLAVOR = "relay"  # what torchtitan calls the run's model and text


def overrides(stage: Rank) -> list[str]:
    """Return what the run decides, as torchtitan's own flags; the user's flags follow and win."""
    import torch

    flags = {
        "model.flavor": FLAVOR,
        "model.hf_assets_path": str(_assets(stage)),
        "training.dataset": FLAVOR,
        "job.dump_folder": str(stage.directory),
        "checkpoint.folder": "checkpoints",
        "metrics.save_tb_folder": f"metrics/attempt-{stage.attempt_number}",
    }
    if stage.facts.get("FROM"):
        flags["checkpoint.initial_load_path"] = str(stage.path("FROM"))
    if not torch.accelerator.is_available():
        # A CPU without AVX512-BF16 or AMX emulates bfloat16, ten times slower.
        flags["training.mixed_precision_param"] = "float32"
    given = [word for key, value in flags.items() for word in (f"--{key}", value)]
    if stage.facts.get("FROM"):
        given += ["--checkpoint.initial_load_in_hf"]
    return given + stage.arguments


def load_config(stage: Rank):
    """Make torchtitan's JobConfig from the frozen TOML, the run and the user's arguments.

    Raises InputError with every unknown section, unknown key and wrong type at once.
    """
    import tomllib
    from torchtitan.config import JobConfig

    try:
        values = tomllib.loads(stage.config.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{stage.config}: not TOML: {error}") from None
    found = [f"{stage.config}: {problem}" for problem in against_dataclass(JobConfig, values)]
    if found:
        raise InputError(found)
    return torchtitan_options.parse(["--job.config_file", str(stage.config), *overrides(stage)])


def check(stage: Rank, config) -> None:
    """Raise InputError with all that torchtitan would find out late or not at all."""
    import torch

    from scripts.tools.decoder import sizes

    world = stage.environment.world
    found = torchtitan_options.problems(config, world, not torch.accelerator.is_available())
    _, context = sizes(_assets(stage) / "config.json")
    made = read_json(stage.path("DATA") / "data.json")
    tokens = made["tokens"]
    if not tokens:
        found.append(f"{stage.path('DATA')}: holds no text to pretrain on; give DATA texts")
    found += tokenizer_differs(made, _assets(stage))
    samples = config.training.local_batch_size * torchtitan_options.data_parallel(config, world)
    batch = config.training.seq_len * max(config.training.global_batch_size, samples)
    if tokens and tokens < batch:
        found.append(
            f"{stage.path('DATA')}: {tokens} tokens are less than one batch of {batch} "
            "(seq_len × batch size × data-parallel processes); give more DATA, or a smaller "
            "--training.local_batch_size"
        )
    if config.training.seq_len > context:
        found.append(
            f"training.seq_len {config.training.seq_len} is more than the model's "
            f"max_position_embeddings {context}"
        )
    if config.validation.enable:
        found += _validation_problems(stage, config, context, made["vocabulary"])
    found += _needs(stage, config, world)
    if found:
        raise InputError(found)


def _validation_problems(stage: Rank, config, context: int, vocabulary: int) -> list[str]:
    """Return why the held-out text cannot be validated with."""
    length, folder = config.validation.seq_len, stage.path("DATA") / HELD_TEXT
    if length > context:
        return [f"validation.seq_len {length} is more than max_position_embeddings {context}"]
    if Tokens(folder, length, vocabulary).sequences:
        return []
    return [
        f"validation.enable: {folder} holds less than one sequence of {length} tokens; a smaller "
        "--validation.seq_len, or more held out (make data VALIDATION=)"
    ]


def _needs(stage: Rank, config, world: int) -> list[str]:
    """Return what the machine lacks of disk and memory.

    Counted in bytes: weights, gradients and Adam's two moments, each in training.dtype and
    sharded over all ranks but replicas; a checkpoint holds three of the four.
    """
    import torch
    from torchtitan.config import TORCH_DTYPE_MAP

    from scripts.tools.decoder import count

    parameters = count(_assets(stage))
    weights = parameters * TORCH_DTYPE_MAP[config.training.dtype].itemsize
    export = parameters * TORCH_DTYPE_MAP[config.checkpoint.export_dtype].itemsize
    saves = config.training.steps // config.checkpoint.interval + 1
    # Two more than are kept: torchtitan lists what to remove before a save has made its folder,
    # and not after the last.
    keep = config.checkpoint.keep_latest_k
    copies = min(saves, keep + 2) if keep else saves
    what = f"{copies} checkpoints and the model"
    found = preflight.disk_problems(stage.directory, weights * 3 * copies + export, what)
    share = weights * 4 * max(1, config.parallelism.data_parallel_replicate_degree) / world
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info(stage.environment.local_rank)[0]
        return found + preflight.memory_problems(share, "training on each GPU", free)
    return found + preflight.memory_problems(share * stage.environment.processes, "training here")


def _assets(stage: Rank) -> Path:
    """Return the directory with config.json and tokenizer: FROM, or what the parent composed."""
    return stage.path("FROM") if "FROM" in stage.facts else stage.directory / "assets"


def train(stage: Rank) -> None:
    """Do one rank's work: check, train on from the newest whole checkpoint, export.

    Raises InputError.
    """
    from scripts.tools import patches
    from scripts.tools.decoder import tell_unproven

    stage.phase("imports torchtitan")
    patches.torchtitan(stage.environment.world)
    config = load_config(stage)
    check(stage, config)
    _register(stage, config.model.name)
    tell_unproven(stage, _assets(stage))
    folder, newest = stage.directory / "checkpoints", None
    if stage.first:  # the other ranks wait for this one in their first collective
        newest = agreement.step_to_go_on_from(stage)
    import torch.distributed as dist
    from torchtitan.tools.logging import init_logger

    init_logger()
    stage.phase("builds the model")
    trainer = _trainer_class(stage)(config)
    if newest is not None:
        _check_fit(folder / f"step-{newest}", trainer)
    _report_progress(stage, trainer)
    stage.phase("loads the text and the checkpoint")
    try:
        trainer.train()
        stage.report(step=trainer.step, total=config.training.steps)  # no step of a log, perhaps
        dist.barrier()
        if not trainer.left:
            stage.phase("exports the model")
            export(trainer, stage.directory / "export")
    finally:
        trainer.close()
    dist.destroy_process_group()


def _trainer_class(stage: Rank) -> type:
    """Make torchtitan's trainer report its first step and leave when the stage is asked to.

    Every rank leaves at the same step, with a checkpoint of it. torchtitan 0.2.2 has no hook for
    either.
    """
    from torchtitan.train import Trainer

    stop = agreement.Stop(stage)

    class StoppableTrainer(Trainer):
        first, left = None, False  # the step it starts from; whether it left before the last

        def should_continue_training(self) -> bool:
            if self.first is None:
                self.first = self.step
                stage.report(step=self.step, total=self.job_config.training.steps)
            if not super().should_continue_training():
                return False
            if not stop.asked():
                return True
            # A kill would tear a whole checkpoint that is written over: neither the one that was
            # loaded nor one just saved is saved again.
            if self.step != self.first and not self.checkpointer._should_save(self.step):
                self.checkpointer.save(self.step, last_step=True)
            self.checkpointer._async_wait()
            self.left = True
            return False

    return StoppableTrainer


def _check_fit(step: Path, trainer) -> None:
    """Raise InputError if a checkpoint is of another model or of another number of ranks.

    torchtitan would fail inside its loader, or start the data anew.
    """
    parts = [part.state_dict() for part in trainer.model_parts]
    model = {name: tuple(value.shape) for part in parts for name, value in part.items()}
    found = misfit(step, model, "dataloader.dp_rank_", trainer.dataloader.dp_world_size)
    if found:
        raise InputError(found)


def export(trainer, directory: Path) -> None:
    """Write the trained weights as Hugging Face safetensors, from rank 0.

    torchtitan's own export reorders the heads of sharded tensors and fails where the number of
    heads does not divide by the number of shards ("Cannot unflatten unevenly sharded tensor"); so
    each tensor is gathered first, one at a time, and only rank 0 keeps it, in main memory.
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
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_torch_state_dict(weights, directory)
    dist.barrier()


def _register(stage: Rank, name: str) -> None:
    """Make torchtitan know the run's model and token shards under a name of train_spec()."""
    from torchtitan.components import validate
    from torchtitan.protocols.train_spec import register_train_spec

    from scripts.tools.torchtitan_data import builder, validation_builder
    from scripts.tools.torchtitan_model import train_spec

    data = stage.path("DATA")
    vocabulary = read_json(data / "data.json")["vocabulary"]
    # Its validator asks for this by name, and would download allenai/c4.
    validate.build_text_validation_dataloader = validation_builder(data / HELD_TEXT, vocabulary)
    spec = dataclasses.replace(
        train_spec(name, FLAVOR, _assets(stage)),
        build_dataloader_fn=builder(data / "text", vocabulary),
    )
    register_train_spec(name, spec)


def _report_progress(stage: Rank, trainer) -> None:
    """Wrap torchtitan's metrics.log, to report step, loss and speed to the parent as well; and
    log_validation, whose loss is a sentence; and say when it saves."""
    metrics, checkpointer = trainer.metrics_processor, trainer.checkpointer
    upstream, upstream_validation = metrics.log, metrics.log_validation
    upstream_save = checkpointer.save

    def log(step, loss, *arguments, **keywords):
        import time

        speed = metrics.ntokens_since_last_log / (time.perf_counter() - metrics.time_last_log)
        upstream(step, loss, *arguments, **keywords)
        numbers = {"loss": round(loss, 4), "tokens_per_second": round(speed)}
        stage.report(step=step, total=trainer.job_config.training.steps, **numbers)

    def log_validation(loss, step, *arguments, **keywords):
        upstream_validation(loss, step, *arguments, **keywords)
        if stage.first:
            stage.say(f"step {step}: loss {loss:.4f} on held-out text")

    def save(step, last_step=False):
        if last_step or checkpointer._should_save(step):
            stage.phase("saves")  # it may take longer than any step: that is no hang
        upstream_save(step, last_step=last_step)

    metrics.log, metrics.log_validation, checkpointer.save = log, log_validation, save
