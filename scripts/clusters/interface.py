"""What every cluster does for the launcher. The docstrings here are the contract; a new cluster is
one module that keeps it, one line in catalog.py, and its folder of files beside slurm/."""

from __future__ import annotations

import re
import sys
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Optional

from scripts.run import attempts
from scripts.run.errors import InputError
from scripts.run.files import read_env, read_json
from scripts.run.layout import Run, from_fact
from scripts.run.submission import Submission


class Job(NamedTuple):
    """Say what a queue knows of a stage's job."""

    cluster: str
    id: str
    word: (
        str  # queued, running; cancelled, failed: its stage never began; "": see the run directory
    )
    note: str  # a sentence for people
    lost: Optional[dict[str, Any]] = (
        None  # the attempt that cannot run any more, now the job is gone
    )
    why: str = ""  # why it is lost

    @property
    def active(self) -> bool:
        """Tell whether the job is in the queue or runs."""
        return self.word in ("queued", "running")


class Started(NamedTuple):
    """Say what a submission led to."""

    code: int  # exit code of the command
    job: str = ""  # the id that a later stage can wait for; "" where the stage has ended already


class Cluster(ABC):
    """Bring stages to where they run. Made once a command, with the user's environment, so that
    what it has asked a scheduler once it need not ask again."""

    name: ClassVar[str]  # CLUSTER=
    listens: ClassVar[str]  # the address where a service listens unless BIND says otherwise
    sees_runs: ClassVar[bool] = True  # False: the run directories are not on this machine
    names_services: ClassVar[bool] = False  # True: a service has a name that outlives its run

    def __init__(self, environment: Mapping[str, str]):
        self.environment = dict(environment)

    @abstractmethod
    def problems(self, submission: Submission, dry_run: bool) -> list[str]:
        """List what keeps a stage from running there, each with its mend. Writes nothing. A dry
        run needs no cluster: it checks the files of the site alone. May block for 30 seconds where
        a scheduler does not answer."""

    @abstractmethod
    def render(self, submission: Submission, after: str = "") -> str:
        """Format what a dry run prints behind the stage's files: the line that submit() carries
        out, to be pasted into a shell in the repository, and comments. `after` is a job that must
        have succeeded before, or a shell variable that holds it. Asks no scheduler."""

    @abstractmethod
    def submit(self, submission: Submission, after: str = "") -> Started:
        """Write the submission and start it: here until it has ended (a service: until it answers),
        on a cluster with a queue until it is queued. Raises InputError if it is refused."""

    @abstractmethod
    def jobs(self, run: Run) -> dict[str, Job]:
        """Ask what the queue knows of the run's stages, by stage; only reads. May block for 30
        seconds; asks nothing for a run without jobs here. Raises InputError if the scheduler does
        not answer although it alone could tell."""

    def lost(self, jobs: Mapping[str, Job]) -> list[tuple[str, dict[str, Any], str]]:
        """List (stage, attempt, why) of the attempts that died without a word, as jobs() has seen
        them. The launcher records their end: a queue forgets, the run directory does not."""
        return [(stage, job.lost, job.why) for stage, job in jobs.items() if job.lost]

    @abstractmethod
    def stop(self, directory: Path, save: bool) -> None:
        """Ask a stage that runs or waits to save and leave, or to leave at once, and block until it
        has gone. What does not leave in a stated time is killed; progress of that is printed.
        Raises InputError where it cannot be reached."""

    def place(self, fact: str, run: Run) -> str:
        """Return a path, as a fact names it, as stages will find it; submit() brings it there.
        Raises InputError if it cannot. Where stages see this machine's files: as it is."""
        return fact

    def fetch(self, run: Run) -> None:  # noqa: B027  most clusters have nothing to do
        """Bring the run's small files to where the launcher reads them. Nothing to do where the
        launcher sees the run directory itself."""

    def beside(self, run: Run, verb: str) -> Optional[tuple[int, str]]:
        """Run a verb of the launcher that reads whole models where they are; return its exit code
        and what it printed, None where the run directory is seen from here."""
        return None

    def remove(self, path: Path, run: Run) -> None:  # noqa: B027  most clusters have nothing to do
        """Remove what lies elsewhere of a run, or of one stage: `path` is its folder here. Raises
        InputError if it cannot. Nothing to do where the launcher sees the run directory itself."""

    def reach(self, directory: Path) -> str:
        """Return the URL of a stage's running service, "" where none runs. May open a tunnel that
        lives as long as this process."""
        server = read_json(directory / "server.json")
        if not server or not attempts.running(directory):
            return ""
        return f"http://{server['host']}:{server['port']}"

    def address(self, directory: Path) -> str:
        """Return the URL of a stage's service to show, "" where none runs. Opens nothing."""
        return self.reach(directory)

    def key(self, directory: Path) -> str:
        """Return the key that a stage's service asks for. Raises InputError, or OSError."""
        given = read_env(directory / "stage.env").get("API_KEY_FILE")
        file = from_fact(given, directory.parent.parent) if given else directory / "api-key"
        return file.read_text(encoding="utf-8").strip()

    def earlier(self, service: str) -> str:
        """Return the run that a service had before the one that it has now. Raises InputError."""
        raise InputError(f"SERVICE={service}: CLUSTER={self.name} has no services with a name")

    def service_state(self, directory: Path) -> str:
        """Say a service's state: "" where none runs, "loading", "serving", or "silent" if it was
        ready once and /health does not answer within 5 seconds."""
        if not attempts.running(directory):
            return ""
        url = self.reach(directory)
        if not url:
            return "loading"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return "serving"
        except OSError:
            return "silent"


# What belongs to make (a make inside a stage would take it for its own, and a stage is no dry run),
# to another job around this shell (a stage with a RANK would take itself for a rank), or to another
# Python. Of Slurm's, what says where the cluster is stays.
NOT_A_STAGES = re.compile(
    r"ARGS|DRY_RUN|MAKEFLAGS|MAKELEVEL|MFLAGS|PYTHONPATH|PYTHONHOME"
    r"|((LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_|GROUP_)?WORLD_SIZE|MASTER_(ADDR|PORT)|ROLE_.*)"
    r"|(PET|TORCHELASTIC|SRUN|PMI|PMIX|OMPI)_.*|RELAY_(JOB|POD|ADDRESS|ATTEMPT)|SLURMD_.*"
    r"|SLURM_(?!(CONF|CONF_SERVER|CLUSTERS|JWT|TIME_FORMAT)$).*"
)


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what is not a stage's."""
    return {key: value for key, value in environment.items() if not NOT_A_STAGES.fullmatch(key)}


def say_what_is_left_out(environment: Mapping[str, str]) -> None:
    """Tell the user of another Python's variables: with them a stage would import other modules."""
    given = [name for name in ("PYTHONPATH", "PYTHONHOME") if environment.get(name)]
    if given:
        left = "not passed on: stages run on .venv alone"
        print(f"{' and '.join(given)}: {left}", file=sys.stderr)
