"""The stages under a real slurmctld: the chain, requeue, lost nodes, time limits, stops, and every
mistake the issue names.

make test-slurm brings up a Slurm of its own (tests/support/slurm_lab.py); RELAY_SLURM=site uses the
cluster that it finds, and leaves out what breaks nodes.
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

from scripts.clusters.slurm import Slurm
from scripts.run.layout import Run
from tests.support import processes
from tests.support.kills import ARGS, STEPS, assert_same, whole_steps
from tests.support.lanes import lacking
from tests.support.launching import assert_refused, launch, make
from tests.support.runs import (
    ROOT,
    STAGES,
    TRAINED,
    digest_tree,
    finished,
    history,
    read_json,
    running,
    runs_root,
    stage_dir,
)
from tests.support.sets import chats, write_rows
from tests.support.slurm_lab import Lab, missing, until

pytestmark = pytest.mark.slow  # on one worker (lanes.LANES): one cluster, which tests break
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
            for file in runs_root().glob(
                "*/*/job.json"
            ):  # a failed test's, which wait or serve for days
                subprocess.run(["scancel", read_json(file)["job"]], capture_output=True)
            return
        if missing():
            lacking(
                f"a Slurm of its own needs {', '.join(missing())}: "
                "apt-get install slurmctld slurmd slurm-client munge"
            )
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
    return (
        lab
        if isinstance(lab, Lab)
        else lacking("breaking nodes needs a cluster of its own; without RELAY_SLURM=site")
    )


def job(run, stage):
    return read_json(stage_dir(run, stage) / "job.json")["job"]


def squeue(*words):
    return subprocess.run(["squeue", *words], capture_output=True, text=True).stdout


def assert_ends(lab, run, stage, *states, seconds=300):
    """Wait until a stage's job has left the queue; check how."""
    state = ended(lab, run, stage, seconds)
    assert state in states, (
        f"job of {run}/{stage} ended as {state}, not {states}:\n{said(run, stage)[-3000:]}"
    )


def assert_status(run, stage, *patterns):
    """Check a stage's line of make status against regular expressions."""
    line = status(run, stage)
    for pattern in patterns:
        assert re.search(pattern, line), f"the table does not say {pattern!r} of {stage}: {line}"


def assert_restarts(lab, run, stage, wanted):
    times = restarts(lab, job(run, stage))
    assert times == wanted, f"job of {run}/{stage} was started again {times} times, not {wanted}"


def start_again(number):
    """Start a requeued job, which need not wait its two minutes; but three seconds: a start in the
    second in which slurmd revoked the one before is revoked with it ("Killing non-startable batch
    JobId: Job credential revoked").
    """
    time.sleep(3)
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], check=True)


def ended(lab, run, stage, seconds=300):
    """Wait until a stage's job has left the queue. Returns its state."""
    number = job(run, stage)

    def gone():
        shown = subprocess.run(
            ["scontrol", "-o", "show", "job", number], capture_output=True, text=True
        ).stdout
        if "JobState=PENDING" in shown and "Reason=BeginTime" in shown:
            start_again(number)
        return "JobState=" in shown and not re.search(
            r"JobState=(PENDING|RUNNING|COMPLETING|CONFIGURING)", shown
        )

    until(gone, seconds)
    return lab.state(number)


def restarts(lab, number):
    return int(re.search(r"Restarts=(\d+)", lab.ask("scontrol", "-o", "show", "job", number))[1])


def saved(run, stage, beyond=0):
    """Wait until a stage has a whole checkpoint beyond a step; returns its step."""
    return until(lambda: (n := max(whole_steps(stage_dir(run, stage)), default=0)) > beyond and n)


def said(run, stage):
    """What a stage's job printed."""
    return "".join(p.read_text() for p in sorted(stage_dir(run, stage).glob("logs/slurm-*.log")))


