"""How the nodes of a stage meet, lose each other and meet again: real stage scripts, whose ranks
wait for each other at every step as a collective does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.job import faults, nodes
from scripts.job.environment import JobEnvironment
from scripts.run import attempts, files
from scripts.run.errors import DONE, FAULT, GIVEN_UP, SAVED, WRONG_INPUT
from scripts.run.layout import ROOT
from tests.support.waiting import until

STEPS, INTERVAL = 50, 10
STAGE = """
import os, sys
from scripts.job import follower, nodes, parent
from scripts.job.main import run
from scripts.run.errors import InputError
nodes.BEAT_SECONDS, nodes.FAULT_SECONDS, follower.POLL_SECONDS = 0.1, 1, 0.02
parent.STOP_SECONDS = parent.COME_SECONDS = 2
parent.TICK_SECONDS = parent.SAY_SECONDS = 0.1
Parent, child = parent.Parent, [sys.executable, "-uc", os.environ["CHILD"]]
Parent.command = lambda self, command, env, cwd: self._judge(self._run(child, env, cwd))
def main(stage):
    if (stage.directory / "refuse").exists():
        raise InputError("refused")
    stage.ranks()
    return {"inputs": {}, "outputs": {}, "summary": stage.progress}
run(main)
"""
# A rank for each node: it counts steps with the others, saves, and goes on from there.
RANK = """
import json, os, pathlib, sys, time
from scripts.job.environment import JobEnvironment
from scripts.job.rank import Rank
folder = pathlib.Path(os.environ["FOLDER"])
attempt, node = os.environ["RELAY_ATTEMPT"], int(os.environ.get("PET_NODE_RANK", 0))
nodes, step = int(os.environ["PET_NNODES"]), 0
def read(path):
    return path.read_text() if path.exists() else ""
def write(path, text):
    other = path.with_name(f".{path.name}.{os.getpid()}")
    other.write_text(text)
    other.replace(path)
rank = Rank(folder, JobEnvironment(attempt=int(attempt), rank=node))
step = int(read(folder / "saved") or 0)
time.sleep(float(read(folder / "slow") or 0))
while step < STEPS:
    if node == 0:
        print("@relay " + json.dumps({"step": step, "total": STEPS}))
    stop = rank.sees_stop()
    write(folder / f"at/{attempt}-{node}", f"{step} {stop:d}")
    for other in range(nodes):  # as a collective: whoever is gone is waited for for ever
        while int((read(folder / f"at/{attempt}-{other}") or "-1").split()[0]) < step:
            time.sleep(0.01)
    stop = read(folder / f"at/{attempt}-0") == f"{step} 1"
    if stop or step % INTERVAL == 0:
        if node == 0 and step:
            write(folder / "saved", str(step))
            with open(folder / "saves", "a") as file:
                file.write(f"{attempt} {step}\\n")
    if stop:
        break
    if read(folder / "fault") == f"{node}" and step == 15:
        (folder / "fault").unlink()
        sys.exit("a fault")
    time.sleep(0.03)
    step += 1
if step == STEPS and node == 0:
    write(folder / "saved", str(step))
""".replace("STEPS", str(STEPS)).replace("INTERVAL", str(INTERVAL))


class Gang:
    """The stage scripts of one stage, one a node."""

    def __init__(self, directory: Path, nodes: int, pods: bool = True):
        self.directory, self.nodes, self.pods = directory, nodes, pods
        self.started, self.scripts = 0, {}
        (directory / "at").mkdir(parents=True)
        (directory / "logs").mkdir()
        (directory / "stage.env").write_text("MODEL=debug\nDATA=python\n")
        for node in range(nodes):
            self.start(node)

    def start(self, node: int) -> subprocess.Popen:
        self.started += 1
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "RELAY_"))}
        env.update(PYTHONPATH=str(ROOT), CHILD=RANK, FOLDER=str(self.directory), RELAY_JOB="c:7")
        env.update(PET_NNODES=str(self.nodes), PET_NODE_RANK=str(node), RELAY_SILENCE="2")
        if self.pods:
            env.update(RELAY_POD=f"pod-{self.started}", PET_RDZV_ENDPOINT="localhost:1")
        else:
            env.update(PET_RDZV_ID="7-0")
        with open(self.directory / f"script-{self.started}.txt", "w") as said:
            command = [sys.executable, "-c", STAGE, str(self.directory)]
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=said, stderr=said)
        self.scripts[node] = process
        return process

    def until(self, condition, seconds=30):
        return until(condition, seconds, self.said)

    def said(self) -> str:
        texts = sorted(self.directory.glob("script-*.txt")), self.directory.glob("attempts/*.json")
        return "\n\n".join(f"{p.name}:\n{p.read_text()}" for part in texts for p in part)

    def called(self) -> str:
        call = nodes.called(self.directory / "attempts")
        return call.state if call else ""

    def step(self) -> int:
        return (files.read_json(self.directory / "progress.json") or {}).get("step", 0)

    def step_of(self, attempt: int) -> int:
        """The step that an attempt has come to, 0 before its first."""
        said = files.read_json(self.directory / "progress.json") or {}
        return said.get("step", 0) if said.get("attempt") == attempt else 0

    def reach(self, step: int):
        self.until(lambda: self.step() >= step)

    def exits(self, seconds=40) -> list[int]:
        self.until(lambda: all(p.poll() is not None for p in self.scripts.values()), seconds)
        return [self.scripts[node].returncode for node in sorted(self.scripts)]

    def kill(self, node: int, number=signal.SIGKILL):
        self.scripts[node].send_signal(number)
        return self.scripts[node]

    def freeze(self, node: int, number=signal.SIGSTOP):
        """Stop a node's script and its rank, as a machine that hangs; or let them go on."""
        listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
        parents = {int(pid): int(parent) for pid, parent in map(str.split, listed.splitlines())}
        pid = self.scripts[node].pid
        for one in [pid, *(child for child, parent in parents.items() if parent == pid)]:
            os.kill(one, number)

    def history(self) -> list[dict]:
        return attempts.history(self.directory)


