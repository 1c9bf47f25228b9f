"""The stages under a real slurmctld: the chain, requeue, lost nodes, time limits, stops, and every mistake the issue names.

make test-slurm brings up a Slurm of its own (tests/lab.py); RELAY_SLURM=site uses the cluster that it finds, and leaves out
what breaks nodes.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import ROOT, lacking, launch, make
from lab import Lab, missing
from test_kills import ARGS, assert_same, whole_steps

from scripts.clusters import slurm
from scripts.run import attempts, files, layout

pytestmark = pytest.mark.slow
PAIR = {"CLUSTER": "slurm", "NODES": "2", "GPUS": "1"}
PORT = "8041"


class Site:
    """The cluster around this shell."""

    environment: ClassVar = {}
    ask, state = Lab.ask, Lab.state


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory):
    """A cluster of three nodes with two GPUs each; runs go where its nodes see them."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("RELAY_SLURM") == "site":
            patch.setenv("RUNS", str(ROOT / f"runs/test-slurm-{os.getpid()}"))
            yield Site()
            for file in layout.runs_root().glob("*/*/job.json"):  # a failed test's, which wait or serve for days
                subprocess.run(["scancel", files.read_json(file)["job"]], capture_output=True)
            return
        if missing():
            lacking(f"a Slurm of its own needs {', '.join(missing())}: apt-get install slurmctld slurmd slurm-client munge")
        cluster = Lab(tmp_path_factory.mktemp("slurm"), nodes=3, min_job_age=3600)
        cluster.up()
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("RUNS", str(tmp_path_factory.mktemp("the cluster") / "my runs"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield cluster
        cluster.down()


@pytest.fixture
def own(lab):
    """The same, to break: only where it is the tests' own."""
    return lab if isinstance(lab, Lab) else lacking("breaking nodes needs a cluster of its own; without RELAY_SLURM=site")


def folder(run, stage):
    return layout.runs_root() / run / stage


def job(run, stage):
    return files.read_json(folder(run, stage) / "job.json")["job"]


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, (
            "it did not come to that\n" + subprocess.run(["squeue"], capture_output=True, text=True).stdout
        )
        time.sleep(0.2)
    return found


def start_again(number):
    """A requeued job need not wait its two minutes; but three seconds: a start in the second in which slurmd revoked the
    one before is revoked with it ("Killing non-startable batch JobId: Job credential revoked")."""
    time.sleep(3)
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], check=True)


def ended(lab, run, stage, seconds=300):
    """Wait until a stage's job has left the queue. Returns its state."""
    number = job(run, stage)

    def gone():
        shown = subprocess.run(["scontrol", "-o", "show", "job", number], capture_output=True, text=True).stdout
        if "JobState=PENDING" in shown and "Reason=BeginTime" in shown:
            start_again(number)
        return "JobState=" in shown and not re.search(r"JobState=(PENDING|RUNNING|COMPLETING|CONFIGURING)", shown)

    until(gone, seconds)
    return lab.state(number)


def restarts(lab, number):
    return int(re.search(r"Restarts=(\d+)", lab.ask("scontrol", "-o", "show", "job", number))[1])


def saved(run, stage, beyond=0):
    """Wait until a stage has a whole checkpoint beyond a step; returns its step."""
    return until(lambda: (n := max(whole_steps(folder(run, stage)), default=0)) > beyond and n)


def said(run, stage):
    """What a stage's job printed."""
    return "".join(p.read_text() for p in sorted(folder(run, stage).glob("logs/slurm-*.log")))


