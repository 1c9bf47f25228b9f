"""The user's own data through the line: a text alone, and chats on a model of their own."""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.kills import unbroken
from tests.support.launching import make
from tests.support.runs import stage_dir
from tests.support.sets import chats, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("folder")]


def test_a_users_own_text_goes_through_the_line(tmp_path):
    """Half a megabyte of English: the descriptions of the packages installed here. It has no
    conversations and no pairs, so two stages have nothing to do, and say so."""
    files = sorted(Path(sys.prefix).glob("lib/python3*/site-packages/*/METADATA"))
    prose = [file.read_text(errors="replace").split("\n\n", 1)[-1] for file in files]
    book = tmp_path / "my book [v1].txt"
    book.write_text("\n\n".join(prose)[:500_000])
    steps = {"PRETRAIN_ARGS": "--training.steps 60", "FORCE": "1"}
    out = make("pipeline", RUN="book", DATA=str(book), PORT="8019", **steps).stdout
    make("undeploy", RUN="book")
    assert "finetune: left out; DATA has texts, finetune needs conversations" in out
    assert "align: left out" in out
    assert "serving" in out, f"the model is not served:\n{out}"
    scores = json.loads((stage_dir("book", "evaluate") / "verdict.json").read_text())["scores"]
    assert "relay_text/document_bits_per_byte" in scores
    assert "relay_answers/loss" not in scores


def test_chats_on_a_model_of_ones_own_pass_the_gate(tmp_path, monkeypatch):
    """No pretrain, the model's own tokenizer, and a verdict against the model it began with."""
    source = write_rows(tmp_path / "chats.jsonl", chats(2000))
    given = {"FROM": str(unbroken("pretrain") / "model"), "DATA": str(source), "PORT": "8020"}
    learn = "max_steps_per_epoch=40 gradient_accumulation_steps=1 batch_size=4 optimizer.lr=2.5e-3"
    # Short: a socket's path must be. What upstream puts there by itself is not ours.
    temporary = Path(tempfile.mkdtemp())
    monkeypatch.setenv("TMPDIR", str(temporary))
    out = make("pipeline", RUN="chats", **given, FINETUNE_ARGS=learn).stdout
    make("undeploy", RUN="chats")
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")]
    shutil.rmtree(temporary)
    assert left == [], f"the service left {left} behind"
    assert "pretrain: left out; DATA has conversations, pretrain needs texts" in out
    assert "align needs pairs of answers; ALIGN_RECIPE=grpo takes what DATA has" in out
    assert re.search(r"answered \S", out), f"the served model gave no answer:\n{out}"
    verdict = json.loads((stage_dir("chats", "evaluate") / "verdict.json").read_text())
    assert [row["metric"] for row in verdict["floors"]] == ["relay_answers/loss"]
    assert verdict["passed"]
    assert (
        verdict["scores"]["relay_answers/loss"]
        < verdict["before"]["parent"]["scores"]["relay_answers/loss"]
    )
    assert verdict["errors"]["relay_answers/loss"] > 0
