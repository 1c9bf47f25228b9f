"""The gate and the lineage look at the bytes that are there now, whatever a record says of them."""

import json
import os
import shutil

import pytest

from scripts.run import gate
from scripts.run.digests import Digests
from scripts.run.layout import Run
from tests.support.launching import assert_refused, launch
from tests.support.models import write_model

FLOORS = {"task/acc": {"min": 0.4}, "text/bits": {"max": 3.0}}
SCORES = {"task/acc": 0.5, "text/bits": 2.5}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def run(runs):
    """Run x: a model that align has made, and a verdict of it that passes."""
    run = Run(runs, "x")
    run.stage("align").mkdir(parents=True)
    model = write_model(run.stage("align") / "model")
    made = Digests(run).describe(model)
    write(run.stage("align") / "stage.json", {"ended": 0, "outputs": {"model": made}})
    evaluation = run.stage("evaluate")
    verdict = {"model": made, **gate.judge(SCORES, FLOORS)}
    write(evaluation / "verdict.json", verdict)
    write(evaluation / "floors.json", FLOORS)
    record = {"status": "done", "ended": 0, "inputs": {"model": made}, "outputs": {}}
    write(evaluation / "stage.json", record)
    assert problems(run) == []
    return run


def problems(run, model=None):
    """Ask the gate as a new process would, with what is remembered of earlier hashing."""
    return gate.problems(run.stage("evaluate"), model or run.stage("align") / "model", Digests(run))


def flip_a_bit_and_put_the_time_back(model):
    file = model / "model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_the_folder(model):
    other = write_model(model.with_name("other"))
    edit(other / "config.json", vocab_size=5)
    shutil.rmtree(model)
    other.rename(model)


EDITS = {
    "one bit of a weight": flip_a_bit_and_put_the_time_back,
    "the whole folder": replace_the_folder,
    "the tokenizer": lambda m: edit(m / "tokenizer.json", added_tokens=[]),
    "the template": lambda m: edit(m / "tokenizer_config.json", chat_template="{{ 1 }}"),
    "a template beside it": lambda m: (m / "chat_template.jinja").write_text("{{ 2 }}"),
    "the config": lambda m: edit(m / "config.json", vocab_size=8),
    "a generation config": lambda m: (m / "generation_config.json").write_text("{}"),
    "a pickle beside it": lambda m: (m / "pytorch_model.bin").write_bytes(b"x"),
    "code beside it": lambda m: (m / "modeling.py").write_text("print()"),
    "a file less": lambda m: (m / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_model_that_was_edited_is_not_served(run, what):
    model = run.stage("align") / "model"
    EDITS[what](model)
    assert "not for" in problems(run)[0], f"{what} was changed after the verdict"
    said = assert_refused(launch("deploy", RUN="x", FROM=str(model), FORCE=""))
    assert "runs/x/align/model" in said or "no such" in said or "no tokenizer" in said
    walked = launch("lineage", RUN="x")
    assert walked.returncode == 1, f"lineage calls {what} fine:\n{walked.stdout}"
    assert "has changed since" in walked.stdout


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("verdict.json", {"passed": False}, None),  # what it says of itself is not looked at
        ("verdict.json", {"floors": []}, "task/acc was not measured, at least 0.4"),
        (
            "verdict.json",
            {"floors": [{"metric": "task/acc", "value": -5, "min": 0.4, "passed": True}]},
            "task/acc is -5.0000, at least 0.4",
        ),
        (
            "verdict.json",
            {"floors": [{"metric": "task/acc", "value": True, "min": 0.4, "passed": True}]},
            "task/acc was not measured",
        ),
        (
            "verdict.json",
            {"floors": [{"metric": "task/acc", "value": float("nan"), "min": 0.4}]},
            "task/acc is nan",
        ),
        ("floors.json", {"task/acc": {"min": 0.9}}, "task/acc is 0.5000, at least 0.9"),
        ("floors.json", {"new/acc": {"min": 0.1}}, "new/acc was not measured"),
        ("floors.json", {"task/acc": {"minimum": 0.1}}, "neither min nor max"),
    ],
)
def test_a_verdict_is_judged_again(run, file, changes, words):
    edit(run.stage("evaluate") / file, **changes)
    found = problems(run)
    assert bool(found) == bool(words), found
    assert not words or words in " ".join(found), found


def test_a_floor_that_was_taken_away_still_holds(run):
    evaluation = run.stage("evaluate")
    edit(
        evaluation / "verdict.json",
        floors=gate.judge({**SCORES, "task/acc": 0.1}, FLOORS)["floors"],
    )
    write(evaluation / "floors.json", {"text/bits": {"max": 9.0}})
    assert "task/acc is 0.1000" in problems(run)[0]
    write(evaluation / "floors.json", {})
    assert "task/acc is 0.1000" in problems(run)[0]


def test_a_true_copy_may_be_served(run, tmp_path):
    copy = shutil.copytree(run.stage("align") / "model", tmp_path / "copy")
    assert problems(run, copy) == []
    edit(copy / "config.json", vocab_size=8)
    write(tmp_path / "stage.json", {"outputs": {"copy": {"digest": "forged"}}})
    assert "not for" in problems(run, copy)[0]


def test_what_is_remembered_is_hashed_once(run, monkeypatch):
    monkeypatch.setattr("scripts.run.digests.sha256", lambda path: pytest.fail(f"hashed {path}"))
    assert problems(run) == []


def test_a_dry_run_remembers_nothing(run):
    (run.directory / "digests.json").unlink()
    model = run.stage("align") / "model"
    launch("deploy", RUN="x", FROM=str(model), DRY_RUN="1")
    assert not (run.directory / "digests.json").exists()


def results(folder, **scores):
    """Write what lm-eval would: scores of relay_answers and their errors."""
    found = {"relay_answers": {}}
    for name, (value, error) in scores.items():
        found["relay_answers"].update({f"{name},none": value, f"{name}_stderr,none": error})
    folder.mkdir(parents=True)
    (folder / "results_1.json").write_text(json.dumps({"results": found}))


@pytest.mark.parametrize(("loss", "passed"), [(2.9, True), (3.25, True), (3.4, False)])
def test_a_model_must_not_be_worse_than_the_one_that_its_run_began_with(tmp_path, loss, passed):
    results(tmp_path / "results/x", loss=(loss, 0.1))
    results(tmp_path / "before/parent/x", loss=(3.0, 0.1))
    results(tmp_path / "before/finetune/x", loss=(9.0, 0.1))  # worse than that is no matter
    verdict = gate.conclude(tmp_path / "results", tmp_path / "before", {}, [])
    assert verdict["passed"] is passed
    assert verdict["floors"][0]["max"] == pytest.approx(3.0 + 2 * 0.1 * 2**0.5)
    assert gate.changes(verdict, "align") == [
        f"relay_answers/loss: parent 3.000 ± 0.100, finetune 9.000 ± 0.100, "
        f"align {loss:.3f} ± 0.100"
    ]


def test_without_floors_nothing_passes():
    assert gate.judge(SCORES, {})["passed"] is False
    assert gate.judge(SCORES, FLOORS)["passed"] is True
    assert gate.judge({"task/acc": 0.5}, FLOORS)["passed"] is False
