"""What is done beside the volume of a Kubernetes, by pods, the desk and the client, without a
cluster: submissions, the copy of a run, what is brought."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import volume
from scripts.clusters import kubernetes_bring
from scripts.clusters.kubectl import Kubectl
from scripts.clusters.kubernetes import Kubernetes
from scripts.run import attempts
from scripts.run.errors import InputError
from scripts.run.layout import Run
from scripts.run.submission import as_key, from_key
from tests.support.runs import ROOT, read_json


def mounted(folder, **files):
    """Write a submission as a ConfigMap is mounted."""
    flat = folder / "submission"
    flat.mkdir(exist_ok=True)
    (flat / "..data").mkdir(exist_ok=True)
    for name, text in {"args.json": "[]\n", "tasks..a.yaml": "a", **files}.items():
        (flat / name).write_text(text)
    return flat


def test_a_submission_is_received_once(tmp_path, capsys):
    stage = tmp_path / "runs/x/pretrain"
    first = mounted(tmp_path, **{"stage.env": "MODEL=debug\n"})
    assert volume.main(["receive", str(first), str(stage), "k8s:1"]) == 0
    assert (stage / "tasks/a.yaml").read_text() == "a"
    assert volume.main(["receive", str(first), str(stage), "k8s:1"]) == 0, (
        "a replaced pod receives it again"
    )
    (stage / "checkpoints").mkdir()
    other = mounted(tmp_path, **{"stage.env": "MODEL=other\n"})
    assert volume.main(["receive", str(other), str(stage), "k8s:1"]) == 64
    assert "MODEL was debug, now other" in capsys.readouterr().err
    assert "debug" in (stage / "stage.env").read_text()


def test_a_new_job_takes_over_from_one_that_is_gone(tmp_path):
    """Its name was free, so its pods are gone; another scheduler's attempt is left alone."""
    stage = tmp_path / "runs/x/pretrain"
    flat = mounted(tmp_path, **{"stage.env": "MODEL=debug\n"})
    for job, ended in (("k8s:old", True), ("lab:7", False)):
        shutil.rmtree(stage, ignore_errors=True)
        attempts.begin(stage, job, "pod")
        record = {**read_json(stage / "attempts/1.json"), "host": "another"}
        (stage / "attempts/1.json").write_text(json.dumps(record))
        volume.main(["receive", str(flat), str(stage), "k8s:new"])
        assert ("ended" in read_json(stage / "attempts/1.json")) is ended


def test_small_files_are_read_and_large_ones_are_not(tmp_path, capsys):
    stage = tmp_path / "x/pretrain"
    for name, text in {
        "stage.json": "{}",
        "logs/attempt-1.log": "a" * (volume.SMALL + 10) + "end",
        "model/config.json": "{}",
        "api-key": "secret",
        "derived.jsonl": "a" * (volume.SMALL + 1),
        "sets/data.json": '{"rows": {}}',
    }.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text(text)
    assert volume.main(["read", str(tmp_path / "x")]) == 0
    told = json.loads(capsys.readouterr().out)["pretrain"]
    assert sorted(told) == ["logs/attempt-1.log", "model/", "sets/", "sets/data.json", "stage.json"]
    assert told["logs/attempt-1.log"].endswith("end")
    assert len(told["logs/attempt-1.log"]) == volume.SMALL


def test_what_runs_is_not_removed(tmp_path, capsys):
    stage = tmp_path / "x/data"
    attempts.begin(stage)
    assert volume.main(["remove", str(tmp_path / "x")]) == 64
    assert "runs; first make stop RUN=x" in capsys.readouterr().err
    attempts.end(stage, read_json(stage / "attempts/1.json"), 0, "")
    assert volume.main(["remove", str(tmp_path / "x")]) == 0
    assert not (tmp_path / "x").exists()


def test_a_key_of_a_map_is_a_name_again():
    for name in ("stage.env", "tasks/relay_text.yaml"):
        assert from_key(as_key(name)) == name
        assert "/" not in as_key(name)


# --- the copy of a run here


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """A cluster whose desk reads `told`, and a run here."""
    cluster = Kubernetes({"CLUSTER": "k8s", "PATH": os.environ["PATH"]})
    monkeypatch.setattr(cluster.copy, "concerns", lambda run: True)
    monkeypatch.setattr(Kubectl, "volume", lambda self, *words: json.dumps(cluster.told))
    return cluster, Run(tmp_path / "runs", "x")