def signal_ranks(number, what):
    """A signal to every rank of a job."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_text().split("\0")
            if f"SLURM_JOB_ID={number}" in environment and any(e.startswith("RANK=") for e in environment):
                os.kill(int(process.name), what)


def status(run, stage):
    line = next(line for line in make("status", RUN=run).stdout.splitlines() if line.startswith(f"{stage} "))
    return re.sub(r" +", " ", line)


def ask_at_length(run):
    """Begin to ask a served model for 400 tokens; the result is how many came."""
    server = files.read_json(folder(run, "deploy") / "server.json")
    key = (folder(run, "deploy") / "api-key").read_text().strip()
    body = json.dumps({"model": run, "prompt": "def main", "max_tokens": 400, "ignore_eos": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://{server['host']}:{server['port']}/v1/completions", body, headers)

    def ask():
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["usage"]["completion_tokens"]

    begun = ThreadPoolExecutor().submit(ask)
    time.sleep(0.5)
    return begun


def refused(verb, *words, **options):
    began = time.monotonic()
    result = launch(verb, CLUSTER="slurm", **options)
    assert (result.returncode, "Traceback" in result.stderr) == (64, False), (result.stdout, result.stderr)
    for word in words:
        assert word in result.stderr, result.stderr
    assert time.monotonic() - began < 30
    assert "test-" not in subprocess.run(["squeue", "-h", "-o", "%j"], capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def whole(lab):
    """An unbroken run of data and the trained stages, two nodes each, given stage by stage while the queue works."""
    make("data", RUN="whole", CLUSTER="slurm")
    for stage in layout.TRAINED:
        make(stage, RUN="whole", **PAIR, ARGS=ARGS[stage])
    assert [ended(lab, "whole", stage) for stage in layout.STAGES[:4]] == ["COMPLETED"] * 4, said("whole", "pretrain")
    return layout.runs_root() / "whole"


def given(whole, run, stage):
    """What every job of a broken run is submitted with: the unbroken one's input."""
    source = {"finetune": "pretrain", "align": "finetune"}.get(stage)
    more = {"FROM": str(whole / source / "model")} if source else {}
    return {"RUN": run, "DATA": str(whole / "data"), "ARGS": ARGS[stage], **PAIR, **more}


# --- the chain ---


def test_stages_given_one_by_one_are_chained(whole):
    """Each was submitted while the one before it was in the queue, and ran on two nodes."""
    for stage in layout.TRAINED:
        assert "afterok" in (whole / stage / "submitted.txt").read_text() or layout.record(whole / stage)["started"], stage
        assert layout.record(whole / stage)["facts"]["NODES"] == "2"
        assert {p.name for p in (whole / stage / "logs").glob("*.log")} >= {"attempt-1.log", "attempt-1.node1.log"}


