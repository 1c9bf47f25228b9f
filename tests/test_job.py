"""Inside the job: what the environment says, how nodes meet, how a stage stops."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.job.environment import OF_A_RANK, JobEnvironment, forget_rank
from scripts.job.parent import Parent
from scripts.job.rank import Rank
from scripts.run import attempts, files
from scripts.run.errors import InputError
from scripts.run.layout import ROOT
from scripts.run.processes import process_start

TWO = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
FIRST = {**TWO, "PET_NODE_RANK": "0"}


@pytest.fixture
def directory(tmp_path) -> Path:
    """A submitted stage."""
    folder = tmp_path / "my runs/x/data"
    (folder / "logs").mkdir(parents=True)
    (folder / "attempts").mkdir()
    (folder / "stage.env").write_text("MODEL=debug\nDATA=python\n")
    return folder


# --- the environment


def test_one_machine():
    assert JobEnvironment.read({}) == JobEnvironment()
    assert JobEnvironment.read({"SLURM_NODEID": "3"}).node == 0, "a single node is node 0"


def test_slurm_and_torchrun_name_the_node():
    slurm = {**TWO, "SLURM_NODEID": "1", "SLURM_STEP_ID": "4", "PET_RDZV_ID": "7-0"}
    found = JobEnvironment.read({**slurm, "RELAY_JOB": "c:7", "RELAY_ADDRESS": "10.0.0.1"})
    assert found == JobEnvironment(2, 1, 1, "c:7", "7-0.4", "10.0.0.1", world=2, rendezvous="7-0")
    assert JobEnvironment.read({**slurm, "PET_NODE_RANK": "0"}).node == 0, "torchrun's own wins"
    with pytest.raises(InputError, match="which of 2 nodes this is, nobody says"):
        JobEnvironment.read(TWO)  # a container of Slurm's own: each node took itself for node 0


def test_a_single_rank_is_told_what_torchrun_would():
    parent = JobEnvironment.read({"RELAY_JOB": "c:7"})
    told = parent.for_ranks(3, {"EXTRA": "1"}, {"RELAY_JOB": "c:7", "HF_HUB_OFFLINE": "0"})
    rank = JobEnvironment.read(told)
    assert (rank.rank, rank.local_rank, rank.world, rank.attempt) == (0, 0, 1, 3)
    assert (told["EXTRA"], told["HF_HUB_OFFLINE"]) == ("1", "0"), "the user's own wins"
    forget_rank(told)
    assert not set(OF_A_RANK) & set(told)
    assert not set(OF_A_RANK) & set(JobEnvironment.read(FIRST).for_ranks(1, {}, {}))


def variables_read(source: str) -> set[str]:
    """Names that a module takes from the environment, or asks it for."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        inside: list[ast.expr] = []
        if isinstance(node, ast.Subscript):
            inside, of = [node.slice], node.value
        elif isinstance(node, ast.Call):
            inside, of = node.args[:1], node.func
        elif isinstance(node, ast.Compare):
            inside, of = [node.left], node.comparators[0]
        if inside and re.search(r"environ|getenv", ast.unparse(of)):
            found |= {n.value for n in ast.walk(inside[0]) if isinstance(n, ast.Constant)}
    return found


def test_one_module_reads_what_clusters_and_torchrun_say():
    pattern = re.compile(r"(PET|SLURM|RELAY)_\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_\w+")
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in ROOT.glob("scripts/**/*.py")
        for name in variables_read(path.read_text())
        if pattern.fullmatch(str(name))
    }
    assert found == set(), "scripts/job/environment.py takes these, the others ask it"
    seen = variables_read("os.environ['RANK'], os.environ.get('PET_X'), 'A' in os.environ")
    assert seen == {"RANK", "PET_X", "A"}, "the test itself must be able to fail"


def test_what_has_no_place_in_a_rank():
    for name in ("kill", "command", "stop", "ranks", "begin"):
        assert hasattr(Parent, name)
        assert not hasattr(Rank, name), f"a rank must not have {name}()"