def test_the_copy_here_follows_the_volume(seen):
    cluster, run = seen
    cluster.told = {}
    cluster.fetch(run)
    assert not run.directory.exists(), "of a run that is nowhere nothing is made"
    cluster.told = {"data": {"stage.json": "{}", "sets/": "", "attempts/1.json": "{}"}}
    cluster.fetch(run)
    assert (run.stage("data") / "stage.json").read_text() == "{}"
    (run.stage("data") / "job.json").write_text("{}")
    cluster.told = {"data": {"stage.env": ""}}
    cluster.fetch(run)
    left = sorted(path.name for path in run.stage("data").iterdir())
    assert left == ["job.json", "stage.env"], "what was removed there is removed here"


def test_the_newest_log_stays_the_newest(seen, tmp_path):
    """By its time there, not by its name: attempt-10 is younger than attempt-9."""
    cluster, run = seen
    there = tmp_path / "volume/x/data/logs"
    there.mkdir(parents=True)
    for number in (9, 10):
        (there / f"attempt-{number}.log").write_text(f"{number}\n")
        os.utime(there / f"attempt-{number}.log", (number, number))
    cluster.told = volume.read(tmp_path / "volume/x")
    cluster.fetch(run)
    ages = {path.name: path.stat().st_mtime for path in (run.stage("data") / "logs").iterdir()}
    assert ages["attempt-10.log"] > ages["attempt-9.log"]


def test_what_was_trained_here_is_not_replaced_by_a_copy(seen):
    cluster, run = seen
    attempts.begin(run.stage("data"))
    cluster.told = {}
    with pytest.raises(InputError, match="ran on another cluster"):
        cluster.fetch(run)
    assert attempts.history(run.stage("data"))


def test_the_volume_names_no_file_outside_the_run(seen):
    cluster, run = seen
    cluster.told = {"data": {"../../../evil": "x"}}
    with pytest.raises(InputError, match="the volume names"):
        cluster.fetch(run)
    assert not (run.root.parent / "evil").exists()


# --- what is brought


class Desk:
    """Runs the verbs of scripts/volume.py here, as a kubectl would in the desk."""

    def __init__(self, cut_after=99):
        self.calls, self.cut_after = [], cut_after

    def volume(self, *words, given=b""):
        self.calls.append(words[0])
        if len(self.calls) > self.cut_after:
            raise InputError("the line was cut")
        run = [sys.executable, "-m", "scripts.volume", *words]
        done = subprocess.run(run, input=given, capture_output=True, cwd=ROOT)
        if done.returncode:
            raise InputError(done.stderr.decode())
        return done.stdout.decode()


@pytest.fixture
def small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes_bring, "VOLUME", str(tmp_path / "volume"))
    monkeypatch.setattr(kubernetes_bring, "CHUNK", 100)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_brought_arrives_whole_and_goes_on(kind, tmp_path, small_chunks):
    source = tmp_path / "my chats.jsonl"
    if kind == "file":
        source.write_bytes(os.urandom(950))
    else:
        (source / "deep").mkdir(parents=True)
        for name, size in (("a", 250), ("deep/b", 120), ("empty", 0)):
            (source / name).write_bytes(os.urandom(size))
    run = Run(tmp_path / "runs", "x")
    cut = kubernetes_bring.Bringer(Desk(cut_after=3))
    fact = cut.place(source, run)
    with pytest.raises(InputError, match="cut"):
        cut.bring({"DATA": fact})
    assert not Path(fact).exists(), "half of it must not have its name"
    desk = Desk()
    again = kubernetes_bring.Bringer(desk)
    assert again.place(source, run) == fact
    again.bring({"DATA": fact})
    names = [p.relative_to(source) for p in source.rglob("*") if p.is_file()] or [Path()]
    assert all((fact / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert desk.calls.count("append") < 10, "what was there is not sent again"
    desk.calls.clear()
    again.bring({"DATA": fact, "MODEL": "debug"})
    assert desk.calls == ["have"], "once for all runs"


def test_what_comes_damaged_is_refused(tmp_path):
    there = tmp_path / "x"
    with pytest.raises(InputError, match="came damaged"):
        volume.append(there, "", 0, "0" * 64, b"abc")
    with pytest.raises(InputError, match="comes too early"):
        volume.append(there, "", 5, hashlib.sha256(b"abc").hexdigest(), b"abc")
    with pytest.raises(InputError, match="leads out"):
        volume.append(there, "../../evil", 0, hashlib.sha256(b"abc").hexdigest(), b"abc")
    volume.append(there, "", 0, hashlib.sha256(b"abc").hexdigest(), b"abc")
    with pytest.raises(InputError, match="is not what was sent"):
        volume.keep(there, "0" * 64)
    assert volume.have(there) == {}, "it begins anew"


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes_bring, "MOST", 10)
    (tmp_path / "a").write_text("more than ten")
    with pytest.raises(InputError, match="Copy it to the volume yourself"):
        kubernetes_bring.Bringer(Desk()).place(tmp_path / "a", Run(tmp_path, "x"))