def signal_ranks(number, what):
    """Send a signal to every rank of a job of this cluster; another one here may have a job of this
    number."""
    for pid in processes.all_pids():
        told = processes.environment(pid)
        ours = told.get("SLURM_CONF") == os.environ.get("SLURM_CONF")
        if ours and told.get("SLURM_JOB_ID") == number and "RANK" in told:
            with contextlib.suppress(OSError):
                os.kill(pid, what)


def status(run, stage):
    line = next(
        line for line in make("status", RUN=run).stdout.splitlines() if line.startswith(f"{stage} ")
    )
    return re.sub(r" +", " ", line)


def ask_at_length(run):
    """Begin to ask a served model for 400 tokens; the result is how many came."""
    server = read_json(stage_dir(run, "deploy") / "server.json")
    key = (stage_dir(run, "deploy") / "api-key").read_text().strip()
    body = json.dumps(
        {"model": run, "prompt": "def main", "max_tokens": 400, "ignore_eos": True}
    ).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(
        f"http://{server['host']}:{server['port']}/v1/completions", body, headers
    )

    def ask():
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["usage"]["completion_tokens"]

    begun = ThreadPoolExecutor().submit(ask)
    time.sleep(0.5)
    return begun


@pytest.fixture(scope="module")
def whole(lab):
    """An unbroken run of data and the trained stages, two nodes each, given stage by stage while
    the queue works."""
    make("data", RUN="whole", CLUSTER="slurm")
    for stage in TRAINED:
        make(stage, RUN="whole", **PAIR, ARGS=ARGS[stage])
    for stage in STAGES[:4]:
        assert_ends(lab, "whole", stage, "COMPLETED")
    return runs_root() / "whole"


def given(whole, run, stage):
    """What every job of a broken run is submitted with: the unbroken one's input."""
    source = {"finetune": "pretrain", "align": "finetune"}.get(stage)
    more = {"FROM": str(whole / source / "model")} if source else {}
    asked = {"RUN": run, "MODEL": "debug", "DATA": str(whole / "data"), "ARGS": ARGS[stage]}
    return {**asked, **PAIR, **more}


# --- the chain ---


def test_stages_given_one_by_one_are_chained(whole):
    """Each was submitted while the one before it was in the queue, and ran on two nodes."""
    for stage in TRAINED:
        submitted, record = (whole / stage / "submitted.txt").read_text(), finished(whole / stage)
        assert "afterok" in submitted or record["started"], f"{stage} was not chained: {submitted}"
        assert record["facts"]["NODES"] == "2", (
            f"{stage} did not run on two nodes: {record['facts']}"
        )
        logs = {path.name for path in (whole / stage / "logs").glob("*.log")}
        assert logs >= {"attempt-1.log", "attempt-1.node1.log"}, (
            f"{stage}: a node left no log: {logs}"
        )


