"""The pairwise part of a fabric check: in few rounds each node exchanges data with others, one at a
time, so that a slow or silent one can be named."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from scripts.tools import fabric_verdict as verdict
from scripts.tools.fabric_verdict import Pair

SPARE = 5.0  # seconds beside those in which a library should have given up itself


class Pairs:
    """Be one peer of the check by pairs. Peers meet in a store, so that one that is silent is seen
    before any data is sent to it."""

    def __init__(
        self,
        store: Any,
        peer: int,
        names: list[str],
        exchange: Callable[[Any, str, int], float],
        patience: float,
        phase: Callable[[str], None] = lambda _: None,
    ):
        self.store, self.peer, self.names, self.exchange = store, peer, names, exchange
        self.patience, self.phase = patience, phase
        self.silent: set[int] = set()  # of the rounds before
        self.stuck = False  # an exchange of this process hangs, and keeps torch's group

    def run(self) -> None:
        """Go through all rounds. The first peer that answers leaves the verdict under "pairs":
        {"pairs", "slow", "slowest", "broken"}."""
        peers = len(self.names)
        for number in range(verdict.rounds(peers)):
            self.phase(f"pairs, round {number + 1} of {verdict.rounds(peers)}")
            self._round(number)
        if self.peer == min(set(range(peers)) - self.silent):
            self.store.set("pairs", json.dumps(self._judge()))

    def _round(self, number: int) -> None:
        # Everyone waits for the same peers until the same moment, or in the next round one that has
        # waited for a silent partner would come too late for the next one.
        ends = time.monotonic() + 2 * (self.patience + SPARE)
        partner = verdict.partner(self.peer, len(self.names), number)
        self.store.set(f"here/{number}/{self.peer}", "stuck" if self.stuck else "ready")
        came: list[Any] = []
        if partner is not None and partner not in self.silent:
            came = self._with(number, partner)
        self.store.set(f"done/{number}/{self.peer}", json.dumps(came))
        awaited = [p for p in range(len(self.names)) if p not in self.silent]
        keys = {p: f"done/{number}/{p}" for p in awaited}
        if not answered(self.store, list(keys.values()), ends - time.monotonic()):
            self.silent |= {p for p, key in keys.items() if not self.store.check([key])}

    def _with(self, number: int, partner: int) -> list[Any]:
        """Exchange with a partner; return what came of it, as Pair has it, [] if nothing was
        tried."""
        first, second = sorted((self.peer, partner))
        here = f"here/{number}/{partner}"
        if not answered(self.store, [here], self.patience):
            return [first, second, None, partner, ""]
        if self.stuck or self.store.get(here) == b"stuck":
            return []
        name = f"pair/{number}/{first}"
        try:
            bandwidth = in_time(
                lambda: self.exchange(self.store, name, int(self.peer == second)),
                self.patience + SPARE,
            )
        except TimeoutError as error:
            self.stuck = True
            return [first, second, None, None, str(error)]
        except Exception as error:
            return [first, second, None, None, str(error).splitlines()[0][:200]]
        return [first, second, bandwidth, None, ""]

    def _judge(self) -> dict[str, Any]:
        """Read what all peers have left; of both sides of a pair the worse counts."""
        pairs: dict[tuple[int, int], Pair] = {}
        for number in range(verdict.rounds(len(self.names))):
            for peer in range(len(self.names)):
                key = f"done/{number}/{peer}"
                told = json.loads(self.store.get(key)) if self.store.check([key]) else []
                if told:
                    pair = Pair(*told)
                    pairs[pair[:2]] = min(pair, pairs.get(pair[:2], pair), key=_worth)
        for peer in sorted(self.silent):  # whoever had a rest when it fell silent has not seen it
            if not any(pair.silent == peer for pair in pairs.values()):
                first, second = sorted((peer, self.peer))
                pairs[first, second] = Pair(first, second, None, peer)
        found = list(pairs.values())
        done = sorted((p for p in found if p.bandwidth), key=_worth)
        slowest = ""
        if done:
            first, second, bandwidth = done[0][:3]
            both = f"{self.names[first]} and {self.names[second]}"
            slowest = f"the slowest of {len(done)} is {both}, {bandwidth:.2f} GB/s each way"
        return {
            "pairs": [pair._asdict() for pair in found],
            "slow": verdict.slow(found, self.names),
            "slowest": slowest,
            "broken": verdict.broken(found, self.names),
        }


def _worth(pair: Pair) -> float:
    return -1.0 if pair.bandwidth is None else pair.bandwidth


def answered(store: Any, keys: list[str], seconds: float) -> bool:
    """Wait until keys are in a store of torch; tell whether they came in time."""
    try:
        store.wait(keys, timedelta(seconds=max(seconds, 0.001)))
    except RuntimeError:  # torch's DistStoreError
        return False
    return True


def in_time(work: Callable[[], float], seconds: float) -> float:
    """Do work in a thread; return its result, raise what it raises. Raises TimeoutError when time
    is up: the thread then hangs on, for nothing ends a call in a library in C."""
    came: list[Any] = []

    def target() -> None:
        try:
            came.append(work())
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if not came:
        raise TimeoutError(f"nothing came in {seconds:.0f} s")
    if isinstance(came[0], Exception):
        raise came[0]
    return float(came[0])