def test_the_pipeline_the_gate_and_a_service(lab):
    """One command queues all; the scheduler's own gate refuses a model that learned nothing; forced, it serves, survives a
    requeue, and ends."""
    short = {
        "PRETRAIN_ARGS": "--training.steps 20",
        "FINETUNE_ARGS": "max_steps_per_epoch=10",
        "ALIGN_ARGS": "max_steps_per_epoch=10",
    }
    options = {"RUN": "line", **PAIR, **short, "EVALUATE_ARGS": "--limit 16", "PORT": PORT}
    began = time.monotonic()
    with ThreadPoolExecutor() as two:
        both = [two.submit(launch, "pipeline", **options) for _ in range(2)]
    assert time.monotonic() - began < 30, "it must not wait for the queue"
    said_by = {one.result().returncode: one.result().stdout + one.result().stderr for one in both}
    assert 0 in said_by, said_by
    assert set(said_by) <= {0, 64}, said_by
    assert "a moment ago" in said_by.get(64, "a moment ago"), said_by
    queued = subprocess.run(["squeue", "-h", "-o", "%j"], capture_output=True, text=True).stdout.split()
    assert sorted(name for name in queued if name.startswith("line-")) == sorted(f"line-{s}" for s in layout.STAGES)
    jobs = [job("line", stage) for stage in layout.STAGES]
    for stage in layout.STAGES[2:]:
        assert f"waits for {layout.STAGES[layout.STAGES.index(stage) - 1]}" in status("line", stage)
    assert "submitted already" in launch("pretrain", **options).stderr
    make("pipeline", **options)
    assert [job("line", stage) for stage in layout.STAGES] == jobs, "a second pipeline doubles no job"
    gpus = {s: re.search(r"gres/gpu=(\d+)", lab.ask("scontrol", "-o", "show", "job", job("line", s)) or "") for s in layout.STAGES}
    assert ended(lab, "line", "deploy", 600) == "FAILED"
    assert [ended(lab, "line", stage) for stage in layout.STAGES[:5]] == ["COMPLETED"] * 5
    assert gpus["data"] is None
    assert "refused" in status("line", "deploy")
    assert "is needed (" in status("line", "deploy")
    assert restarts(lab, job("line", "deploy")) == 0

    make("pipeline", **options, FORCE="1")
    until(lambda: "serving" in status("line", "deploy"))
    before = files.read_json(folder("line", "deploy") / "server.json")
    make("chat", RUN="line", PROMPT="What is io?")
    number = job("line", "deploy")
    if isinstance(lab, Lab):
        lab.ask("scontrol", "update", f"NodeName={before['node']}", "State=drain", "Reason=test")  # so it goes elsewhere
        lab.ask("scontrol", "requeue", number)
        until(lambda: lab.state(number) == "PENDING")
        assert "queued" in status("line", "deploy")
        start_again(number)
        until(lambda: "serving" in status("line", "deploy"))
        assert files.read_json(folder("line", "deploy") / "server.json")["host"] != before["host"]
        make("chat", RUN="line", PROMPT="What is io?")
        lab.ask("scontrol", "update", f"NodeName={before['node']}", "State=resume")
    answer = ask_at_length("line")
    make("undeploy", RUN="line")
    assert answer.result(60) == 400, "it must finish the answers that it has begun"
    assert status("line", "deploy").startswith("deploy stopped")
    assert ended(lab, "line", "deploy") == "FAILED", "75, not requeued"


def test_what_a_dry_run_prints_works_pasted(lab):
    """The chain is whole, make knows its jobs, and a job of it that is requeued when all is done ends at once, on both nodes."""
    short = {**PAIR, "PRETRAIN_ARGS": "--training.steps 20", "FINETUNE_ARGS": "max_steps_per_epoch=10", "FORCE": "1", "PORT": PORT}
    shown = launch("pipeline", RUN="pasted", **short, DRY_RUN="1").stdout
    assert not (layout.runs_root() / "pasted").exists()
    subprocess.run(["bash", "-e"], input="\n\n".join(shown.split("\n\n")[:4]), text=True, cwd=ROOT, check=True)
    assert "finetune: submitted already" in launch("finetune", RUN="pasted", **PAIR, ARGS=short["FINETUNE_ARGS"]).stderr
    rest = launch("pipeline", RUN="pasted", **short, DRY_RUN="1").stdout
    assert f"# finetune: job {job('pasted', 'finetune')} waits for pretrain" in rest, "it shows what make would add"
    assert f"--dependency=afterok:{job('pasted', 'finetune')} " in rest
    until(lambda: "finetune done" in status("pasted", "finetune"), 180)
    made = launch("finetune", RUN="pasted", **PAIR, ARGS=short["FINETUNE_ARGS"])
    assert "done already" in made.stdout, "make would have written the same"
    number = job("pasted", "finetune")
    until(lambda: lab.state(number) == "COMPLETED")
    lab.ask("scontrol", "requeue", number)
    start_again(number)
    assert ended(lab, "pasted", "finetune", 30) == "COMPLETED"


# --- lost nodes, time limits, faults ---


