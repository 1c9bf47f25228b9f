"""The processes of a data stage, one on each node: rank 0 decides and calls each pass, and all of
them do their units of it."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

from scripts.corpus import recipe, sets
from scripts.corpus.passes import Work
from scripts.corpus.pool import run_pass
from scripts.job.rank import Rank
from scripts.run import files
from scripts.tools.decoder import sizes

# A pass may take days, and its nodes end at different times; who died is torchrun's to see.
LONGEST = timedelta(days=30)


def make_sets(rank: Rank) -> None:
    """Make the sets, as rank 0; do the passes that it calls, as any other."""
    nodes = Nodes(rank) if rank.environment.world > 1 else None
    if nodes and not rank.first:
        nodes.follow()
        return
    settings = recipe.of_stage(rank.config, rank.arguments, rank.facts, rank.path)
    model = rank.path("FROM") if "FROM" in rank.facts else None
    architecture = model / "config.json" if model else rank.directory / "architecture.json"
    target = sets.Target(model, *sizes(architecture))
    run_pass = nodes.run_pass if nodes else None
    made = sets.Sets(rank.directory / sets.PARTIAL, settings, target, rank.phase, run_pass)
    files.write_json(made.out / "data.json", made.make())
    if nodes:
        nodes.end()


class Nodes:
    """Run each pass on all nodes of a stage; results lie in files that they share."""

    def __init__(self, rank: Rank):
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=LONGEST)
        place = {"node": rank.number, "nodes": rank.environment.world}
        self.dist, self.part = dist, partial(run_pass, show=rank.phase, **place)

    def run_pass(self, name: str, work: Work) -> None:
        """Call a pass, as rank 0; return when every node has done its part."""
        self._tell((name, work))
        self.part(name, work)
        self.dist.barrier()

    def end(self) -> None:
        """Tell the other nodes that there is nothing more, as rank 0."""
        self._tell(None)
        self.dist.destroy_process_group()

    def follow(self) -> None:
        """Do what rank 0 calls until it ends."""
        while (order := self._tell(None)) is not None:
            self.part(*order)
            self.dist.barrier()
        self.dist.destroy_process_group()

    def _tell(self, order: Any) -> Any:
        told = [order]
        self.dist.broadcast_object_list(told, 0)
        return told[0]
