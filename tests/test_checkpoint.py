"""Which step folders are resumed from. The folders are torch's own."""

import re
import shutil

import pytest

from scripts.run.errors import InputError
from scripts.tools import checkpoints


@pytest.fixture
def folder(tmp_path):
    """Steps 10, 20 and 30, all whole."""
    import torch
    import torch.distributed.checkpoint as dcp

    for step in (10, 20, 30):
        state = {"weight": torch.full((64, 64), float(step)), "data.rank_0": {"position": step}}
        dcp.save(state, checkpoint_id=tmp_path / f"step-{step}", no_dist=True)
    return tmp_path


def newest(folder):
    said = []
    return checkpoints.newest_whole(folder, said.append), said


def cut(step):
    shard = next(step.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-500])


def test_the_newest_whole_step_is_taken(folder):
    assert newest(folder) == (30, [])
    assert checkpoints.steps(folder) == [30, 20, 10]


def test_a_save_that_was_cut_short_is_removed(folder):
    (folder / "step-30/.metadata").unlink()
    step, said = newest(folder)
    assert step == 20
    assert "step-30 was cut short" in said[0], f"what was removed is not said: {said}"
    assert checkpoints.steps(folder) == [20, 10]


@pytest.mark.parametrize("what", ["a truncated shard", "a missing shard", "truncated metadata"])
def test_a_damaged_step_is_set_aside(folder, what):
    if what == "a truncated shard":
        cut(folder / "step-30")
    elif what == "a missing shard":
        next((folder / "step-30").glob("*.distcp")).unlink()
    else:
        metadata = folder / "step-30/.metadata"
        metadata.write_bytes(metadata.read_bytes()[:40])
    step, said = newest(folder)
    assert step == 20
    assert "step-30 is damaged" in said[0], f"what is damaged is not said: {said}"
    assert (folder / "damaged-30").is_dir(), "the damaged step must stay, under another name"


def test_damage_alone_is_never_a_fresh_start(folder):
    for step in (10, 20):
        shutil.rmtree(folder / f"step-{step}")
    cut(folder / "step-30")
    for _ in range(2):  # not the second time either
        with pytest.raises(InputError, match=r"cut short: .* bytes of .* make clean"):
            newest(folder)


def test_a_removal_that_was_cut_short_is_finished(folder):
    next((folder / "step-10").glob("*.distcp")).unlink()
    assert newest(folder) == (30, [])
    assert checkpoints.steps(folder) == [30, 20]


def test_nothing_but_a_first_save_cut_short_leaves_no_folder(folder):
    """torchtitan takes an empty folder for a fresh start from random weights, with an
    initial_load_path, too."""
    for step in (10, 20, 30):
        (folder / f"step-{step}/.metadata").unlink()
    assert newest(folder)[0] is None, "nothing whole is there to go on from"
    assert not folder.exists(), "an empty folder must not stay"
    assert newest(folder) == (None, [])


@pytest.mark.parametrize(
    ("model", "ranks", "words"),
    [
        ({"weight": (64, 64)}, 1, ""),
        ({"weight": (64, 32)}, 1, r"shape \(64, 64\), this model's has \(64, 32\)"),
        ({"other": (1,)}, 1, "holds no other"),
        ({"weight": (64, 64)}, 2, "saved by 1 .* ranks, this run has 2"),
    ],
)
def test_another_models_checkpoint_is_named(folder, model, ranks, words):
    found = checkpoints.misfit(folder / "step-30", model, "data.rank_", ranks)
    assert bool(found) == bool(words)
    assert not words or re.search(words, found[0]), f"it does not say {words!r}: {found}"


def test_the_last_two_whole_ones_stay(folder):
    (folder / "step-40").mkdir()  # being written
    checkpoints.prune(folder)
    assert checkpoints.steps(folder) == [40, 30, 20]
