"""Step folders of torch.distributed.checkpoint: which are whole, which fit, which to keep.

checkpoints/step-<n>/ holds .metadata (written last, names every shard's size) and the shards;
torchtitan's and ours are alike.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from scripts.run.errors import InputError


def steps(folder: Path) -> list[int]:
    """Return the steps that have a folder, newest first."""
    names = [p.name.partition("step-")[2] for p in folder.glob("step-*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def read_metadata(step: Path):
    """Read torch's own record of what a step folder holds."""
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(step).read_metadata()


def damage(step: Path) -> str:
    """Return what is wrong with a step folder whose save was finished once.

    "" if every shard has its full size.
    """
    try:
        stored = read_metadata(step).storage_data
    except Exception as error:  # a pickle cut short raises nearly anything
        return f".metadata cannot be read ({error})"
    sizes: dict[str, int] = {}
    for item in stored.values():
        sizes[item.relative_path] = max(sizes.get(item.relative_path, 0), item.offset + item.length)
    for name, size in sorted(sizes.items()):
        found = (step / name).stat().st_size if (step / name).exists() else 0
        if found < size:
            return f"{name} is cut short: {found} bytes of {size}"
    return ""


def newest_whole(folder: Path, say: Callable[[str], None]) -> int | None:
    """Return the step to go on from, None for a fresh start; tell `say` what was set aside.

    Call it on one rank, while nothing writes. A save that was cut short is removed: its step was
    never reported as saved. A folder damaged later is kept under another name. torchtitan would
    resume from a cut shard, or take a folder without a whole step for a fresh start, even with an
    initial_load_path. Raises InputError if damaged folders are all there is: a run must not
    silently start again at step 0.
    """
    found, damaged = None, {}
    for number in steps(folder):
        step = folder / f"step-{number}"
        if not (step / ".metadata").exists():
            shutil.rmtree(step)
            say(f"checkpoint step-{number} was cut short while it was saved: removed")
        elif not (problem := damage(step)):
            found = number if found is None else found
        elif found is None:
            damaged[number] = problem
        else:
            shutil.rmtree(step)  # a removal of old steps that was cut short
    if damaged and found is None:
        mend = "restore it from a copy, or start the stage again: make clean with its RUN and STAGE"
        raise InputError(
            [
                f"{folder / f'step-{number}'}: {why}; no other checkpoint is whole: {mend}"
                for number, why in damaged.items()
            ]
        )
    for number, problem in damaged.items():
        os.replace(folder / f"step-{number}", folder / f"damaged-{number}")
        say(f"checkpoint step-{number} is damaged: {problem}; set aside as damaged-{number}")
    if found is None and folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    return found


def misfit(step: Path, model: Mapping[str, tuple], rank_prefix: str, ranks: int) -> list[str]:
    """Return why a whole checkpoint is not this run's; empty if it is.

    `model` is {key: shape} of what it must hold; each of the data-parallel ranks that saved it
    wrote keys that begin with `rank_prefix` and its number.
    """
    stored = read_metadata(step).state_dict_metadata
    mend = (
        "it is from other settings; put this run's own there, or remove it: make clean with its "
        "RUN and STAGE"
    )
    found = []
    for key, shape in model.items():
        if key not in stored:
            found.append(f"{step}: holds no {key}; {mend}")
        elif tuple(stored[key].size) != tuple(shape):
            saved = tuple(stored[key].size)
            found.append(
                f"{step}: {key} has shape {saved}, this model's has {tuple(shape)}; {mend}"
            )
    numbers = (re.match(re.escape(rank_prefix) + r"(\d+)", key) for key in stored)
    world = len({match[1] for match in numbers if match})
    if world != ranks:
        found.append(
            f"{step}: saved by {world} data-parallel ranks, this run has {ranks}; "
            "give it the same GPUS and NODES"
        )
    return found[:1]  # one cause makes hundreds


def prune(folder: Path, keep: int = 2) -> None:
    """Remove all but the newest `keep` finished steps."""
    whole = [n for n in steps(folder) if (folder / f"step-{n}" / ".metadata").exists()]
    for number in whole[keep:]:
        # ignore_errors: another process may be removing it, too
        shutil.rmtree(folder / f"step-{number}", ignore_errors=True)