@pytest.mark.parametrize("way", ["state=down", "kill -9 of slurmd and slurmstepd"])
def test_a_lost_node(own, whole, way):
    """The job goes on elsewhere, from the newest whole checkpoint, to the unbroken run's losses and weights."""
    run = "down" if "=" in way else "dead"
    make("pretrain", **given(whole, run, "pretrain"))
    step = saved(run, "pretrain", 8)
    number = job(run, "pretrain")
    node = own.ask("scontrol", "show", "hostnames", own.ask("squeue", "-h", "-j", number, "-o", "%N")).split()[-1]  # not node 0's
    if "=" in way:
        own.ask("scontrol", "update", f"NodeName={node}", "State=down", "Reason=test")
    else:
        own.kill_node(node)
    until(lambda: own.state(number) == "PENDING", 90)
    at = files.read_json(folder(run, "pretrain") / "progress.json")["step"]
    line = status(run, "pretrain")
    assert "queued" in line, line
    assert ended(own, run, "pretrain") == "COMPLETED", said(run, "pretrain")
    resumed = int(re.findall(r"goes on from its checkpoint of step (\d+)", said(run, "pretrain"))[-1])
    assert resumed >= step
    assert at - resumed <= 2 * 4, "one interval, and the save that was under way"
    assert_same(folder("whole", "pretrain"), folder(run, "pretrain"))
    if "=" not in way:
        own.start_node(node)
    else:
        own.ask("scontrol", "update", f"NodeName={node}", "State=resume")
    until(lambda: node in own.ask("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"))


@pytest.mark.parametrize("stage", layout.TRAINED)
def test_the_time_limit(own, whole, stage):
    """Slurm's own signal, before its own time limit: saved, requeued, completed, as if nothing had been."""
    run = f"limit-{stage}"
    make(stage, **given(whole, run, stage))
    saved(run, stage)
    number = job(run, stage)
    signal_ranks(number, signal.SIGSTOP)  # Slurm looks at its time limits twice a minute, this training is over sooner
    own.ask("scontrol", "update", f"JobId={number}", "TimeLimit=2")  # less than the lead is left
    until(lambda: list((folder(run, stage) / "attempts").glob("*.stop")), 60)
    signal_ranks(number, signal.SIGCONT)
    until(lambda: restarts(own, number) == 1, 60)
    own.ask("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    assert ended(own, run, stage) == "COMPLETED", said(run, stage)
    tried = attempts.history(folder(run, stage))
    assert [a["exit"] for a in tried] == [75, 0]
    assert {a["job"] for a in tried} == {f"lab:{number}"}
    assert_same(whole / stage, folder(run, stage))


def test_wrong_input_is_never_tried_again(lab, whole):
    options = {**given(whole, "wrong", "pretrain"), "ARGS": "--training.stepz 5"}
    make("pretrain", **options)
    assert ended(lab, "wrong", "pretrain") == "FAILED"
    assert restarts(lab, job("wrong", "pretrain")) == 0
    assert status("wrong", "pretrain").startswith("pretrain refused")
    assert "torchtitan refuses them" in status("wrong", "pretrain")


def test_a_crash_loop_ends(own):
    """Three faults in a row, then it stays down, with the fault on the table."""
    directory = folder("loop", "data")
    directory.mkdir(parents=True)
    (directory / "sets.partial").write_text("in the way")
    make("data", RUN="loop", CLUSTER="slurm")
    assert ended(own, "loop", "data") == "FAILED"
    assert restarts(own, job("loop", "data")) == 2
    assert "3 faults in a row" in said("loop", "data")
    assert "FileExistsError" in said("loop", "data")
    assert "data failed" in status("loop", "data")


# --- stops ---


def test_a_stop_saves_and_takes_the_rest_from_the_queue(lab, whole):
    """Then the same pipeline goes on from there."""
    options = given(whole, "stopped", "pretrain")
    make("pretrain", **options)
    make("finetune", **{**options, "ARGS": ARGS["finetune"]})
    saved("stopped", "pretrain")
    out = make("stop", RUN="stopped").stdout
    assert out.splitlines()[:2] == ["finetune: taken from the queue", "pretrain: stopped"]
    assert "submits the others again" in out
    assert status("stopped", "pretrain").startswith("pretrain stopped")
    assert "cancelled" in status("stopped", "finetune")
    assert (lab.state(job("stopped", "pretrain")), restarts(lab, job("stopped", "pretrain"))) == ("FAILED", 0)
    make("pretrain", **options)
    assert ended(lab, "stopped", "pretrain") == "COMPLETED"
    assert_same(whole / "pretrain", folder("stopped", "pretrain"))


def test_cancelled_from_outside(lab, whole):
    """scancel ends every process at once: said, not requeued; the same command goes on."""
    options = given(whole, "cancelled", "pretrain")
    make("pretrain", **options)
    make("finetune", **{**options, "ARGS": ARGS["finetune"]})
    saved("cancelled", "pretrain")
    lab.ask("scancel", job("cancelled", "pretrain"))
    assert ended(lab, "cancelled", "pretrain") == "CANCELLED"
    assert ended(lab, "cancelled", "finetune") == "CANCELLED", "its dependency can never be met"
    assert "never started" in status("cancelled", "finetune") or "cancelled" in status("cancelled", "finetune")
    assert re.match("pretrain (stopped|lost)", status("cancelled", "pretrain"))
    make("pretrain", **options)
    assert ended(lab, "cancelled", "pretrain") == "COMPLETED"
    assert_same(whole / "pretrain", folder("cancelled", "pretrain"))


# --- mistakes ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"SBATCH_PARTITION": "nope"}, ["invalid partition", "SBATCH_PARTITION=nope", "sinfo -s"]),
        ({"NODES": "9"}, ["9 nodes", "sinfo"]),
        ({"GPUS": "3"}, ["3 GPUs each", "sinfo"]),
        ({"SBATCH_TIMELIMIT": "3"}, ["--time=3", "300 s"]),
        ({"SBATCH_QOS": "none-such", "SBATCH_PARTITION": "nope"}, ["invalid partition"]),
        ({"RELAY_RUNTIME": "pyxis", "RELAY_IMAGE": "/no.sqsh"}, ["RELAY_IMAGE=/no.sqsh", "no such file"]),
    ],
)
def test_a_mistake_leaves_nothing_in_the_queue(own, whole, options, words):
    refused("pretrain", *words, **{"RUN": "test-x", "DATA": str(whole / "data"), **options})
    assert not folder("test-x", "pretrain").exists()