@pytest.fixture
def gang(tmp_path):
    made = []

    def one(nodes=3, pods=True, **files):
        directory = tmp_path / "my runs/x/data"
        directory.mkdir(parents=True)
        for name, text in files.items():
            (directory / name).write_text(text)
        made.append(Gang(directory, nodes, pods))
        return made[-1]

    yield one
    for each in made:
        for process in each.scripts.values():
            process.send_signal(signal.SIGCONT)
            process.kill()


def test_all_is_well(gang):
    made = gang()
    assert made.exits() == [DONE, DONE, DONE]
    assert [a["exit"] for a in made.history()] == [DONE]


@pytest.mark.parametrize("node", [0, 2])
def test_a_killed_script_is_replaced_and_the_others_stay(gang, node):
    made = gang()
    made.reach(15)
    others = [p.pid for k, p in made.scripts.items() if k != node]
    made.kill(node).wait()
    at = made.step()
    made.start(node)
    assert made.exits() == [DONE, DONE, DONE]
    assert others == [p.pid for k, p in made.scripts.items() if k != node]
    assert len(made.history()) == 2, made.said()
    saves = [line.split() for line in (made.directory / "saves").read_text().splitlines()]
    assert int(next(step for n, step in saves if n == "2")) >= at - INTERVAL, "steps were lost"


def test_one_that_is_asked_to_leave_makes_all_save_the_same_step(gang):
    made = gang()
    made.reach(15)
    drained = made.kill(1, signal.SIGTERM)
    made.until(lambda: drained.poll() is not None)
    assert drained.returncode == SAVED
    saved = int((made.directory / "saved").read_text())
    made.until(lambda: len(made.history()) == 2)
    assert made.history()[0]["exit"] == SAVED
    assert made.history()[1]["highest_before"] <= saved
    made.start(1)
    assert made.exits() == [DONE, DONE, DONE]
    steps = [int(line.split()[1]) for line in (made.directory / "saves").read_text().splitlines()]
    assert steps == sorted(steps), "no step is lost, none is trained again"


@pytest.mark.slow
def test_one_that_is_asked_to_leave_before_the_ranks_train(gang):
    made = gang(slow="30")
    made.until(lambda: made.called() == "start")
    drained = made.kill(1, signal.SIGTERM)
    made.until(lambda: drained.poll() is not None, 15)
    assert drained.returncode == SAVED
    (made.directory / "slow").unlink()
    made.start(1)
    assert made.exits() == [DONE, DONE, DONE]


@pytest.mark.slow
def test_node_0_is_asked_to_leave_and_the_others_stay(gang):
    made = gang()
    made.reach(15)
    others = [made.scripts[1].pid, made.scripts[2].pid]
    drained = made.kill(0, signal.SIGTERM)
    made.until(lambda: drained.poll() is not None)
    assert drained.returncode == SAVED
    made.start(0)
    assert made.exits() == [DONE, DONE, DONE]
    assert others == [made.scripts[1].pid, made.scripts[2].pid]


@pytest.mark.slow
def test_all_are_asked_to_leave(gang):
    made = gang()
    made.reach(15)
    for node in (0, 1, 2):
        made.kill(node, signal.SIGTERM)
    assert made.exits() == [SAVED, SAVED, SAVED]
    for node in (0, 1, 2):
        made.start(node)
    assert made.exits() == [DONE, DONE, DONE]
    assert len(made.history()) == 2


