"""The fabric check on each rank: pairs of nodes, then all-reduce and broadcast over all ranks.

The pairs come first. A node that hangs is then named within two minutes or so; in a collective
over all ranks it would show as a timeout of everyone, half an hour later.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from scripts.job.rank import Rank
from scripts.run import files
from scripts.run.errors import InputError
from scripts.tools import fabric_verdict as verdict
from scripts.tools.fabric_pairs import SPARE, Pairs, answered
from scripts.tools.fabric_verdict import Transport

REPORT = "fabric.json"
PATIENCE = 60.0  # seconds in which a peer must answer, and again in which data must have come
MEETING = 300.0  # and in which all ranks must be there: torch may be read over a slow network
COLLECTIVE = 300.0  # and in which a collective over all ranks must end


class Sizes(NamedTuple):
    """Say how much is sent, and how often."""

    bytes: tuple[int, ...]
    pair: int  # bytes between two peers
    times: int  # after as many as `warm` that are not timed
    warm: int


MB = 1 << 20
ON_GPUS = Sizes((MB, 16 * MB, 128 * MB, 1024 * MB), 128 * MB, 20, 5)
ON_CPUS = Sizes((MB, 4 * MB, 16 * MB), 4 * MB, 5, 2)


def check(rank: Rank) -> None:
    """Do the check as one rank; rank 0 leaves REPORT in the stage's directory. Raises InputError,
    on all ranks alike, naming what does not answer."""
    import torch
    from torch.distributed.rendezvous import rendezvous

    here, number, gpu = rank.environment, rank.number, torch.cuda.is_available()
    log = rank.directory / "logs" / f"nccl-{rank.attempt_number}-{number}.log"
    # NCCL reads them when it starts, once.
    tell = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(log)}
    os.environ.update(tell)
    asked = verdict.demand(os.environ)
    fabric = Fabric("nccl" if gpu else "gloo", ON_GPUS if gpu else ON_CPUS, here.local_rank)
    store = next(rendezvous("env://", timeout=timedelta(seconds=MEETING)))[0]
    rank.phase("waits for all ranks")
    hosts = meet(store, number, here.world)
    every = here.processes if here.nodes > 1 else 1  # a peer is a node's first rank, or any rank
    names = verdict.peer_names(hosts[::every], here.nodes)
    if number % every == 0:
        place = number // every
        Pairs(store, place, names, fabric.pair, PATIENCE, rank.phase).run()
    longest = verdict.rounds(len(names)) * 2 * (PATIENCE + SPARE) + PATIENCE
    found = json.loads(_read(store, "pairs", longest))
    if found["broken"]:
        # A thread that hangs in NCCL may keep the process from its end, and torchrun with it.
        signal.alarm(30)
        raise InputError(verdict.not_found(asked, hosts[number], _text(log)) or found["broken"])
    with fabric.group(store, "all", number, len(hosts), COLLECTIVE):
        table = fabric.table(len(hosts), rank.phase)
    used = verdict.read_transport(_text(log)) if gpu else Transport("gloo")
    store.set(f"transport/{number}", json.dumps(used))
    if rank.first:
        told = [_read(store, f"transport/{n}", PATIENCE) for n in range(len(hosts))]
        by_host = verdict.by_host(hosts, [Transport(*json.loads(text)) for text in told])
        size = {"ranks": len(hosts), "nodes": here.nodes, "hosts": list(by_host)}
        report = {**size, "table": table, **found, **verdict.judged(asked, by_host)}
        report["result"] = verdict.in_short(report)
        files.write_json(rank.directory / REPORT, report)


def meet(store: Any, number: int, world: int, patience: float = MEETING) -> list[str]:
    """Tell all ranks this one's host, and wait for theirs; return all hosts in the order of ranks.

    Raises InputError naming the ranks that have not come."""
    store.set(f"host/{number}", socket.gethostname())
    keys = [f"host/{n}" for n in range(world)]
    if not answered(store, keys, patience):
        missing = [str(n) for n, key in enumerate(keys) if not store.check([key])]
        here = {store.get(key).decode() for key in keys if store.check([key])}
        said = f"not there after {patience:.0f} s: rank {', '.join(missing)}"
        raise InputError(f"{said}; there are ranks on {', '.join(sorted(here))}")
    return [store.get(key).decode() for key in keys]


class Fabric:
    """Send data over one backend of torch.distributed, and time it."""

    def __init__(self, backend: str, sizes: Sizes, local_rank: int | None):
        self.backend, self.sizes, self.local_rank = backend, sizes, local_rank

    @contextmanager
    def group(self, store: Any, name: str, rank: int, size: int, patience: float) -> Iterator[None]:
        """Be rank `rank` of a group of `size` that meets under a name in the store."""
        import torch
        import torch.distributed as dist

        if self.backend == "nccl":
            torch.cuda.set_device(self.local_rank)  # of this thread
        # torch counts groups, and both sides of one must count alike: a group that failed to form
        # has counted on one side, and the next one would never find its partner.
        dist.distributed_c10d._world.group_count = 0
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=patience),
        )
        try:
            yield
        finally:
            dist.destroy_process_group()

    def pair(self, store: Any, name: str, rank: int) -> float:
        """Exchange data with one other process; return GB/s each way. The all-reduce of two ranks
        is that exchange. Raises what torch raises."""
        # gloo gives up by itself; NCCL's watchdog would end the process, before anyone is named.
        patience = PATIENCE if self.backend == "gloo" else 10 * PATIENCE
        with self.group(store, name, rank, 2, patience):
            seconds = self._time("all-reduce", self.sizes.pair)
        return verdict.bus_bandwidth("all-reduce", self.sizes.pair, seconds, 2)

    def table(self, ranks: int, phase: Callable[[str], None]) -> list[dict[str, Any]]:
        """Time each operation at each size over the group, by its slowest rank."""
        import torch
        import torch.distributed as dist

        rows = []
        for operation in verdict.FACTORS:
            for size in self.sizes.bytes:
                phase(f"{operation} of {verdict.megabytes(size)}")
                slowest = torch.tensor(self._time(operation, size), device=self._device)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                seconds = float(slowest)
                bandwidth = verdict.bus_bandwidth(operation, size, seconds, ranks)
                row = {"operation": operation, "bytes": size, "seconds": seconds}
                rows.append({**row, "bandwidth": bandwidth})
        return rows

    @property
    def _device(self) -> str:
        return f"cuda:{self.local_rank}" if self.backend == "nccl" else "cpu"

    def _time(self, operation: str, size: int) -> float:
        """Return the seconds of one call, after those that warm up."""
        import torch
        import torch.distributed as dist

        data = torch.zeros(size // 4, device=self._device)

        def calls(number: int) -> None:
            for _ in range(number):
                if operation == "all-reduce":
                    dist.all_reduce(data)
                else:
                    dist.broadcast(data, 0)
            if self.backend == "nccl":
                torch.cuda.synchronize()

        calls(self.sizes.warm)
        began = time.perf_counter()
        calls(self.sizes.times)
        return (time.perf_counter() - began) / self.sizes.times


def _read(store: Any, key: str, seconds: float) -> str:
    """Wait for what another rank leaves. Raises InputError if it does not come."""
    if not answered(store, [key], seconds):
        raise InputError(f"rank 0 or its node has fallen silent: no {key} after {seconds:.0f} s")
    return str(store.get(key).decode())


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
