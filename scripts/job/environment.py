"""What a cluster tells a stage script by environment variables. No other module of scripts/ reads
them, so a new cluster sets what stands here and is done:

PET_NNODES PET_NPROC_PER_NODE PET_NODE_RANK PET_RDZV_ID    torchrun's own
RANK LOCAL_RANK WORLD_SIZE                                 torchrun's, of one rank
SLURM_NODEID SLURM_STEP_ID                                 Slurm's: srun sets no PET_NODE_RANK
PET_RDZV_ENDPOINT                                          torchrun's: node 0's name and port
RELAY_JOB RELAY_POD RELAY_ADDRESS RELAY_ATTEMPT            ours, where torchrun has no name
RELAY_SILENCE RELAY_HANG                                   a site's, in seconds
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Optional

from scripts.run.errors import InputError
from scripts.run.layout import ROOT

# torchrun sets these for each rank.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class JobEnvironment:
    """Hold what one stage script, or one of its ranks, was told of the job that it belongs to."""

    nodes: int = 1
    node: int = 0  # this node's number; node 0's stage script is the stage
    processes: int = 1  # ranks on each node
    job: str = ""  # the scheduler's name of the job, "<cluster>:<number>" on Slurm; "" without one
    start: str = ""  # names this start of the job's stage scripts, on all its nodes; "" without one
    address: str = ""  # how other machines reach this one; "" where only this machine asks
    attempt: int = 0  # told to ranks; 0 in a parent, which begins its own
    rank: Optional[int] = None  # None in a parent
    local_rank: Optional[int] = None
    world: int = 1  # ranks on all nodes
    pods: bool = False  # a node that is lost is replaced alone, so the others stay
    meets_at: str = ""  # the name at which torchrun meets
    rendezvous: str = ""  # torchrun's own id of this start, "" without one
    hang: float = 0.0  # seconds without a step that end an attempt; 0: as measured
    silence: float = 60.0  # seconds without a beat, after which a node counts as lost

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> JobEnvironment:
        """Read the variables. Raises InputError for a number that is none, and where nobody says
        which of several nodes this is: each would take itself for node 0."""

        def number(name: str, default: int) -> int:
            said = variables.get(name) or str(default)
            if not said.isdecimal():
                raise InputError(f"{name}={said}: not a whole number")
            return int(said)

        nodes, processes = number("PET_NNODES", 1), number("PET_NPROC_PER_NODE", 1)
        # A restarted job has a new rendezvous, a restarted step alone a new step, a replaced pod
        # its own id.
        names = ("PET_RDZV_ID", "SLURM_STEP_ID", "RELAY_POD")
        start = (variables.get(name) for name in names)
        is_rank = "RANK" in variables
        if nodes > 1 and not (variables.get("PET_NODE_RANK") or variables.get("SLURM_NODEID")):
            raise InputError(
                f"which of {nodes} nodes this is, nobody says: PET_NODE_RANK and SLURM_NODEID are"
                " not set (Slurm's own --container sets neither: NODES=1 there)"
            )
        return cls(
            nodes=nodes,
            # One node of a larger allocation may have any SLURM_NODEID: alone, it is node 0.
            node=number("PET_NODE_RANK", number("SLURM_NODEID", 0)) if nodes > 1 else 0,
            processes=processes,
            job=variables.get("RELAY_JOB", ""),
            start=".".join(name for name in start if name),
            address=variables.get("RELAY_ADDRESS", ""),
            attempt=number("RELAY_ATTEMPT", 0),
            rank=number("RANK", 0) if is_rank else None,
            local_rank=number("LOCAL_RANK", 0) if is_rank else None,
            world=number("WORLD_SIZE", 1) if is_rank else nodes * processes,
            pods=bool(variables.get("RELAY_POD")),
            meets_at=variables.get("PET_RDZV_ENDPOINT", "").rpartition(":")[0],
            rendezvous=variables.get("PET_RDZV_ID", ""),
            hang=number("RELAY_HANG", 0),
            silence=number("RELAY_SILENCE", 60),
        )

    def for_ranks(
        self,
        attempt: int,
        extra: Mapping[str, str],
        variables: Mapping[str, str] = os.environ,
    ) -> dict[str, str]:
        """Build the environment of the ranks of an attempt, or of the torchrun that starts them.

        `extra` is the stage's own. A single rank gets no torchrun, so it gets torchrun's
        variables here.
        """
        threads = max(1, len(os.sched_getaffinity(0)) // self.processes)
        environment = {
            "OMP_NUM_THREADS": str(threads),
            # Threads that wait for each other by spinning take a core that others want, too, from
            # each other: beside two more processes on two cores a step took four times as long.
            "GOMP_SPINCOUNT": "1000",
            "HF_HUB_OFFLINE": "1",
            **variables,
            **extra,
            "RELAY_ATTEMPT": str(attempt),
            "PYTHONPATH": str(ROOT),
            # Without it torchrun keeps 8 KB of output back: no progress is seen, and a stop does
            # not find out that the ranks train.
            "PYTHONUNBUFFERED": "1",
        }
        if self.nodes > 1:  # the rendezvous of an attempt that has ended is closed
            environment.update(PET_RDZV_ID=f"{self.rendezvous or self.job}.{attempt}")
        if self.world == 1:
            alone = ("0", "0", "1", "1", "127.0.0.1", "0")
            environment.update(zip(OF_A_RANK, alone))
        return environment


def forget_rank(variables: MutableMapping[str, str] = os.environ) -> None:
    """Remove what torchrun says to a rank, for a tool that starts and counts processes itself."""
    for name in OF_A_RANK:
        variables.pop(name, None)