def test_a_silent_node_is_lost_and_has_no_say_when_it_wakes(gang):
    made = gang()
    made.reach(15)
    made.freeze(2)
    old = made.scripts[2]
    made.until(lambda: any("silent for" in a.get("error", "") for a in made.history()))
    made.start(2)
    made.until(lambda: made.step_of(2) > 20)
    made.scripts[9] = old
    made.freeze(9, signal.SIGCONT)
    assert made.exits() == [DONE, DONE, DONE, SAVED]
    assert len(made.history()) == 2, made.said()


def test_a_node_0_that_wakes_saves_nothing_more(gang):
    """As a node whose kubelet alone died, and was given up: its stage was begun again elsewhere."""
    made = gang(1)
    made.reach(15)
    made.freeze(0)
    old = made.scripts[0]
    made.start(0)
    made.until(lambda: len(made.history()) == 2)
    made.scripts[9] = old
    made.freeze(9, signal.SIGCONT)
    made.until(lambda: old.poll() is not None)
    assert made.exits() == [DONE, FAULT], made.said()
    saves = [line.split() for line in (made.directory / "saves").read_text().splitlines()]
    second = saves.index(next(row for row in saves if row[0] == "2"))
    assert all(number == "2" for number, _ in saves[second:]), f"the first has saved: {saves}"


@pytest.mark.slow
def test_a_fault_is_tried_again_in_place_then_with_other_pods(gang):
    made = gang(fault="2")
    assert made.exits() == [DONE, DONE, DONE]
    first, second = made.history()
    assert (first["exit"], second["exit"]) == (FAULT, DONE)
    assert "exit code 1" in first["error"]


@pytest.mark.slow
def test_faults_without_progress_are_given_up(gang):
    made = gang(1, saved="zero")  # int() raises in the rank
    assert made.exits() == [FAULT]
    assert len(made.history()) == 2, "the second fault asks for another pod"
    made.start(0)
    assert made.exits() == [FAULT]
    made.start(0)
    assert made.exits() == [GIVEN_UP]
    assert len(made.history()) == 5


def test_without_pods_a_lost_node_ends_the_start(gang):
    """Slurm starts all of a job's scripts again; and one that never comes is not waited for."""
    made = gang(2, pods=False)
    made.reach(15)
    made.freeze(1)
    made.until(lambda: made.scripts[0].poll() is not None)
    made.freeze(1, signal.SIGCONT)
    assert made.exits() == [FAULT, DONE]
    assert re.match("node 1.*: silent for", made.history()[0]["error"])
    made.start(0)
    made.scripts.pop(1)
    assert made.exits() == [FAULT]
    assert "node 1 has not come" in made.history()[1]["error"]


@pytest.mark.parametrize("pods", [True, False])
def test_wrong_input_sends_all_away(gang, pods):
    made = gang(2, pods, refuse="")
    assert made.until(lambda: made.scripts[0].poll()) == WRONG_INPUT
    if not pods:  # a cluster of pods ends the others itself: its Job has failed
        assert made.exits() == [WRONG_INPUT, DONE]


def test_a_stage_that_runs_elsewhere_sends_this_start_away(gang, tmp_path):
    made = gang(2, pods=False)
    made.reach(5)
    environment = {"PET_RDZV_ID": "8-0", "RELAY_JOB": "c:8"}
    others = []
    for node in (0, 1):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "CHILD": RANK, "FOLDER": "/", **environment}
        env.update(PET_NNODES="2", PET_NODE_RANK=str(node))
        command = [sys.executable, "-c", STAGE, str(made.directory)]
        others.append(subprocess.Popen(command, env=env, cwd=ROOT))
    assert [p.wait(20) for p in others] == [WRONG_INPUT, DONE]
    assert made.exits() == [DONE, DONE], "the first's ranks go on"


def test_a_file_that_is_not_whole_says_nothing(tmp_path):
    folder = tmp_path / "attempts"
    folder.mkdir()
    assert nodes.called(folder) is None
    assert (folder / "call.json").exists(), "made by whoever asks: NFS remembers what was not there"
    for text in ("", "1", '{"state": "sta', '{"state": "start"}', '{"state": "x", "attempt": 1}'):
        (folder / "call.json").write_text(text)
        assert nodes.called(folder) is None, f"{text!r} is no order"
    meeting = nodes.Meeting(tmp_path, JobEnvironment(nodes=2, job="c:7", start="s"))
    meeting.call(nodes.BEGUN, 3)
    said = json.loads((folder / "call.json").read_text())
    assert (said["state"], said["attempt"], said["members"]) == ("begun", 3, {})
    meeting.call(nodes.OVER, 2)
    assert meeting.replaced
    assert nodes.called(folder).attempt == 3, "a later attempt's call stands"


