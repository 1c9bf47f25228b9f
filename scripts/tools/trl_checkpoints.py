"""Exact resume, stops and progress for a trainer of transformers, by its own callbacks.

It writes checkpoint-<step>/ file by file; whole.json, written last, names their sizes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Optional

from scripts.job.rank import Rank
from scripts.run.errors import InputError
from scripts.run.files import read_json, write_json
from scripts.tools import agreement

WHOLE = "whole.json"


def newest(rank: Rank) -> Optional[str]:
    """Return the checkpoint to go on from, None for a fresh start, the same to every rank; say what
    is set aside. Raises InputError if damaged ones are all there is."""
    import torch.distributed as dist

    found = [_newest(rank) if rank.first else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found, 0)
    return found[0]


def _newest(rank: Rank) -> Optional[str]:
    folders = sorted(
        (rank.directory / "checkpoints").glob("checkpoint-*"),
        key=lambda path: int(path.name.rpartition("-")[2]),
        reverse=True,
    )
    damaged = []
    for folder in folders:
        sizes = read_json(folder / WHOLE)
        if sizes is None:
            shutil.rmtree(folder)
            rank.say(f"{folder.name} was cut short while it was saved: removed")
            continue
        if _sizes(folder) == sizes:
            for other in damaged:
                os.replace(other, other.with_name(other.name.replace("checkpoint", "damaged")))
                rank.say(f"{other.name} is damaged: set aside")
            rank.say(f"goes on from its checkpoint of step {folder.name.rpartition('-')[2]}")
            return str(folder)
        damaged.append(folder)
    if damaged:
        mend = "restore it from a copy, or start the stage again: make clean with its RUN and STAGE"
        raise InputError(f"{damaged[0]}: its files are not as they were saved; {mend}")
    if rank.attempt_number > 1:
        rank.say("nothing had been saved yet: starts at step 0")
    return None


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != WHOLE}


def watcher(rank: Rank, trainer: Any) -> Any:
    """Make the callback that reports steps, marks saves as whole, and saves and leaves when the
    stage is asked to stop; its `left` tells whether it did."""
    import torch
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.left, self.stop = False, agreement.Stop(rank)
            self.steps = self.untaught = 0  # in this attempt; those whose rewards were all equal

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            rank.report(step=state.global_step, total=state.max_steps)

        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **more: Any) -> None:
            # Equal rewards teach nothing, but Adam makes steps of full size of their rounding.
            spread = trainer._metrics["train"].get("frac_reward_zero_std", [0])
            self.steps += 1
            if spread[-1] == 1:
                self.untaught += 1
                for parameter in model.parameters():
                    parameter.grad = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.stop.asked():
                self.left = control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # each rank has written its random state
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            if rank.first:
                for path in folder.iterdir():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                write_json(folder / WHOLE, _sizes(folder))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            found = {"reward": round(logs["reward"], 4)} if "reward" in (logs or {}) else {}
            rank.report(step=state.global_step, total=state.max_steps, **found)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            rank.report(step=state.global_step, total=state.max_steps)
            if self.untaught and rank.first:
                rank.say(
                    f"{self.untaught} of {self.steps} steps taught nothing: all answers to a "
                    "prompt had the same reward; rewards that tell them apart, a higher "
                    "temperature or more num_generations help"
                )

    return Watcher()