def test_the_pipeline_the_gate_and_a_service(lab):
    """One command queues all; the scheduler's own gate refuses a model that learned nothing;
    forced, it serves, survives a requeue, and ends."""
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
    assert 0 in said_by, f"one of two at once must submit: {said_by}"
    assert set(said_by) <= {0, 64}, f"the other one must be refused: {said_by}"
    assert "a moment ago" in said_by.get(64, "a moment ago"), (
        f"why it is refused is not said: {said_by}"
    )
    queued = sorted(name for name in squeue("-h", "-o", "%j").split() if name.startswith("line-"))
    assert queued == sorted(f"line-{stage}" for stage in STAGES), (
        f"each stage must be queued once: {queued}"
    )
    jobs = [job("line", stage) for stage in STAGES]
    for before, stage in zip(STAGES[1:], STAGES[2:]):
        assert_status("line", stage, f"waits for {before}")
    assert_refused(launch("pretrain", **options), "submitted already")
    make("pipeline", **options)
    assert [job("line", stage) for stage in STAGES] == jobs, "a second pipeline doubles no job"
    shown = lab.ask("scontrol", "-o", "show", "job", job("line", "data"))
    assert "gres/gpu=" not in shown, f"data needs no GPU: {shown}"
    assert_ends(lab, "line", "deploy", "FAILED", seconds=600)
    for stage in STAGES[:5]:
        assert_ends(lab, "line", stage, "COMPLETED")
    assert_status("line", "deploy", "refused", r"is needed \(")
    assert_restarts(lab, "line", "deploy", 0)

    make("pipeline", **options, FORCE="1")
    until(lambda: "serving" in status("line", "deploy"))
    before = read_json(stage_dir("line", "deploy") / "server.json")
    make("chat", RUN="line", PROMPT="What is io?")
    number = job("line", "deploy")
    if isinstance(lab, Lab):
        lab.ask(
            "scontrol", "update", f"NodeName={before['node']}", "State=drain", "Reason=test"
        )  # so it goes elsewhere
        lab.ask("scontrol", "requeue", number)
        until(lambda: lab.state(number) == "PENDING")
        assert_status("line", "deploy", "queued")
        start_again(number)
        until(lambda: "serving" in status("line", "deploy"))
        host = read_json(stage_dir("line", "deploy") / "server.json")["host"]
        assert host != before["host"], f"on {host} again, which is drained"
        make("chat", RUN="line", PROMPT="What is io?")
        lab.ask("scontrol", "update", f"NodeName={before['node']}", "State=resume")
    answer = ask_at_length("line")
    make("undeploy", RUN="line")
    assert answer.result(60) == 400, "it must finish the answers that it has begun"
    assert_status("line", "deploy", "^deploy stopped")
    assert_ends(lab, "line", "deploy", "FAILED")  # exit 75, not requeued


def test_the_network_between_two_nodes_is_checked(lab, monkeypatch):
    """The table, and the refusal where the site asks for EFA: there is no GPU, so gloo's sockets
    were used."""
    make("nccl-check", RUN="fabric", CLUSTER="slurm", NODES="2")
    assert_ends(lab, "fabric", "nccl-check", "COMPLETED")
    output = said("fabric", "nccl-check")
    for line in (r"2 ranks on 2 nodes: \S+, \S+", r"all-reduce +16 MB +\d+\.\d+ GB/s"):
        assert re.search(line, output), f"no line {line!r}:\n{output}"
    summary = finished(stage_dir("fabric", "nccl-check"))["summary"]
    assert [(p["first"], p["second"]) for p in summary["pairs"]] == [(0, 1)]
    assert_status("fabric", "nccl-check", "^nccl-check done", "gloo over TCP sockets")

    monkeypatch.setenv("NCCL_NET", "AWS Libfabric")
    make("nccl-check", RUN="efa", CLUSTER="slurm", NODES="2")
    assert_ends(lab, "efa", "nccl-check", "FAILED")
    assert_status("efa", "nccl-check", "refused", "asks for EFA, but sockets were used")
    assert_restarts(lab, "efa", "nccl-check", 0)
    assert "GB/s" in said("efa", "nccl-check"), "the table is shown all the same"


def test_data_on_two_nodes_has_the_bytes_of_one(lab):
    """Each node reads its own files of the source; the sets, and what is said of them, are equal to
    those that this machine makes alone."""
    source = runs_root().parent / "source"
    for n in range(5):
        write_rows(source / f"{n}.jsonl", chats(300)[n * 60 :][:60])
    make("data", RUN="spread", DATA=str(source), CLUSTER="slurm", NODES="2")
    until(lambda: finished(stage_dir("spread", "data")))
    make("data", RUN="alone", DATA=str(source))
    spread, alone = stage_dir("spread", "data"), stage_dir("alone", "data")
    assert digest_tree(spread / "sets") == digest_tree(alone / "sets")
    assert finished(spread)["summary"] == finished(alone)["summary"]
    logs = {path.name for path in (spread / "logs").glob("attempt*.log")}
    assert logs == {"attempt-1.log", "attempt-1.node1.log"}