def test_no_python_code_between_fork_and_exec():
    """deploy has threads when it forks: preexec_fn may wait for a lock that nobody holds."""
    for path in ROOT.glob("scripts/**/*.py"):
        assert "preexec_fn=" not in path.read_text(), path


def test_the_job_room_imports_the_run_room_at_the_top_of_its_files():
    for path in ROOT.glob("scripts/job/*.py"):
        tree = ast.parse(path.read_text())
        imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert set(imports) <= set(tree.body), f"{path}: an import inside a function"
        names = [getattr(n, "module", None) or n.names[0].name for n in imports]
        ours = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
        assert all(re.match(r"scripts\.(job|run)\b", name) for name in ours), (path, ours)


# --- how a stage stops

STAGE = """
import os, sys
from scripts.job import parent
from scripts.job.main import run
from scripts.run.layout import ROOT
parent.STOP_SECONDS = 1.5
def main(stage):
    stage.command([sys.executable, "-uc", os.environ["CHILD"]], dict(os.environ), ROOT)
    return {"inputs": {}, "outputs": {}, "summary": stage.progress}
run(main)
"""
CHILD = """
import os, signal, sys, time
print(f"pid {os.getpid()}")
def tell(said): print('@relay ' + said)
"""
DEAF = CHILD + 'signal.signal(signal.SIGTERM, signal.SIG_IGN); tell(\'{"phase": "sleeps"}\')\n'
SLEEP = "time.sleep(60)\n"
STEP = 'tell(\'{"step": 3, "total": 9}\')\n'


class Started:
    """A stage script whose only rank runs `child`."""

    def __init__(self, directory: Path, child: str):
        self.directory = directory
        env = {**os.environ, "PYTHONPATH": str(ROOT), "CHILD": child, "RELAY_JOB": "c:7"}
        command = [sys.executable, "-c", STAGE, str(directory)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=env, cwd=ROOT, **streams)
        self.log = directory / "logs/attempt-1.log"

    def until(self, condition):
        deadline = time.monotonic() + 20
        while not (found := condition()):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.02)
        return found

    def child(self) -> tuple[int, str]:
        """The rank's pid and start time, once it has said its pid."""
        said = self.until(
            lambda: self.log.exists() and re.search(r"pid (\d+)\n", self.log.read_text())
        )
        pid = int(said[1])
        return pid, process_start(pid)

    def progress(self, key: str):
        """What progress.json says, once it says that."""
        file = self.directory / "progress.json"
        return self.until(lambda: (files.read_json(file) or {}).get(key))

    def end(self, seconds: float = 20) -> tuple[int, str]:
        said = self.process.communicate(timeout=seconds)[0]
        return self.process.returncode, said


@pytest.fixture
def start(directory):
    started = []

    def one(child: str) -> Started:
        started.append(Started(directory, child))
        return started[-1]

    yield one
    for stage in started:
        stage.process.kill()
        stage.process.communicate()


def word(directory: Path) -> str:
    return (directory / "retry").read_text().split()[0]


def test_ranks_that_do_not_train_have_seconds_to_end(directory, start):
    stage = start(DEAF + SLEEP)
    stage.progress("phase")
    pid = stage.child()
    asked = time.monotonic()
    stage.process.send_signal(signal.SIGTERM)
    code, said = stage.end()
    took = time.monotonic() - asked
    assert code == 75, said
    assert 1 < took < 6, "SIGKILL comes STOP_SECONDS after SIGTERM"
    assert process_start(pid[0]) != pid[1]
    assert attempts.status(directory) == "stopped"
    assert word(directory) == "again"


def test_the_second_signal_ends_all_at_once(directory, start):
    stage = start(DEAF + STEP + SLEEP)
    stage.progress("step")
    pid = stage.child()
    stage.process.send_signal(signal.SIGTERM)
    stop = directory / "attempts/1.stop"
    stage.until(stop.exists)
    time.sleep(2)
    assert stage.process.poll() is None, "ranks that train have no deadline here"
    stage.process.send_signal(signal.SIGUSR1)
    assert stage.end(2)[0] == 75
    assert process_start(pid[0]) != pid[1]
    assert not stop.exists()