def test_a_dead_nodes_file_is_no_sign_of_life(tmp_path):
    (tmp_path / "attempts").mkdir()
    file = tmp_path / "attempts/node1.json"
    files.write_json(file, {"id": "a", "since": 1, "beat": 7, "leaving": False, "failed": 0})
    meeting = nodes.Meeting(tmp_path, JobEnvironment(nodes=2))
    began = time.monotonic()
    meeting.tick()
    meeting.tick()
    assert meeting.absent(began) == [1], "nothing has changed since this script looks"
    files.write_json(file, {"id": "a", "since": 1, "beat": 8, "leaving": False, "failed": 0})
    meeting.tick()
    assert meeting.absent(began) == []
    files.write_json(file, {"id": "b", "since": 2, "beat": 1, "leaving": False, "failed": 0})
    meeting.tick()
    assert meeting.absent(began) == [1], "another script: heard once"
    files.write_json(file, {"id": "b", "since": 2, "beat": 2, "leaving": False, "failed": 0})
    meeting.tick()
    meeting.call(nodes.START, 1)
    files.write_json(file, {"id": "a", "since": 1, "beat": 9, "leaving": False, "failed": 0})
    meeting.tick()
    assert meeting.lost() == "", "the one that was replaced wakes in the middle of a beat"


# --- a hang


def test_patience_is_measured():
    assert faults.patience([], measured=True, site=0) == 3600, "no step has been seen"
    assert faults.patience([1, 1, 2], measured=True, site=0) == 600
    assert faults.patience([1, 1, 90], measured=True, site=0) == 900, "a save took so long"
    assert faults.patience([1, 1, 90], measured=False, site=0) == 3600
    assert faults.patience([1, 1, 900], measured=False, site=0) == 9000
    assert faults.patience([1, 1, 900], measured=False, site=45) == 45


def answer(rank, *places):
    """What faulthandler writes of a rank whose main thread stands at places, innermost first."""
    lines = "".join(f'  File "{path}", line {n} in {name}\n' for path, n, name in places)
    top = '  File "<frozen runpy>", line 88 in _run_code\n'
    other = 'Thread 0x1 (most recent call first):\n  File "t.py", line 1 in wait\n\n'
    return f"rank {rank} on n{rank}, process 7\n{other}Current thread 0x2 (…):\n{lines}{top}"


WAITS, READS = ("dist.py", 5, "all_reduce"), ("data.py", 40, "__next__")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([answer(0, WAITS), answer(1, READS), answer(2, WAITS)], ["rank 1 on n1", "data.py:40"]),
        ([answer(0, WAITS), "rank 1 on n1, process 7\n"], ["rank 1 on n1", "no answer"]),
        ([answer(0, WAITS), answer(1, READS)], ["rank 0", "dist.py:5", "rank 1", "data.py:40"]),
        ([answer(0, WAITS), answer(1, WAITS)], ["all ranks stand at dist.py:5 in all_reduce"]),
        ([], ["no rank has answered"]),
    ],
)
def test_who_hangs(answers, said):
    told = faults.who_hangs(dict(enumerate(answers)))
    assert all(words in told for words in said), told
    assert ("n2" in told) is False


HANGS = """
import os, sys, time
from pathlib import Path
from scripts.job.main import run
def rank(stage):
    stage.report(step=1, total=9)
    stage.report(step=2, total=9)
    if stage.attempt_number == 1:
        time.sleep(60)
def main(stage):
    command = [sys.executable, "-c", os.environ["SELF"], str(stage.directory)]
    stage.command(command, stage.environment.for_ranks(stage.attempt_number, {}), Path.cwd())
    return {"inputs": {}, "outputs": {}, "summary": {}}
run(main, rank)
"""


@pytest.mark.slow
def test_a_hang_ends_the_attempt_and_says_where(tmp_path):
    directory = tmp_path / "runs/x/data"
    (directory / "logs").mkdir(parents=True)
    (directory / "stage.env").write_text("MODEL=debug\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SELF": HANGS, "RELAY_HANG": "2"}
    command = [sys.executable, "-c", HANGS, str(directory)]
    first = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == FAULT, first.stdout + first.stderr
    assert "no step for 2 s" in first.stderr or "no step for 3 s" in first.stderr
    assert "in rank" in first.stderr, first.stderr
    assert (directory / "logs/stacks-1-0.txt").exists()
    second = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == DONE, second.stdout + second.stderr
    assert not list(directory.glob("logs/stacks-2*")), "nobody was asked"
