"""The interface that every cluster keeps, stages here that do not leave, and site.env in a dry
run."""

import inspect
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from scripts.clusters import local
from scripts.clusters.catalog import CLUSTERS
from scripts.clusters.interface import Cluster, child_environment, say_what_is_left_out
from scripts.clusters.slurm_site import TOLD, Site
from scripts.launcher.chat import Server
from scripts.run import attempts
from scripts.run.errors import InputError
from scripts.run.files import write_json
from scripts.run.layout import Run
from scripts.run.processes import bound, process_start

DEAF = "import signal, sys, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 10, 15)]; "


def test_every_cluster_keeps_the_interface():
    """Its methods are the interface's, with the same parameters: a dry run, a launch and a status
    call no other."""
    contract = {n: f for n, f in vars(Cluster).items() if inspect.isfunction(f)}
    for kind in CLUSTERS.values():
        for name, function in vars(kind).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                assert name in contract, f"{kind.__name__}.{name} is not in the interface"
                ours, theirs = inspect.signature(function), inspect.signature(contract[name])
                assert list(ours.parameters) == list(theirs.parameters), f"{kind.__name__}.{name}"
        assert kind.listens, f"{kind.__name__} says no address for a service"
        assert kind.name in CLUSTERS


def test_a_run_without_jobs_asks_no_scheduler(runs):
    for kind in CLUSTERS.values():
        cluster = kind({"PATH": "/nowhere"})
        assert cluster.jobs(Run(runs, "x")) == {}
        assert cluster.lost({}) == []


def test_chat_waits_for_a_model_that_is_loading(runs, capsys):
    """Until it has an address, or has ended."""
    run = Run(runs, "x")
    directory, cluster = run.stage("deploy"), CLUSTERS["local"]({})
    attempt = attempts.begin(directory)
    (directory / "api-key").write_text("secret")
    (directory / "stage.env").touch()
    at = {"host": "127.0.0.1", "port": 9}
    threading.Timer(0.2, write_json, (directory / "server.json", at)).start()
    assert Server(run, cluster).url == "http://127.0.0.1:9/v1/chat/completions"
    assert capsys.readouterr().err == "run x is loading; Ctrl-C ends the wait\n"
    (directory / "server.json").unlink()
    threading.Timer(0.2, attempts.end, (directory, attempt, 1)).start()
    with pytest.raises(InputError, match="run x is not served; make deploy RUN=x"):
        Server(run, cluster)


@pytest.mark.parametrize("save", [True, False])
def test_what_does_not_leave_is_killed(runs, monkeypatch, capsys, save):
    """A library in C may not listen for minutes; stop and cancel used to wait for ever."""
    monkeypatch.setattr(local, "LEAVE_GRACE", 1)
    directory = Run(runs, "x").stage("data")
    code = (
        f"{DEAF}from pathlib import Path; from scripts.run import attempts; "
        f"attempts.begin(Path(sys.argv[1])); print(1, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(directory)]
    stage = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=local.ROOT)
    stage.stdout.readline()
    began = time.monotonic()
    local.Local({}).stop(directory, save=save)
    assert stage.wait(5) == -signal.SIGKILL
    assert time.monotonic() - began < 10
    assert "did not leave in 1 s: killed" in capsys.readouterr().err
    assert attempts.status(directory) == "lost"


def test_a_stage_in_the_foreground_is_killed_after_its_time(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(local, "LEAVE_GRACE", 1)
    code = DEAF + "print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    subprocess.Popen([sys.executable, "-c", f"import os; os.kill({os.getpid()}, 15)"])
    assert local._wait(child, False, tmp_path) == -signal.SIGKILL
    assert "did not leave in 1 s: killed" in capfd.readouterr().err


def test_a_bound_process_dies_with_its_parent(tmp_path):
    """Without code between fork and exec, and the pid stays the child's own."""
    code = (
        "import signal, subprocess, sys; from scripts.run.processes import bound; "
        "child = subprocess.Popen(bound(['sleep', '60'], signal.SIGKILL, signal.SIGUSR1)); "
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=local.ROOT, **pipes)
    pid = int(parent.stdout.readline())
    start = process_start(pid)
    for _ in range(100):
        with open(f"/proc/{pid}/cmdline") as file:
            if file.read().startswith("sleep"):
                break
        time.sleep(0.05)
    os.kill(pid, signal.SIGUSR1)  # it would end a process that does not expect it
    time.sleep(0.1)
    assert process_start(pid) == start, "SIGUSR1 must be ignored below a stage"
    parent.kill()
    parent.wait()
    for _ in range(100):
        if process_start(pid) != start:
            return
        time.sleep(0.05)
    pytest.fail("the child outlives its parent")


def test_a_bound_process_whose_parent_died_first_does_not_start():
    words = bound(["echo", "started"], signal.SIGKILL)
    words[4] = "1"  # somebody else's child
    result = subprocess.run(words, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, ""), result


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "SBATCH_COMMENT", "RELAY_MOUNTS", "FI_X"])
def test_a_comment_of_a_dry_run_is_one_line(name):
    """A line break in a variable left the comment, and ran when the dry run was pasted."""
    assert TOLD.match(name)
    site = Site({"PATH": os.environ["PATH"], name: "INFO\ntouch /tmp/ran\x1b[31m"})
    assert site.problems == []
    assert site.told().isprintable()
    assert f'{name}="INFO\\ntouch /tmp/ran\\u001b[31m"' in site.told()


def test_what_is_not_a_stages_stays_outside(capsys):
    """A stage with another job's RANK takes itself for a rank; with another Python's path it
    imports other modules."""
    others = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "PET_NNODES", "RELAY_JOB"]
    others += ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURMD_NODENAME", "PMIX_RANK"]
    others += ["TORCHELASTIC_RUN_ID", "PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "DRY_RUN"]
    ours = ["PATH", "HOME", "CUDA_VISIBLE_DEVICES", "SLURM_CONF", "SLURM_CLUSTERS", "NCCL_DEBUG"]
    ours += ["SBATCH_PARTITION", "RELAY_RUNTIME", "RELAY_IMAGE", "RANKING", "OMP_NUM_THREADS"]
    left = child_environment(dict.fromkeys(others + ours, "1"))
    assert sorted(left) == sorted(ours)
    say_what_is_left_out({"PYTHONPATH": "/other", "PATH": "/bin"})
    assert "PYTHONPATH: not passed on" in capsys.readouterr().err
    say_what_is_left_out({"PATH": "/bin"})
    assert capsys.readouterr().err == ""
