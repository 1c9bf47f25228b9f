"""How the nodes of a stage meet: in small files of its directory, without a port.

attempts/call.json      node 0's, for all: {state, attempt, members {node: id}, job, start, code}
    begun               it has taken the stage: ranks of an earlier attempt are to end
    start               the members start their ranks
    hang                no step has come for long: ranks write down where they stand
    over                the attempt is over, and another follows: ranks end, their scripts stay
    ended               node 0 leaves with this code: leave, too
attempts/node<k>.json   each other node's: {id, since, host, beat, leaving, failed}

Node 0's stage script is the stage: it alone begins attempts, checks the input, hands over and has
the exit code. Which node torchrun gives rank 0 is not known before, and nothing depends on it.

No other script speaks before node 0 of its job has begun: a job that is refused must not disturb.
A script has an id of its own, so one that replaces another is told from it. A beat is a count, and
silence is measured from the last change that was seen: clocks of two machines differ. Of two
scripts of one node the later one stays: a node that its cluster has given up may go on for hours.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple, Optional

from scripts.job.environment import JobEnvironment
from scripts.run import files

BEGUN, START, HANG, OVER, ENDED = "begun", "start", "hang", "over", "ended"
BEAT_SECONDS = 2.0
FAULT_SECONDS = 10.0  # for the ranks of other nodes to end by themselves, and to say why
NAME_SECONDS = 120.0  # until a pod's name is in DNS


class Call(NamedTuple):
    """Say what all nodes are to do, and in which attempt."""

    state: str
    attempt: int
    members: dict[str, str]
    job: str
    start: str
    code: int = 0
    refused: str = ""  # the start of a script that was refused, beside a call that stands


class Heard(NamedTuple):
    """Hold what a node has said last, and when (monotonic) that had changed."""

    said: dict[str, Any]
    changed: float
    beats: int  # changes that were seen: one file alone may be a dead script's


class Meeting:
    """Meet the other nodes' scripts as this node's."""

    def __init__(self, directory: Path, environment: JobEnvironment):
        self.environment = environment
        self.folder = directory / "attempts"
        self.id, self.since = uuid.uuid4().hex, time.time()
        self.leaving = False  # this script was asked to leave
        self.failed = 0  # the attempt in which this node's ranks have failed
        self.replaced = False  # another script has this node's place
        self._beat = 0
        self._answered = 0  # the attempt in which stacks were asked for
        self._heard: dict[int, Heard] = {}
        self._call: Optional[Call] = None

    def open(self) -> None:
        """Begin to be heard, and to hear the others. Raises OSError."""
        self.folder.mkdir(exist_ok=True)
        self.tick()
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self.replaced:
            time.sleep(BEAT_SECONDS)
            self.tick()

    def tick(self) -> None:
        """Say that this node is there; look what the others say, and node 0 calls."""
        with contextlib.suppress(OSError):  # a full disk, a server that does not answer: later
            call = called(self.folder)
            if self.environment.node:
                self._call = call or self._call
                if call and call.job == self.environment.job:
                    self._say()
                elif call and self._beat:
                    self.replaced = True  # by another job of the stage
                return
            if call and self._call and call.attempt > self._call.attempt:
                self.replaced = True
            for node in range(1, self.environment.nodes):
                self._listen(node)

    def _say(self) -> None:
        file = self.folder / f"node{self.environment.node}.json"
        there = _read(file)
        if there.get("id", self.id) != self.id and _age(there) > (self.since, self.id):
            self.replaced = True
            return
        self._beat += 1
        content = {"id": self.id, "since": self.since, "host": socket.gethostname()}
        state = {"beat": self._beat, "leaving": self.leaving, "failed": self.failed}
        files.write_json(file, {**content, **state})

    def _listen(self, node: int) -> None:
        said, before = _read(self.folder / f"node{node}.json"), self._heard.get(node)
        if not said or (before and said == before.said):
            return
        if before and _age(said) < _age(before.said):
            return  # one that was replaced, frozen between its look at the file and its beat
        same = before is not None and said.get("id") == before.said.get("id")
        beats = before.beats + 1 if before and same else 0
        self._heard[node] = Heard(said, time.monotonic(), beats)

    # --- node 0

    def call(self, state: str, attempt: int, code: int = 0) -> None:
        """Call the other nodes, as node 0, if none has taken its place. Raises OSError."""
        there = called(self.folder)
        if there and there.attempt > attempt:
            self.replaced = True
            return
        me = self.environment
        members = {} if state == BEGUN or not self._call else self._call.members
        if state == START:
            heard = {str(node): heard.said["id"] for node, heard in self._heard.items()}
            members = {"0": self.id, **heard}
        self._call = Call(state, attempt, members, me.job, me.start, code)
        files.write_json(self.folder / "call.json", self._call._asdict())

    def refuse(self) -> None:
        """Send the nodes of this start away, as node 0, which another script's attempt keeps from
        beginning one: its own call stands."""
        there = called(self.folder) or Call(ENDED, 0, {}, "", "")
        content = there._replace(refused=self.environment.start)
        files.write_json(self.folder / "call.json", content._asdict())

    def absent(self, since: float) -> list[int]:
        """Return the nodes, but 0, of which no script was heard after a time (monotonic) that
        stays."""
        there = [
            node
            for node, heard in list(self._heard.items())
            if heard.beats and heard.changed > since and not heard.said.get("leaving")
        ]
        return [node for node in range(1, self.environment.nodes) if node not in there]

    def _silent(self, heard: Heard) -> float:
        """Return for how many seconds a node has been silent, 0 while that is not yet long."""
        since = time.monotonic() - heard.changed
        return since if since > self.environment.silence else 0

    def lost(self) -> str:
        """Say which member of the attempt is there no more, or has failed; "" while all are."""
        members = self._call.members if self._call and self._call.state == START else {}
        for node, heard in sorted(self._heard.items()):
            name = f"node {node} ({heard.said.get('host')})"
            if str(node) not in members:
                continue
            if heard.said.get("id") != members[str(node)]:
                return f"{name}: its script was replaced by another"
            if self._silent(heard):
                return f"{name}: silent for {self._silent(heard):.0f} s; is it still there?"
        return ""

    def failing(self) -> str:
        """Say on which node ranks have failed in this attempt; "" if on none, as far as is known.
        Theirs may wait for long for the ranks that are gone."""
        attempt = self._call.attempt if self._call else 0
        nodes = [n for n, heard in self._heard.items() if heard.said.get("failed") == attempt]
        return f"ranks on node {nodes[0]} have failed" if nodes and attempt else ""

    def who_leaves(self) -> str:
        """Say which member was asked to leave; "" if none was."""
        nodes = [n for n, heard in self._heard.items() if heard.said.get("leaving")]
        return f"node {nodes[0]} was asked to leave" if nodes else ""

    # --- the other nodes

    def order(self) -> Optional[Call]:
        """Return what node 0 has called and is meant for this script; None while it has not."""
        call, node = self._call, str(self.environment.node)
        if call is None:
            return None
        start = self.environment.start
        if start and (call.refused == start or (call.state == ENDED and call.start == start)):
            return call._replace(state=ENDED)
        return call if call.members.get(node) == self.id else None

    def asks_for_stacks(self, attempt: int) -> bool:
        """Tell, once, whether node 0 asks where this node's ranks of an attempt stand."""
        call = self._call
        asks = bool(call and call.state == HANG and call.attempt == attempt != self._answered)
        if asks:
            self._answered = attempt
        return asks

    def over(self, attempt: int) -> bool:
        """Tell whether ranks of this attempt have no right to run: it is over, a later one has
        begun, or another script has this one's place."""
        call = self._call
        if self.replaced or (call and call.attempt > attempt):
            return True
        return bool(call and call.attempt == attempt and call.state in (OVER, ENDED))


def called(folder: Path) -> Optional[Call]:
    """Return what node 0 has called, None while it has not."""
    said = _read(folder / "call.json")
    if said.get("state") not in (BEGUN, START, HANG, OVER, ENDED):
        return None
    try:
        return Call(**said)
    except TypeError:
        return None


def _age(said: dict[str, Any]) -> tuple[float, str]:
    return said.get("since", 0.0), said.get("id", "")


def _read(path: Path) -> dict[str, Any]:
    """Read a file of the meeting, {} for one that is empty or not whole, as a shared filesystem may
    show it for a moment. O_CREAT: NFS remembers for half a minute that a file was not there, and
    then does not ask its server."""
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), encoding="utf-8") as file:
            said = json.load(file)
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def wait_for_name(name: str) -> None:
    """Wait until a host's name resolves: for torchrun one that does not yet is a fault."""
    deadline = time.monotonic() + NAME_SECONDS
    while name and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(name, None)
            return
        time.sleep(1)