def test_a_second_signal_before_the_first_is_done(directory, monkeypatch, capfd):
    """cancel sends two at once: the handler of one runs within that of the other."""
    parent = Parent(directory, JobEnvironment(job="c:7"))
    parent.begin()
    parent.training = True
    wait = "import time; time.sleep(60)"
    parent._child = subprocess.Popen([sys.executable, "-c", wait], start_new_session=True)
    slow = files.write_atomic

    def write(path, text):
        if path.suffix == ".stop":
            parent.stop(signal.SIGUSR1, None)
        slow(path, text)

    monkeypatch.setattr(files, "write_atomic", write)
    parent.stop(signal.SIGTERM, None)
    assert parent._child.wait(5) == -signal.SIGKILL
    assert "saving at the end of this step" in capfd.readouterr().out


def test_ranks_that_train_save_and_leave(directory, start):
    wait = f"while not os.path.exists({str(directory / 'attempts/1.stop')!r}): time.sleep(0.02)\n"
    stage = start(CHILD + STEP + wait)
    stage.progress("step")
    stage.process.send_signal(signal.SIGUSR1)
    code, said = stage.end()
    assert code == 75
    assert "saving at the end of this step" in said


def test_what_slurm_sends_to_every_process_does_not_end_a_rank(directory, start):
    stage = start(CHILD + "time.sleep(1.5)\n")
    os.kill(stage.child()[0], signal.SIGUSR1)
    assert stage.end()[0] == 0
    assert attempts.status(directory) == "done"


def test_a_killed_script_leaves_no_rank_and_the_right_word(directory, start):
    for number in range(1, 6):
        stage = start(DEAF + SLEEP)
        stage.log = directory / f"logs/attempt-{number}.log"
        pid = stage.child()
        stage.process.kill()
        stage.end()
        assert word(directory) == ("down" if number == 5 else "again"), number
        time.sleep(0.1)
        assert process_start(pid[0]) != pid[1], "it would write on beside the next attempt"
    assert attempts.status(directory) == "lost"


def test_a_new_highest_step_rewrites_the_word_at_once(directory, start):
    for _ in range(4):
        attempts.end(directory, attempts.begin(directory, "c:7"), 1)
    stage = start(DEAF + "time.sleep(1)\n" + STEP + SLEEP)
    stage.progress("phase")
    assert word(directory) == "down", "killed now, it would be the fifth fault"
    stage.progress("step")
    stage.until(lambda: word(directory) == "again")


def test_a_fault_names_the_rank_and_shows_the_log(directory, start):
    code, said = start(CHILD + "sys.exit('no such layer')\n").end()
    assert code == 1
    assert "exit code 1" in said
    assert "no such layer" in said
    assert attempts.status(directory) == "failed"


def test_progress_json_holds_steps_and_phase_of_their_own_attempts(directory, start):
    files.write_json(
        directory / "progress.json", {"step": 9, "total": 9, "loss": 1.5, "attempt": 7}
    )
    stage = start(DEAF + SLEEP)
    phase = stage.progress("phase")
    assert (phase["name"], phase["attempt"]) == ("sleeps", 1)
    said = files.read_json(directory / "progress.json")
    assert (said["step"], said["loss"], said["attempt"]) == (9, 1.5, 7), "until it counts itself"
    stage.process.send_signal(signal.SIGTERM)
    stage.end()
    assert "phase" not in files.read_json(directory / "progress.json")


def test_a_service_that_answered_is_noted(directory):
    parent = Parent(directory, JobEnvironment(job="c:7"))
    parent.begin()
    parent.ready()
    assert attempts.history(directory)[0]["served"] is True
    parent.end(1, "it crashed")
    parent.ready()  # the thread that waits for the first answer may come too late
    assert attempts.history(directory)[0]["exit"] == 1


def test_a_second_launch_and_a_finished_stage(directory, start):
    stage = start(DEAF + SLEEP)
    stage.child()
    code, said = start(CHILD).end()
    assert code == 64
    assert "running already" in said
    stage.process.kill()
    stage.end()
    files.write_json(directory / "stage.json", {"stage": "data"})
    assert start(CHILD).end() == (0, "data: done already\n")