def test_what_a_dry_run_prints_works_pasted(lab):
    """The chain is whole, make knows its jobs, and a job of it that is requeued when all is done
    ends at once, on both nodes."""
    short = {
        **PAIR,
        "PRETRAIN_ARGS": "--training.steps 20",
        "FINETUNE_ARGS": "max_steps_per_epoch=10",
        "FORCE": "1",
        "PORT": PORT,
    }
    shown = launch("pipeline", RUN="pasted", **short, DRY_RUN="1").stdout
    assert not (runs_root() / "pasted").exists(), "a dry run must write nothing"
    subprocess.run(
        ["bash", "-e"], input="\n\n".join(shown.split("\n\n")[:4]), text=True, cwd=ROOT, check=True
    )
    again = {"RUN": "pasted", **PAIR, "ARGS": short["FINETUNE_ARGS"]}
    assert_refused(launch("finetune", **again), "finetune: submitted already")
    rest = launch("pipeline", RUN="pasted", **short, DRY_RUN="1").stdout
    assert f"# finetune: job {job('pasted', 'finetune')} waits for pretrain" in rest, (
        "it shows what make would add"
    )
    dependency = f"--dependency=afterok:{job('pasted', 'finetune')} "
    assert dependency in rest, f"what is added must wait for what is queued:\n{rest}"
    until(lambda: "finetune done" in status("pasted", "finetune"), 180)
    made = launch("finetune", **again)
    assert "done already" in made.stdout, f"make would have written something else:\n{made.stderr}"
    number = job("pasted", "finetune")
    until(lambda: lab.state(number) == "COMPLETED")
    lab.ask("scontrol", "requeue", number)
    start_again(number)
    assert_ends(lab, "pasted", "finetune", "COMPLETED", seconds=30)


# --- lost nodes, time limits, faults ---


@pytest.mark.parametrize("way", ["state=down", "kill -9 of slurmd and slurmstepd"])
def test_a_lost_node(own, whole, way):
    """The job goes on elsewhere, from the newest whole checkpoint, to the unbroken run's losses and
    weights."""
    run = "down" if "=" in way else "dead"
    make("pretrain", **given(whole, run, "pretrain"))
    step = saved(run, "pretrain", 8)
    number = job(run, "pretrain")
    node = own.ask(
        "scontrol", "show", "hostnames", own.ask("squeue", "-h", "-j", number, "-o", "%N")
    ).split()[-1]  # not node 0's
    if "=" in way:
        own.ask("scontrol", "update", f"NodeName={node}", "State=down", "Reason=test")
    else:
        own.kill_node(node)
    until(lambda: own.state(number) == "PENDING", 90)
    at = read_json(stage_dir(run, "pretrain") / "progress.json")["step"]
    assert_status(run, "pretrain", "queued")
    assert_ends(own, run, "pretrain", "COMPLETED")
    resumed = int(
        re.findall(r"goes on from its checkpoint of step (\d+)", said(run, "pretrain"))[-1]
    )
    assert resumed >= step, f"it went on from step {resumed}, though step {step} had been saved"
    lost = at - resumed
    assert lost <= 2 * 4, (
        f"{lost} steps were lost: more than one interval, and the save that was under way"
    )
    assert_same(stage_dir("whole", "pretrain"), stage_dir(run, "pretrain"))
    if "=" not in way:
        own.start_node(node)
    else:
        own.ask("scontrol", "update", f"NodeName={node}", "State=resume")
    until(lambda: node in own.ask("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"))


def test_a_node_that_hangs_is_noticed_by_its_silence(own, whole, monkeypatch):
    """Before Slurm gives it up; then the job goes on elsewhere."""
    monkeypatch.setenv("RELAY_SILENCE", "4")
    make("pretrain", **given(whole, "silent", "pretrain"))
    saved("silent", "pretrain", 4)
    number = job("silent", "pretrain")
    nodes = own.ask("squeue", "-h", "-j", number, "-o", "%N")
    node = own.ask("scontrol", "show", "hostnames", nodes).split()[-1]  # not node 0's
    own.kill_node(node, signal.SIGSTOP)
    directory = stage_dir("silent", "pretrain")
    first = until(lambda: history(directory)[0].get("error"), 60)
    assert re.match(r"node 1 \(\S+\): silent for [4-9] s", first), first
    until(lambda: own.state(number) == "PENDING", 90)
    own.kill_node(node)
    own.start_node(node)
    assert_ends(own, "silent", "pretrain", "COMPLETED")
    assert_same(stage_dir("whole", "pretrain"), directory)
    until(lambda: node in own.ask("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"))


