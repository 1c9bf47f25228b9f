"""What the ranks of a stage agree on: the step that they go on from, and the step at which they
leave. Both torchtitan's trainer and torchtune's recipes ask here."""

from __future__ import annotations

from typing import Any, Optional

from scripts.job.rank import Rank
from scripts.tools.checkpoints import newest_whole


def step_to_go_on_from(rank: Rank) -> Optional[int]:
    """Return the newest whole checkpoint's step, None for a fresh start, and say so to a user who
    may expect another. Call it on rank 0 alone, before anything writes. Raises InputError."""
    newest = newest_whole(rank.directory / "checkpoints", rank.say)
    if newest is not None:
        rank.say(f"goes on from its checkpoint of step {newest}")
    elif rank.attempt_number > 1:
        rank.say("nothing had been saved yet: starts at step 0")
    return newest


class Stop:
    """Ask on behalf of all ranks whether to save and leave."""

    def __init__(self, rank: Rank):
        self.rank = rank
        self.group: Any = None

    def asked(self) -> bool:
        """Tell every rank alike whether to save and exit now. Call it on all of them after the same
        step: rank 0 looks for the stop file, and broadcasts the answer over gloo, not the GPUs."""
        asked = self.rank.sees_stop()
        if self.rank.environment.world == 1:
            return asked
        import torch
        import torch.distributed as dist

        self.group = self.group or dist.new_group(backend="gloo")
        answer = torch.tensor(int(asked))
        dist.broadcast(answer, 0, group=self.group)
        return bool(answer)
