"""Token shards and torchtitan's loader over them: order, batches, resume."""

from itertools import islice

import numpy as np
import pytest
import torch

from scripts.corpus.tokens import Tokens, dtype, permute
from scripts.tools.torchtitan_data import IGNORE_INDEX, HeldOutLoader, TokenLoader
from tests.support.sets import prepare, read_set, write_rows

LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards that hold 0, 1, 2, … 1,000 in this order; an empty one between them."""
    folder = tmp_path_factory.mktemp("shards")
    parts = np.split(np.arange(1001, dtype=np.uint16), [13, 400])
    for number, part in enumerate([parts[0], parts[1], parts[1][:0], parts[2]]):
        part.tofile(folder / f"{number:05d}.ds")
    return folder


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_text_is_read_once_by_all_ranks_together(folder, world):
    """A rank with a batch less than another would let it wait for ever."""
    tokens = Tokens(folder, LENGTH, 2000)
    ranks = [list(HeldOutLoader(tokens, 4, rank, world, once=True)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    counted = []
    for inputs, labels in (batch for batches in ranks for batch in batches):
        assert inputs["input"].shape == labels.shape == (4, LENGTH)
        for row, label in zip(inputs["input"], labels):
            if int(label[0]) == IGNORE_INDEX:
                assert set(label.tolist()) == {IGNORE_INDEX}
            else:
                assert label.tolist() == [*row.tolist()[1:], row.tolist()[-1] + 1]
                counted += row.tolist()
    assert sorted(counted) == list(range(1000)), "every token once"
    endless = HeldOutLoader(tokens, 4, 0, 1, once=False)
    assert len(list(islice(endless, 99))) == 99


@pytest.mark.parametrize("total", [1, 2, 3, 17, 256, 1000])
@pytest.mark.parametrize("seed", [0, 1, 99])
def test_a_permutation_has_every_place_once(total, seed):
    assert sorted(permute(place, total, seed) for place in range(total)) == list(range(total))


def test_an_epoch_has_every_sequence_once_in_an_order_of_its_own(folder):
    tokens = Tokens(folder, LENGTH, 2000)
    assert (tokens.total, tokens.sequences) == (1001, 125)
    epochs = [[int(tokens[e * 125 + n][0]) for n in range(125)] for e in range(3)]
    for starts in epochs:
        assert sorted(starts) == list(range(0, 1000, LENGTH))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [int(Tokens(folder, LENGTH, 2000, seed=5)[n][0]) for n in range(125)] != epochs[0]
    for number in range(125):
        assert (np.diff(tokens[number]) == 1).all(), "across shards, too"
        assert tokens[number].shape == (LENGTH + 1,)


def loader(folder, batch, rank, world, **options):
    return TokenLoader(Tokens(folder, LENGTH, 2000), batch, rank, world, options)


def starts(batches):
    return [rows["input"][:, 0].tolist() for rows, _ in batches]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_ranks(folder, world):
    whole = starts(islice(loader(folder, 8, 0, 1), 40))  # two and a half epochs
    ranks = [starts(islice(loader(folder, 8 // world, r, world), 40)) for r in range(world)]
    assert [sum(parts, []) for parts in zip(*ranks)] == whole  # noqa: RUF017  short


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_goes_on_behind_what_was_handed_out(folder, workers):
    """Workers read ahead; what they have read and nobody was handed is read again."""
    options = {"num_workers": workers}
    whole = list(islice(loader(folder, 4, 1, 2, **options), 30))
    first = loader(folder, 4, 1, 2, **options)
    before = list(islice(iter(first), 11))
    state = first.state_dict()
    assert state == {"dp_rank_1": 11}
    second = loader(folder, 4, 1, 2, **options)
    second.load_state_dict(state)
    after = list(islice(iter(second), 19))
    for (rows, labels), (inputs, targets) in zip(whole, before + after):
        assert torch.equal(rows["input"], inputs["input"])
        assert torch.equal(labels, targets)
        assert torch.equal(labels[:, :-1], rows["input"][:, 1:])


@pytest.mark.parametrize(("vocabulary", "kind"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_the_smallest_type_is_used(vocabulary, kind):
    assert dtype(vocabulary) is kind


def test_documents_lie_between_begin_and_end(tmp_path):
    rows = [{"text": f"Document {n} has a few words of its own, {n * n}."} for n in range(100)]
    manifest, out = prepare(tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    (shard,) = (out / "text").glob("*.ds")
    ids = np.fromfile(shard, np.uint16)
    ends = np.fromfile(f"{shard}.index", np.uint64)
    assert len(ids) == manifest["tokens"] == ends[-1]
    assert len(ends) == manifest["rows"]["text"] == 80
    begins = [0, *ends[:-1].tolist()]
    assert {int(ids[int(at)]) for at in begins} == {0}, "<|begin|>"
    assert {int(ids[int(at) - 1]) for at in ends} == {1}, "<|end_of_text|>"
    assert len(read_set(out, "heldout_text.jsonl")) == 20