@pytest.mark.parametrize("stage", TRAINED)
def test_the_time_limit(own, whole, stage):
    """Slurm's own signal, before its own time limit: saved, requeued, completed, as if nothing had
    been."""
    run = f"limit-{stage}"
    make(stage, **given(whole, run, stage))
    saved(run, stage)
    number = job(run, stage)
    signal_ranks(
        number, signal.SIGSTOP
    )  # Slurm looks at its time limits twice a minute, this training is over sooner
    own.ask("scontrol", "update", f"JobId={number}", "TimeLimit=2")  # less than the lead is left
    until(lambda: list((stage_dir(run, stage) / "attempts").glob("*.stop")), 60)
    signal_ranks(number, signal.SIGCONT)
    until(lambda: restarts(own, number) == 1, 60)
    own.ask("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    assert_ends(own, run, stage, "COMPLETED")
    tried = history(stage_dir(run, stage))
    assert [a["exit"] for a in tried] == [75, 0], (
        f"one attempt that saved, one that finished: {tried}"
    )
    assert {a["job"] for a in tried} == {f"lab:{number}"}, f"both must be of job {number}: {tried}"
    assert_same(whole / stage, stage_dir(run, stage))


def test_wrong_input_is_never_tried_again(lab, whole):
    options = {**given(whole, "wrong", "pretrain"), "ARGS": "--training.stepz 5"}
    make("pretrain", **options)
    assert_ends(lab, "wrong", "pretrain", "FAILED")
    assert_restarts(lab, "wrong", "pretrain", 0)
    assert_status("wrong", "pretrain", "^pretrain refused", "torchtitan refuses ARGS")


def test_a_crash_loop_ends(own):
    """Five faults without a new highest step, then it stays down, with the fault on the table."""
    directory = stage_dir("loop", "data")
    directory.mkdir(parents=True)
    (directory / "sets.partial").write_text("in the way")
    make("data", RUN="loop", CLUSTER="slurm")
    assert_ends(own, "loop", "data", "FAILED")
    assert_restarts(own, "loop", "data", 4)
    output = said("loop", "data")
    for words in ("5 faults in 5 attempts without a new highest step", "NotADirectoryError"):
        assert words in output, f"the job does not say {words!r}:\n{output[-3000:]}"
    assert_status("loop", "data", "data failed")


# --- stops ---


def test_a_stop_saves_and_takes_the_rest_from_the_queue(lab, whole):
    """Then the same pipeline goes on from there."""
    options = given(whole, "stopped", "pretrain")
    make("pretrain", **options)
    make("finetune", **{**options, "ARGS": ARGS["finetune"]})
    saved("stopped", "pretrain")
    out = make("stop", RUN="stopped").stdout
    first = ["finetune: taken from the queue", "pretrain: stopped"]
    assert out.splitlines()[:2] == first, f"what was stopped is not said:\n{out}"
    assert "submits the others again" in out, f"how to go on is not said:\n{out}"
    assert_status("stopped", "pretrain", "^pretrain stopped")
    assert_status("stopped", "finetune", "cancelled")
    assert lab.state(job("stopped", "pretrain")) == "FAILED", (
        "exit 75 must end the job of a stopped stage"
    )
    assert_restarts(lab, "stopped", "pretrain", 0)
    make("pretrain", **options)
    assert_ends(lab, "stopped", "pretrain", "COMPLETED")
    assert_same(whole / "pretrain", stage_dir("stopped", "pretrain"))


def test_cancelled_from_outside(lab, whole):
    """scancel ends every process at once: said, not requeued; the same command goes on."""
    options = given(whole, "cancelled", "pretrain")
    make("pretrain", **options)
    make("finetune", **{**options, "ARGS": ARGS["finetune"]})
    saved("cancelled", "pretrain")
    lab.ask("scancel", job("cancelled", "pretrain"))
    assert_ends(lab, "cancelled", "pretrain", "CANCELLED")
    assert_ends(lab, "cancelled", "finetune", "CANCELLED")  # its dependency can never be met
    assert_status("cancelled", "finetune", "never started|cancelled")
    assert_status("cancelled", "pretrain", "^pretrain (stopped|lost)")
    make("pretrain", **options)
    assert_ends(lab, "cancelled", "pretrain", "COMPLETED")
    assert_same(whole / "pretrain", stage_dir("cancelled", "pretrain"))


# --- mistakes ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"SBATCH_PARTITION": "nope"}, ["invalid partition", "SBATCH_PARTITION=nope", "sinfo -s"]),
        ({"NODES": "9"}, ["9 nodes", "sinfo"]),
        ({"GPUS": "3"}, ["3 GPUs each", "sinfo"]),
        ({"SBATCH_TIMELIMIT": "3"}, ["--time=3", "300 s"]),
        ({"SBATCH_QOS": "none-such", "SBATCH_PARTITION": "nope"}, ["invalid partition"]),
        (
            {"RELAY_RUNTIME": "pyxis", "RELAY_IMAGE": "/no.sqsh"},
            ["RELAY_IMAGE=/no.sqsh", "no such file"],
        ),
    ],
)
def test_a_mistake_leaves_nothing_in_the_queue(own, whole, options, words):
    began, given = time.monotonic(), {"RUN": "test-x", "DATA": str(whole / "data"), **options}
    assert_refused(launch("pretrain", CLUSTER="slurm", **given), *words)
    took = time.monotonic() - began
    assert took < 30, f"the refusal took {took:.0f} s"
    assert "test-" not in squeue("-h", "-o", "%j"), "what was refused must not be in the queue"
    assert not stage_dir("test-x", "pretrain").exists(), "a refusal must leave nothing"


