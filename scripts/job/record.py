"""What a stage's ranks tell their parent, shown, and written to progress.json."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any, Optional

from scripts.job.environment import JobEnvironment
from scripts.job.faults import patience
from scripts.job.progress import Progress
from scripts.job.stage import Stage
from scripts.run import files
from scripts.run.errors import InputError


class Steps:
    """Measure how long steps take, and for how long none has come."""

    def __init__(self) -> None:
        self.gaps: list[float] = []  # seconds
        self._newest, self._at = -1, 0.0

    def saw(self, step: int, total: int) -> None:
        """Note that training has come to a step. After the last one none is waited for."""
        if step >= total:
            self.end()
        elif step > self._newest:
            now = time.monotonic()
            if self._newest >= 0:
                self.gaps.append(now - self._at)
            self._newest, self._at = step, now

    def end(self) -> None:
        """Measure no more: the ranks have ended."""
        self._newest = -1

    def silent(self, site: float, busy: bool) -> float:
        """Return for how many seconds no step has come, 0 while that is not long. `busy`: a rank
        says that it does something else, as to save."""
        since = time.monotonic() - self._at
        known = self._newest >= 0
        return since if known and since > patience(self.gaps, not busy, site) else 0.0


class Recorder(Stage):
    """A stage as whoever hears its ranks sees it: what an attempt has told up to now."""

    def __init__(self, directory: Path, environment: JobEnvironment):
        super().__init__(directory, environment)
        self.attempt: dict[str, Any] = {}
        said = files.read_json(self.directory / "progress.json") or {}
        said.pop("phase", None)
        # An earlier attempt's numbers stand until this one counts steps itself.
        self.counted_by: Optional[int] = said.pop("attempt", None)
        self.progress: dict[str, Any] = said
        self.training = False  # ranks take steps, so they look for stop_file
        self.shown = Progress(self.name, quiet=environment.node > 0)
        self.steps = Steps()
        self.pids: list[int] = []  # of this node's ranks
        self._spoken_to = False  # rank 0 is on this node
        self._progressed = False  # this attempt has reached a new highest step
        self._lock = threading.RLock()  # a parent has threads

    @property
    def attempt_number(self) -> int:
        """Return this attempt's number, from 1."""
        return int(self.attempt["attempt"])

    def progressed(self) -> None:
        """Note the attempt's first new highest step."""

    def phase(self, name: str, detail: str = "") -> None:
        """Show and record what the stage does from now on, for example "loads the model"; "" for
        a phase that needs no clock. The same phase again shows how far it is: `detail`."""
        if name != self.shown.phase:
            self.shown.enter(name)
        self.shown.detail = f", {detail}" if detail else ""
        said = {
            "name": name + self.shown.detail,
            "since": time.time(),
            "attempt": self.attempt_number,
        }
        self._record(said if name else None)

    def _steps(self, said: dict[str, Any]) -> None:
        """Take rank 0's report: step, total, and perhaps loss or reward, and tokens_per_second."""
        if not self.training:
            self.training = True
            if said["step"] < said["total"]:
                self.progress.clear()  # an earlier attempt's loss is not this step's
        self.steps.saw(said["step"], said["total"])
        self.progress.update(said)
        self.counted_by = self.attempt_number
        self.shown.show(self.progress)
        self._record()
        if not self._progressed and said["step"] > self.attempt.get("highest_before", 0):
            self._progressed = True
            self.progressed()

    def _record(self, phase: Optional[dict[str, Any]] = None) -> None:
        """Write progress.json: the newest steps with the attempt that counted them, the phase."""
        content = {**self.progress}
        if self.counted_by is not None:
            content["attempt"] = self.counted_by
        if phase:
            content["phase"] = phase
        with self._lock, contextlib.suppress(OSError):
            files.write_json(self.directory / "progress.json", content)

    def _overheard(self) -> dict[str, Any]:
        """Return what another node's parent has recorded in this attempt; {} if nothing."""
        with contextlib.suppress(InputError, OSError):
            said = files.read_json(self.directory / "progress.json") or {}
            phase = said.pop("phase", {})
            if said.pop("attempt", None) != self.attempt_number:
                said = {}
            return said or (phase if phase.get("attempt") == self.attempt_number else {})
        return {}

    def _hear(self, said: dict[str, Any]) -> None:
        if "pid" in said:
            self.pids.append(said["pid"])
            return
        self._spoken_to = True
        if "say" in said:
            self.shown.say(said["say"])
        elif "phase" in said:
            self.phase(said["phase"], said.get("detail", ""))
        else:
            self._steps(said)

    def _take_over_what_was_overheard(self) -> None:
        """Know what rank 0 has told the parent of its own node."""
        said = self._overheard()
        if "step" in said:
            self.progress, self.training = said, True
            self.counted_by = self.attempt_number
