"""torchtitan's loaders over the data stage's token shards, to train on and to validate with.

torchtitan's own tokenises the text again in each epoch, in the training process, and has no
shuffle. Here the order is a function of the seed and the epoch, and the state is one number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX

from scripts.corpus.tokens import Tokens


class _Sequences(Dataset):
    """Serve (input, label), int64 of `length` tokens each, by a number that never ends."""

    def __init__(self, tokens: Tokens):
        self.tokens = tokens

    def __getitem__(self, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        row = torch.from_numpy(self.tokens[number])
        return {"input": row[:-1]}, row[1:]


class TokenLoader(BaseDataLoader):
    """Hand one data-parallel rank its batches.

    Of each batch of all ranks rank r takes the r-th part, so the global batches are the same for
    any number of ranks that divides them.
    """

    def __init__(self, tokens: Tokens, batch: int, rank: int, world: int, options: dict[str, Any]):
        self.data, self.batch, self.options = _Sequences(tokens), batch, options
        self.rank, self.dp_world_size = rank, world
        self.done = 0  # batches that this rank was handed

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(self.data, batch_sampler=self.numbers(self.done), **self.options)
        for rows in loader:
            self.done += 1  # counted when handed out, not when a worker has read it ahead
            yield rows

    def numbers(self, done: int) -> Iterator[list[int]]:
        """Yield the numbers of the sequences of each batch from the `done`-th on, without end."""
        while True:
            first = (done * self.dp_world_size + self.rank) * self.batch
            yield list(range(first, first + self.batch))
            done += 1

    def state_dict(self) -> dict[str, Any]:
        """Return where the data stands: the same number on every rank, under a key of its own, by
        which a checkpoint of another number of ranks is told."""
        return {f"dp_rank_{self.rank}": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.done = state[f"dp_rank_{self.rank}"]


class HeldOutLoader(BaseDataLoader):
    """Hand one data-parallel rank its part of the held-out text, in order: all of it once, or
    without end.

    Every rank has as many batches, or the others would wait for ever: what is beyond the text has
    labels that count for nothing.
    """

    def __init__(self, tokens: Tokens, batch: int, rank: int, world: int, once: bool):
        self.tokens, self.batch, self.once = tokens, batch, once
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[Any]:
        total, first = self.tokens.sequences, 0
        while first < total or not self.once:
            numbers = range(first + self.rank * self.batch, first + (self.rank + 1) * self.batch)
            rows = torch.stack([torch.from_numpy(self.tokens.in_order(n)) for n in numbers])
            labels = rows[:, 1:].clone()
            if self.once:
                labels[torch.tensor(numbers) >= total] = IGNORE_INDEX
            yield {"input": rows[:, :-1]}, labels
            first += self.batch * self.world


def validation_builder(folder: Path, vocabulary: int):
    """Return what torchtitan calls to make a rank's loader of held-out text."""

    def build(dp_world_size: int, dp_rank: int, job_config: Any, infinite: bool, **_: Any):
        settings = job_config.validation
        tokens = Tokens(folder, settings.seq_len, vocabulary)
        size = settings.local_batch_size
        return HeldOutLoader(tokens, size, dp_rank, dp_world_size, once=not infinite)

    return build


def builder(folder: Path, vocabulary: int):
    """Return what torchtitan calls to make a rank's loader (TrainSpec.build_dataloader_fn)."""

    def build(dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any, **_: Any):
        training = job_config.training
        tokens = Tokens(folder, training.seq_len, vocabulary, job_config.debug.seed or 0)
        options = {
            "num_workers": training.dataloader.num_workers,
            "pin_memory": training.dataloader.pin_memory,
        }
        if training.dataloader.num_workers:
            options["persistent_workers"] = training.dataloader.persistent_workers
            options["prefetch_factor"] = training.dataloader.prefetch_factor
        size = training.local_batch_size
        return TokenLoader(tokens, size, dp_rank, dp_world_size, options)

    return build