def test_slurmctld_does_not_answer(own, whole, tmp_path, monkeypatch):
    conf = (
        re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", own.conf.read_text()) + "MessageTimeout=3\n"
    )
    (tmp_path / "slurm.conf").write_text(conf)
    (tmp_path / "gres.conf").write_text((own.folder / "gres.conf").read_text())
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    result = launch("data", CLUSTER="slurm", RUN="test-unreachable")
    assert_refused(result, "Slurm does not answer", "scontrol ping")
    assert "align     done" in make("status", RUN="whole").stdout, (
        "what is finished needs no scheduler"
    )
    (whole / "evaluate").mkdir()
    (whole / "evaluate/job.json").write_text(
        '{"cluster": "slurm", "name": "lab", "job": "7", "submitted": 0}'
    )
    result = launch("status", RUN="whole")
    assert "align     done" in result.stdout, "what is recorded is shown all the same"
    assert_refused(result, "Slurm does not answer")
    shutil.rmtree(whole / "evaluate")


def test_two_sorts_of_runs_that_the_nodes_do_not_see(own, monkeypatch):
    """Not on the job's first node: its output cannot be opened. Not on the second alone: the job
    says which."""
    if not own.own_namespaces:
        lacking("nodes with folders of their own need root")
    monkeypatch.setenv("RUNS", str(own.folder / "node-local"))
    make("data", RUN="hidden", CLUSTER="slurm")
    until(lambda: own.state(job("hidden", "data")) == "FAILED")
    assert_status(
        "hidden", "data", "could not write", re.escape(f"{own.folder}/node-local"), "RUNS="
    )


