"""Whether a scheduler starts a job again: the word of scripts/run/retry.py, and slurm/run.sh."""

import os
import subprocess
from pathlib import Path

import pytest

from scripts.run import attempts, files
from scripts.run.layout import ROOT
from scripts.run.retry import AGAIN, DOWN, MAX_ATTEMPTS, MAX_FAULTS, leave_word, word

JOB = "cluster:7"
KILLED = object()  # no exit: the script could write none


def tried(*ends, job=JOB, before=0):
    """Attempts that ended so, none of which reached a step beyond `before`."""
    made = [{"job": job, "highest_before": before} for _ in ends]
    for attempt, end in zip(made, ends):
        if end is not KILLED:
            attempt["exit"] = end
    return made


@pytest.mark.parametrize("end", [1, KILLED, None])
def test_five_faults_without_a_new_step_end_it(end):
    assert word(tried(*[end] * (MAX_FAULTS - 1)), 0, JOB) == AGAIN
    assert word(tried(*[end] * MAX_FAULTS), 0, JOB) == DOWN, "a killed parent counts as a fault"


def test_a_new_highest_step_begins_the_count_anew():
    past = tried(1, 1, 1, 1, 1)
    assert word(past, 10, JOB) == AGAIN, "the newest has reached step 10"
    assert word([*past, *tried(1, 1, 1, before=10)], 10, JOB) == AGAIN
    assert word([*past, *tried(1, 1, 1, 1, before=10)], 10, JOB) == DOWN, "the one at 10 counts"
    assert word([*past, *tried(1, 1, 1, 1, before=10)], 11, JOB) == AGAIN


def test_a_saved_attempt_is_no_fault():
    assert word(tried(*[75] * 3), 0, JOB) == AGAIN, "three of them once counted as three faults"
    assert word(tried(*[75] * 50), 0, JOB) == AGAIN
    assert word(tried(1, 75, 1, 75, 1, 75, 1), 0, JOB) == AGAIN
    assert word(tried(1, 75, 1, 75, 1, 75, 1, 75, 1), 0, JOB) == DOWN, "nor does it forgive one"


def test_two_hundred_attempts_for_nothing_end_it():
    assert word(tried(*[75] * (MAX_ATTEMPTS - 1)), 0, JOB) == AGAIN
    assert word(tried(*[75] * MAX_ATTEMPTS), 0, JOB) == DOWN
    assert word(tried(*[75] * MAX_ATTEMPTS), 1, JOB) == AGAIN


def test_another_job_has_a_count_of_its_own():
    assert word([*tried(1, 1, 1, 1, job="cluster:6"), *tried(1)], 0, JOB) == AGAIN
    assert word([*tried(1, 1, 1, 1, 1, job=""), *tried(1)], 0, JOB) == AGAIN


def test_a_service_that_served_begins_the_count_anew():
    served = [{"job": JOB, "served": True, "exit": 1}]
    assert word([*tried(1, 1, 1, 1), *served], 0, JOB) == AGAIN
    assert word([*tried(1, 1, 1, 1), *served, *tried(1, 1, 1, 1)], 0, JOB) == DOWN


def test_the_file_says_the_word_and_why(tmp_path):
    for _ in range(MAX_FAULTS):
        attempt = attempts.begin(tmp_path, JOB)
        leave_word(tmp_path, JOB)
        attempts.end(tmp_path, attempt, 1, "a fault")
    why = "5 faults in 5 attempts without a new highest step"
    assert (tmp_path / "retry").read_text() == f"down {why}\n"
    files.write_json(tmp_path / "progress.json", {"step": 3, "total": 9})
    leave_word(tmp_path, JOB)
    assert (tmp_path / "retry").read_text().startswith("again ")


# --- slurm/run.sh with stubs of Slurm's commands


@pytest.fixture
def job(tmp_path):
    """Run slurm/run.sh once: the stage script is `script`; returns the exit code, what it said,
    and whether it requeued the job."""
    directory, tools = tmp_path / "my runs/x/data", tmp_path / "tools"
    directory.mkdir(parents=True)
    tools.mkdir()
    (directory / "stage.env").write_text("MODEL=debug\n")

    def run(script: str, state: str = "JobState=RUNNING Requeue=1") -> tuple[int, str, bool]:
        stubs = {
            "srun": f'case "$1" in sh) exec "$@" ;; esac\ncd "{directory}"\n{script}',
            "scontrol": f"""case "$*" in
                requeue*) touch "{tmp_path}/requeued" ;;
                *hostnames*) echo here ;;
                *"show node"*) echo "NodeName=here NodeAddr=127.0.0.1 Port=1" ;;
                *"show job"*) echo "JobId=7 {state}" ;;
                esac""",
        }
        for name, text in stubs.items():
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)
        env = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "here",
            "SLURMD_NODENAME": "here",
        }
        words = ["bash", "slurm/run.sh", str(directory)]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        return done.returncode, done.stderr, (tmp_path / "requeued").exists()

    return run


def test_again_requeues(job):
    assert job("echo again 1 fault > retry; exit 1") == (1, "", True)


def test_down_says_why(job):
    code, said, requeued = job("echo 'down 5 faults in 9 attempts' > retry; exit 3")
    assert (code, requeued) == (3, False)
    assert said == (
        "data: exit 3, 5 faults in 9 attempts: not requeued; mended, the same command goes on\n"
    )


def test_a_word_of_an_earlier_start_does_not_count(job, tmp_path):
    (tmp_path / "my runs/x/data/retry").write_text("again 1 fault\n")
    code, said, requeued = job("exit 127")
    assert (code, requeued) == (127, False)
    assert "no attempt began" in said


@pytest.mark.parametrize("code", [0, 64])
def test_done_and_wrong_input_end_at_once(job, code):
    assert job(f"echo again > retry; exit {code}") == (code, "", False)


@pytest.mark.parametrize("state", ["JobState=RUNNING Requeue=0", "JobState=CANCELLED Requeue=1"])
def test_a_stopped_job_stays_down(job, state):
    assert job("echo again > retry; exit 75", state) == (75, "", False)


def test_a_stage_that_the_node_does_not_see(job, tmp_path):
    Path(tmp_path / "my runs/x/data/stage.env").unlink()
    code, said, _ = job("exit 1")
    assert code == 64
    assert "error: here: " in said
    assert "cannot be read" in said
    assert "RUNS=" in said