def test_slurmctld_does_not_answer(own, whole, tmp_path, monkeypatch):
    conf = re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", own.conf.read_text()) + "MessageTimeout=3\n"
    (tmp_path / "slurm.conf").write_text(conf)
    (tmp_path / "gres.conf").write_text((own.folder / "gres.conf").read_text())
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    result = launch("data", CLUSTER="slurm", RUN="test-unreachable")
    assert result.returncode == 64
    assert "Slurm does not answer" in result.stderr
    assert "scontrol ping" in result.stderr
    assert "align     done" in make("status", RUN="whole").stdout, "what is finished needs no scheduler"
    (whole / "evaluate").mkdir()
    (whole / "evaluate/job.json").write_text('{"cluster": "slurm", "name": "lab", "job": "7", "submitted": 0}')
    result = launch("status", RUN="whole")
    assert "align     done" in result.stdout, "what is recorded is shown all the same"
    assert "Slurm does not answer" in result.stderr
    shutil.rmtree(whole / "evaluate")


def test_two_sorts_of_runs_that_the_nodes_do_not_see(own, monkeypatch):
    """Not on the job's first node: its output cannot be opened. Not on the second alone: the job says which."""
    if not own.own_namespaces:
        lacking("nodes with folders of their own need root")
    monkeypatch.setenv("RUNS", str(own.folder / "node-local"))
    make("data", RUN="hidden", CLUSTER="slurm")
    until(lambda: own.state(job("hidden", "data")) == "FAILED")
    line = status("hidden", "data")
    assert "could not write" in line, line
    assert f"{own.folder}/node-local" in line
    assert "RUNS=" in line