def test_the_second_node_does_not_see_the_run(own, whole):
    if not own.own_namespaces:
        lacking("nodes with folders of their own need root")
    options = given(whole, "half", "pretrain")
    pid = (own.folder / "slurmd.node3.pid").read_text().strip()
    own.ask(
        "scontrol", "update", "NodeName=node2", "State=drain", "Reason=test"
    )  # so that it gets node1 and node3
    hidden = str(runs_root() / "half")
    Path(hidden).mkdir()
    subprocess.run(["nsenter", "-t", pid, "-m", "mount", "-t", "tmpfs", "none", hidden], check=True)
    try:
        make("pretrain", **options)
        assert_ends(own, "half", "pretrain", "FAILED", seconds=30)
        assert_status("half", "pretrain", "node3", "cannot be read")
        assert_restarts(own, "half", "pretrain", 0)
    finally:
        subprocess.run(["nsenter", "-t", pid, "-m", "umount", hidden], check=True)
        own.ask("scontrol", "update", "NodeName=node2", "State=resume")


def test_a_job_with_another_number_of_nodes_is_refused(own, whole):
    make("pretrain", **given(whole, "count", "pretrain"), SBATCH_TIMELIMIT="60")
    lab_line = (stage_dir("count", "pretrain") / "submitted.txt").read_text()
    make("cancel", RUN="count")
    state = own.state(job("count", "pretrain"))
    assert state == "CANCELLED", f"a cancelled job is {state}"
    subprocess.run(["bash", "-c", lab_line.replace("--nodes=2", "--nodes=1")], cwd=ROOT, check=True)
    until(lambda: "Slurm gave 1 nodes, the run wants 2" in said("count", "pretrain"), 30)


def test_a_head_node_whose_name_does_not_resolve(own, tmp_path):
    """slurm/run.sh inside a job whose node has just been given a name that nobody knows."""
    directory = stage_dir("nameless", "data")
    directory.mkdir(parents=True)
    (directory / "stage.env").write_text("MODEL=debug\n")
    script = "#!/bin/bash\nscontrol update NodeName=$SLURMD_NODENAME NodeAddr=nowhere.invalid\n"
    script += "exec slurm/run.sh "
    (tmp_path / "job").write_text(script + f"'{directory}'\n")
    try:
        words = [
            "sbatch",
            "--wait",
            f"--chdir={ROOT}",
            f"--output={tmp_path}/out",
            "--nodelist=node3",
            str(tmp_path / "job"),
        ]
        code = subprocess.run(words, env=os.environ, timeout=60).returncode
        output = (tmp_path / "out").read_text()
        assert code == 64, f"the job ended with {code}, not 64:\n{output}"
        told = "node3: its address nowhere.invalid does not resolve on node3"
        assert told in output, f"which name does not resolve is not said:\n{output}"
    finally:
        own.ask("scontrol", "update", "NodeName=node3", f"NodeAddr={own.address['node3']}")


# --- a cluster with other habits ---


def test_nodes_on_one_address_and_a_queue_that_forgets(own, whole, tmp_path_factory, monkeypatch):
    """All nodes on one address; squeue and scontrol forget a finished job in seconds: the run
    directory is enough."""
    other = Lab(tmp_path_factory.mktemp("other"), nodes=2, one_address=True, min_job_age=2)
    other.up()
    monkeypatch.setenv("SLURM_CONF", str(other.conf))
    try:
        settings = given(whole, "forgotten", "pretrain")
        make(
            "pretrain",
            **{
                **settings,
                "ARGS": settings["ARGS"].replace(f"--training.steps {STEPS}", "--training.steps 8"),
            },
        )
        until(lambda: finished(stage_dir("forgotten", "pretrain")), 300)
        number = job("forgotten", "pretrain")
        until(lambda: not other.state(number), 120)
        assert_status("forgotten", "pretrain", "done")
        make("data", RUN="forgotten-2", CLUSTER="slurm")
        number = job("forgotten-2", "data")
        until(lambda: running(stage_dir("forgotten-2", "data")))
        other.ask("scancel", number)
        until(lambda: not other.state(number), 120)
        assert_status("forgotten-2", "data", "^data (stopped|lost)")
        assert not Slurm(os.environ).jobs(Run(runs_root(), "forgotten-2"))["data"].active, (
            "a forgotten job is not active"
        )
    finally:
        other.down()
