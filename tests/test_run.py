"""The run directory: names, facts, attempts as locks, digests."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from scripts.run import attempts, digests, files, layout
from scripts.run.errors import InputError
from tests.support.runs import ROOT, digest_tree


@pytest.mark.parametrize("name", ["my-run", "a", "0", "a" * 40])
def test_good_names(name):
    assert layout.check_run_name(name) == []


@pytest.mark.parametrize(
    "name", ["my run", "a/b", "a.b", "Run", "a" * 80, "", "-a", "a-", "ä", "a\nb"]
)
def test_bad_names(name):
    assert "RUN=" in layout.check_run_name(name)[0]


def test_facts_survive_any_text_and_hold_no_shell(tmp_path):
    facts = {"FROM": "/a path/with $HOME `id` 'quotes'", "DATA": "ü%20\n;", "EMPTY": ""}
    text = files.format_env(facts)
    assert set(text) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./:,=@%+-\n"
    )
    (tmp_path / "stage.env").write_text(text)
    assert files.read_env(tmp_path / "stage.env") == facts


RACER = """
import pathlib, sys
from scripts.run import attempts
from scripts.run.errors import InputError
sys.stdin.readline()
try:
    attempts.begin(pathlib.Path(sys.argv[1]))
    print("won", flush=True)
    sys.stdin.readline()
except InputError as problem:
    print("refused:", problem, flush=True)
"""


def test_of_two_launches_one_wins(tmp_path):
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    racers = [subprocess.Popen(command, **pipes) for _ in range(8)]
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.communicate("\n")
    outcomes = sorted(s.split(":")[0] for s in said)
    assert outcomes == ["refused"] * 7 + ["won"], f"exactly one must win: {said}"
    unclear = [s for s in said if s != "won" and not ("running already" in s and "make stop" in s)]
    assert unclear == [], f"these refusals do not say why and what to do: {unclear}"


def test_a_dead_attempt_is_followed_by_the_next(tmp_path):
    racer = [sys.executable, "-c", RACER, str(tmp_path)]
    subprocess.run(racer, input="\n", text=True, check=True, cwd=ROOT)
    assert attempts.status(tmp_path) == "lost"
    attempt = attempts.begin(tmp_path)
    assert attempt["attempt"] == 2
    assert attempts.status(tmp_path) == "running"
    with pytest.raises(InputError, match="running already"):
        attempts.begin(tmp_path)
    attempts.end(tmp_path, attempt, 75, "stopped")
    assert attempts.status(tmp_path) == "stopped"


def test_a_clock_that_was_set_back_changes_nothing(tmp_path, monkeypatch):
    for number, offset in ((1, 0), (2, -86400)):
        monkeypatch.setattr(attempts.time, "time", lambda offset=offset: 1e9 + offset)
        attempt = attempts.begin(tmp_path)
        assert attempt["attempt"] == number
        attempts.end(tmp_path, attempt, 75 if number == 2 else 1)
        assert 0 <= attempt["seconds"] < 10
    assert attempts.status(tmp_path) == "stopped", "the newest is the one with the highest number"


def test_a_reused_pid_is_not_the_old_process(tmp_path):
    attempt = attempts.begin(tmp_path)
    attempt["process_start"] = "1"  # as if this pid had belonged to another process
    files.write_atomic(tmp_path / "attempts" / "1.json", json.dumps(attempt))
    assert attempts.running(tmp_path) is None, "another process has that pid now"


def test_another_host_counts_as_running_until_it_ends(tmp_path):
    attempt = {**attempts.begin(tmp_path), "host": "elsewhere"}
    files.write_atomic(tmp_path / "attempts" / "1.json", json.dumps(attempt))
    with pytest.raises(InputError, match="elsewhere"):
        attempts.begin(tmp_path)


def test_digest_is_what_the_documented_shell_line_prints(tmp_path):
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "b").write_text("1")
    (tmp_path / "sub dir" / "a").write_text("2")
    (tmp_path / "sub dir" / "link").symlink_to("../b")  # as Hugging Face's cache has them
    line = "cd \"$1\" && find -L . -type f | sed 's,^./,,' | LC_ALL=C sort"
    line += " | xargs -d'\\n' sha256sum | sha256sum"
    shell = subprocess.run(
        ["sh", "-c", line, "-", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert digest_tree(tmp_path) == "sha256:" + shell.stdout.split()[0]


def test_a_write_leaves_the_whole_old_file_or_the_whole_new_one(tmp_path, monkeypatch):
    file = tmp_path / "f"
    files.write_atomic(file, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(file, "new")
    assert file.read_text() == "old"


def test_sha256_reads_in_blocks(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * (1 << 21))
    assert digests.sha256(tmp_path / "f") == hashlib.sha256(b"x" * (1 << 21)).hexdigest()


# --- how facts name paths ---


def test_a_path_among_the_runs_survives_a_move(tmp_path):
    model = tmp_path / "one" / "x" / "align" / "model"
    fact = layout.as_fact(model, tmp_path / "one")
    assert fact == "runs/x/align/model"
    assert layout.from_fact(fact, tmp_path / "two") == tmp_path / "two" / "x" / "align" / "model"


def test_data_below_the_repositorys_runs_with_runs_elsewhere(tmp_path):
    """It was written as "runs/…" and then looked for below RUNS."""
    data = layout.ROOT / "runs" / "x" / "data" / "sets"
    fact = layout.as_fact(data, tmp_path)
    assert layout.from_fact(fact, tmp_path) == data
    inside = layout.ROOT / "configs"
    assert layout.as_fact(inside, tmp_path) == "configs"
    assert layout.from_fact("configs", tmp_path) == inside


def test_a_single_file_has_the_digest_of_its_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b.txt").write_text("2")
    run = layout.Run(tmp_path, "x")
    one, other = (digests.Digests(run).of_tree(tmp_path / name) for name in ("a.txt", "b.txt"))
    assert one != other
    assert one == "sha256:" + hashlib.sha256(b"1").hexdigest()