def test_the_second_node_does_not_see_the_run(own, whole):
    if not own.own_namespaces:
        lacking("nodes with folders of their own need root")
    options = given(whole, "half", "pretrain")
    pid = (own.folder / "slurmd.node3.pid").read_text().strip()
    own.ask("scontrol", "update", "NodeName=node2", "State=drain", "Reason=test")  # so that it gets node1 and node3
    hidden = str(layout.runs_root() / "half")
    Path(hidden).mkdir()
    subprocess.run(["nsenter", "-t", pid, "-m", "mount", "-t", "tmpfs", "none", hidden], check=True)
    try:
        make("pretrain", **options)
        assert ended(own, "half", "pretrain", 30) == "FAILED"
        line = status("half", "pretrain")
        assert "node3" in line, line
        assert "cannot be read" in line
        assert restarts(own, job("half", "pretrain")) == 0
    finally:
        subprocess.run(["nsenter", "-t", pid, "-m", "umount", hidden], check=True)
        own.ask("scontrol", "update", "NodeName=node2", "State=resume")


def test_a_job_with_another_number_of_nodes_is_refused(own, whole):
    make("pretrain", **given(whole, "count", "pretrain"), SBATCH_TIMELIMIT="60")
    lab_line = (folder("count", "pretrain") / "submitted.txt").read_text()
    make("cancel", RUN="count")
    assert own.state(job("count", "pretrain")) == "CANCELLED"
    subprocess.run(["bash", "-c", lab_line.replace("--nodes=2", "--nodes=1")], cwd=ROOT, check=True)
    until(lambda: "Slurm gave 1 nodes, the run wants 2" in said("count", "pretrain"), 30)


def test_a_head_node_whose_name_does_not_resolve(own, tmp_path):
    """slurm/run.sh inside a job whose node has just been given a name that nobody knows."""
    directory = folder("nameless", "data")
    directory.mkdir(parents=True)
    (directory / "stage.env").write_text("MODEL=debug\n")
    script = "#!/bin/bash\nscontrol update NodeName=$SLURMD_NODENAME NodeAddr=nowhere.invalid\nexec slurm/run.sh "
    (tmp_path / "job").write_text(script + f"'{directory}'\n")
    try:
        words = ["sbatch", "--wait", f"--chdir={ROOT}", f"--output={tmp_path}/out", "--nodelist=node3", str(tmp_path / "job")]
        assert subprocess.run(words, env=os.environ, timeout=60).returncode == 64
        assert "node3: its address nowhere.invalid does not resolve on node3" in (tmp_path / "out").read_text()
    finally:
        own.ask("scontrol", "update", "NodeName=node3", f"NodeAddr={own.address['node3']}")


# --- a cluster with other habits ---


def test_nodes_on_one_address_and_a_queue_that_forgets(own, whole, tmp_path, monkeypatch):
    """All nodes on one address; squeue and scontrol forget a finished job in seconds: the run directory is enough."""
    other = Lab(tmp_path / "forgetful", nodes=2, one_address=True, min_job_age=2)
    other.up()
    monkeypatch.setenv("SLURM_CONF", str(other.conf))
    try:
        settings = given(whole, "forgotten", "pretrain")
        make("pretrain", **{**settings, "ARGS": settings["ARGS"].replace("--training.steps 40", "--training.steps 8")})
        until(lambda: layout.record(folder("forgotten", "pretrain")))
        number = job("forgotten", "pretrain")
        until(lambda: not other.state(number), 120)
        assert "done" in status("forgotten", "pretrain")
        make("data", RUN="forgotten-2", CLUSTER="slurm")
        number = job("forgotten-2", "data")
        until(lambda: attempts.running(folder("forgotten-2", "data")))
        other.ask("scancel", number)
        until(lambda: not other.state(number), 120)
        assert re.match("data (stopped|lost)", status("forgotten-2", "data"))
        assert slurm.look("forgotten-2")["data"].active is False
    finally:
        other.down()
