"""scripts/conductor.py against an API server that is a dictionary: order, ends, and being killed
anywhere. On a real one: tests/test_kubernetes.py."""

import contextlib
import json
import re
import threading
import time

import pytest

from scripts import conductor
from scripts.run.errors import InputError

STAGE = """\
apiVersion: v1
data: {a: b}
kind: ConfigMap
metadata:
  name: x-NAME-7k2
---
apiVersion: batch/v1
kind: Job
metadata:
  name: x-NAME
"""


class Server:
    """Keeps objects by kind and name; `die_after` so many requests the caller is killed."""

    def __init__(self):
        self.objects, self.requests, self.die_after = {}, 0, 10**9
        self.at_once = True  # what is created has ended a moment later

    def wait(self, stage, after):
        meta = {"name": f"x-{stage}-waits", "annotations": {"torch-relay/after": after}}
        meta["labels"] = {"torch-relay/stage": stage, "torch-relay/waits": "true"}
        content = {"metadata": meta, "data": {"stage.yaml": STAGE.replace("NAME", stage)}}
        self.objects["ConfigMap", f"x-{stage}-waits"] = content

    def job(self, stage, ended=""):
        said = [{"type": ended, "status": "True"}] if ended else []
        made = {"metadata": {"uid": "u", "name": f"x-{stage}"}, "status": {"conditions": said}}
        self.objects["Job", f"x-{stage}"] = made

    def call(self, method, kind, name="", query="", body="", content=""):
        self.requests += 1
        if self.requests > self.die_after:
            raise KeyboardInterrupt
        if method == "POST":
            name = re.search(r"^  name: (\S+)", body, re.M)[1]
            if (kind, name) in self.objects:
                return None
            self.objects[kind, name] = {"metadata": {"uid": "u", "name": name}}
            if kind == "Job":
                self.job(name[2:], "Complete" if self.at_once else "")
        if method == "DELETE":
            there = self.objects.get((kind, name), {"metadata": {}})
            wanted = json.loads(body or "{}").get("preconditions", {}).items()
            if not wanted <= there["metadata"].items():
                return None  # 409
            return self.objects.pop((kind, name), None)
        if method == "PATCH":
            self.objects[kind, name]["metadata"].update(json.loads(body)["metadata"])
        return self.objects.get((kind, name))

    def items(self, kind, labels):
        found = [made for (of, _), made in self.objects.items() if of == kind]
        return [m for m in found if kind != "ConfigMap" or "labels" in m["metadata"]]

    def names(self, kind):
        return sorted(name for of, name in self.objects if of == kind)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(conductor, "POLL_SECONDS", 0)
    monkeypatch.setattr(conductor, "LINGER_SECONDS", 0.05)
    return Server()


def done(run, stage):
    (run / stage).mkdir(parents=True, exist_ok=True)
    (run / stage / "stage.json").write_text('{"status": "done"}')


def test_a_stage_is_created_when_the_one_before_is_done(server, tmp_path):
    run = tmp_path / "x"
    server.wait("finetune", "pretrain")
    server.wait("align", "finetune")
    server.job("pretrain")
    one = conductor.Conductor(run, server)
    one._look()
    assert server.names("Job") == ["x-pretrain"], "it is not done"
    done(run, "pretrain")
    one._look()
    assert server.names("Job") == ["x-finetune", "x-pretrain"]
    assert server.names("ConfigMap") == ["x-align-waits", "x-finetune-7k2"], "it waits no more"
    owner = server.objects["ConfigMap", "x-finetune-7k2"]["metadata"]["ownerReferences"]
    assert owner[0]["name"] == "x-finetune", "the submission goes with its job"
    one._look()
    assert "x-align" not in server.names("Job")
    done(run, "finetune")
    server.job("pretrain", "Complete")
    one.conduct()
    assert server.names("Job") == ["x-align", "x-finetune", "x-pretrain"]


@pytest.mark.parametrize("requests", range(1, 8))
def test_killed_anywhere_and_made_again_it_goes_on(server, tmp_path, requests):
    run = tmp_path / "x"
    server.wait("finetune", "pretrain")
    done(run, "pretrain")
    server.die_after = requests
    with contextlib.suppress(KeyboardInterrupt):
        conductor.Conductor(run, server).conduct()
    server.die_after = 10**9
    conductor.Conductor(run, server).conduct()
    assert server.names("Job") == ["x-finetune"]
    assert server.names("ConfigMap") == ["x-finetune-7k2"]
    assert "ownerReferences" in server.objects["ConfigMap", "x-finetune-7k2"]["metadata"]


@pytest.mark.parametrize(("ended", "words"), [("Failed", "has failed"), (None, "was stopped")])
def test_what_fails_or_is_stopped_ends_the_chain(
    server, tmp_path, capsys, monkeypatch, ended, words
):
    server.wait("finetune", "pretrain")
    server.wait("align", "finetune")
    if ended:
        server.job("pretrain", ended)
    monkeypatch.setattr(conductor, "Api", lambda: server)
    assert conductor.main([str(tmp_path / "x")]) == 64
    assert words in capsys.readouterr().err
    assert server.names("ConfigMap") == [], "a later conductor must not start what waited"


@pytest.mark.parametrize("waits", [True, False])
def test_an_image_that_is_not_there_ends_the_job(server, tmp_path, monkeypatch, waits):
    """A single stage's as that of a chain."""
    if waits:
        server.wait("finetune", "pretrain")
    server.job("pretrain")
    waits = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "x:1: not found"}}}
    server.objects["Pod", "p"] = {
        "metadata": {"name": "p"},
        "status": {"containerStatuses": [waits]},
    }
    one = conductor.Conductor(tmp_path / "x", server)
    one._look()
    assert "x-pretrain" in server.names("Job"), "it may come yet"
    monkeypatch.setattr(conductor, "PULL_SECONDS", 0)
    with pytest.raises(InputError, match="its image is not there: x:1: not found"):
        one._look()
    assert "x-pretrain" not in server.names("Job"), "it would hold its quota for ever"


def test_it_stays_while_a_job_runs(server, tmp_path, monkeypatch):
    server.job("pretrain")
    left = threading.Timer(0.4, server.job, ("pretrain", "Complete"))
    left.start()
    began = time.monotonic()
    conductor.Conductor(tmp_path / "x", server).conduct()
    assert time.monotonic() - began > 0.4


def test_it_does_not_leave_while_a_client_adds_a_stage(server, tmp_path):
    """A client makes what waits, then changes the conductor's Job; here between the last look and
    the end."""
    own = {"metadata": {"name": "x-conductor", "resourceVersion": "1"}, "status": {}}
    server.objects["Job", "x-conductor"] = own
    one = conductor.Conductor(tmp_path / "x", server)
    read = json.loads(json.dumps(own))
    own["metadata"]["resourceVersion"] = "2"
    assert not one._left(read)
    assert "x-conductor" in server.names("Job")
    assert one._left(own)
    assert "x-conductor" not in server.names("Job"), "a client makes another"


def test_yaml_is_split_by_kind():
    found = conductor.documents(STAGE)
    assert [kind for kind, _ in found] == ["ConfigMap", "Job"]
