"""Step-level saves and exact resume around torchtune's pinned recipes.

They save once an epoch and forget the data's position. Nothing of a recipe is copied: its
dataloader is replaced, and between two batches nothing of the recipe is under way.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader

from scripts.job.rank import Left, Rank
from scripts.run.errors import InputError
from scripts.tools import agreement, checkpoints

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # under LoRA the adapters alone


class Resumable:
    """Stand in for a recipe's dataloader: same batches, from the step where an attempt left.

    Saves every `every` steps (0: never) and when the stage is asked to stop.
    """

    def __init__(self, rank: Rank, recipe: Any, every: int):
        self.inner, self.recipe, self.rank, self.every = recipe._dataloader, recipe, rank, every
        self.folder = rank.directory / "checkpoints"
        self.saving, self.random = None, None
        self.stop = agreement.Stop(rank)
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.schedule = getattr(recipe, "_lr_scheduler", None)  # qat has none
        recipe._dataloader = self

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # the recipes use its sampler and its state_dict

    def __iter__(self) -> Iterator:
        recipe = self.recipe
        batches_per_step, steps = recipe._gradient_accumulation_steps, recipe._steps_per_epoch
        done = recipe.global_step - recipe.epochs_run * steps
        first, end = done * batches_per_step, steps * batches_per_step
        options = {
            "batch_sampler": islice(iter(self.inner.batch_sampler), first, end),
            "collate_fn": self.inner.collate_fn,
        }
        loader = iter(DataLoader(self.inner.dataset, **options))
        if self.random is not None:
            restore_random(self.random)  # after the loader, which draws a number itself
            self.random = None
        before = recipe.global_step
        for batch in loader:
            yield batch
            if recipe.global_step != before:
                before = recipe.global_step
                self._between_steps(before)

    def _between_steps(self, step: int) -> None:
        asked = self.stop.asked()
        if asked or (self.every and step % self.every == 0):
            self.save(step)
        if asked:
            self.wait()
            raise Left

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        recipe = self.recipe
        return {
            "model": get_model_state_dict(recipe._model, options=TRAINED),
            "optimizer": get_optimizer_state_dict(
                recipe._model, self._optimizers(), options=TRAINED
            ),
            "schedule": self.schedule.state_dict() if self.schedule else {},
            "progress": {"step": recipe.global_step, "epochs": recipe.epochs_run},
            f"random-{self.rank.number}": random_state(),
        }

    def _optimizers(self) -> list:
        """Return one, or one for each parameter where the recipe steps in the backward pass."""
        if self.recipe._optimizer:
            return [self.recipe._optimizer]
        return list(self.recipe._optim_ckpt_wrapper.optim_map.values())

    def save(self, step: int) -> None:
        """Write checkpoints/step-<step> while training goes on.

        The two whole ones before it stay until it is whole.
        """
        self.wait()
        self.rank.phase("saves")
        options = {"process_group": self.group} if self.group else {}
        folder = self.folder / f"step-{step}"
        self.saving = dcp.async_save(self.state(), checkpoint_id=folder, **options)

    def wait(self) -> None:
        """Wait until the save under way is on the disk. Raises what went wrong with it."""
        if self.saving is not None:
            self.saving.result()
            self.saving = None
            if self.rank.first:
                checkpoints.prune(self.folder)

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one, and remove later steps' exports.

        Raises InputError if it is damaged and the only one, or of another model or another number
        of ranks.
        """
        recipe, first = self.recipe, self.rank.first
        newest = [agreement.step_to_go_on_from(self.rank) if first else None]
        if self.group:
            dist.broadcast_object_list(newest, 0, group=self.group)
        if newest[0] is not None:
            self._load(self.folder / f"step-{newest[0]}")
        for epoch in self.folder.glob("epoch_*") if first else []:
            if int(epoch.name.partition("_")[2]) >= recipe.epochs_run:
                shutil.rmtree(epoch)

    def _load(self, step: Path) -> None:
        recipe, state = self.recipe, self.state()
        model = {f"model.{name}": value.shape for name, value in state["model"].items()}
        found = checkpoints.misfit(step, model, "random-", self.rank.environment.world)
        if found:
            raise InputError(found)
        dcp.load(state, checkpoint_id=step, process_group=self.group, no_dist=self.group is None)
        set_model_state_dict(recipe._model, state["model"], options=TRAINED)
        optimizers = self._optimizers()
        set_optimizer_state_dict(recipe._model, optimizers, state["optimizer"], options=TRAINED)
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        recipe.global_step = state["progress"]["step"]
        recipe.epochs_run = state["progress"]["epochs"]
        self.random = state[f"random-{self.rank.number}"]


def random_state() -> dict[str, torch.Tensor]:
    """Return the states of torch's generators: dropout must go on as if nothing had happened."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random(state: dict[str, torch.Tensor]) -> None:
    """Put random_state's states back."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
