"""datatrove's own filters and MinHash in a data stage, and a data stage on several nodes."""

import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest

from scripts.corpus import pool
from scripts.corpus import prepare as preparing
from scripts.run.errors import InputError
from tests.support.lanes import lacking
from tests.support.launching import make
from tests.support.runs import ROOT, digest_tree, read_json, stage_dir
from tests.support.sets import preparation, prepare, write_rows

FILTERS = [{"GopherQualityFilter": {"min_doc_words": 40}}, {"MinHash": {"n_grams": 3}}]
WORDS = ["the", "be", "to", "of", "and", "that", "have", "with", "river", "mountain", "village"]
WORDS += ["harbour", "engine", "market", "season", "winter", "teacher", "garden", "letter", "music"]
WORDS += ["number", "table", "window", "bridge", "island", "captain", "doctor", "forest", "water"]


@pytest.fixture
def datatrove():
    """Leave a test out where the extra is not installed."""
    if not importlib.util.find_spec("datatrove"):
        lacking("datatrove is an extra: make filters")


def texts() -> list[dict]:
    """Return 200 texts, 20 of them again with one word changed, 10 again as they are, 30 that are
    no prose; in any order."""
    chance = random.Random(1)
    good = [" ".join(chance.choice(WORDS) for _ in range(150)) for _ in range(200)]
    near = [text + " teapot" for text in good[:20]]
    bad = [f"click here {n} " * 3 for n in range(30)]
    rows = [{"text": text} for text in (*good, *near, *good[50:60], *bad)]
    chance.shuffle(rows)
    return rows


def test_what_filters_and_minhash_drop_is_told_apart(tmp_path, datatrove):
    source = write_rows(tmp_path / "web.jsonl", texts())
    manifest, out = prepare(tmp_path / "stage", source, filters=FILTERS, max_dropped=0.5)
    assert manifest["dropped"] == {
        "GopherQualityFilter": 30,
        "a near-duplicate of another text (MinHash)": 20,
        "a duplicate of another row": 10,
    }
    assert manifest["rows"]["text"] + manifest["rows"]["heldout_text"] == 200
    listed = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert len(listed) == 60
    assert {row["reason"] for row in listed} >= {"GopherQualityFilter: gopher_short_doc"}
    assert all("web.jsonl: line " in row["where"] for row in listed)


def test_filters_leave_conversations_and_what_is_given_to_be_held_out(tmp_path, datatrove):
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = texts()
    source = write_rows(tmp_path / "web.jsonl", [*rows, {"messages": chat}])
    given = write_rows(tmp_path / "given.jsonl", [{"text": f"no prose {n}"} for n in range(5)])
    settings = {"filters": FILTERS, "max_dropped": 0.5, "validation": str(given)}
    manifest, _ = prepare(tmp_path / "stage", source, **settings)
    assert manifest["rows"] == {
        "text": 200,
        "sft": 1,
        "preference": 0,
        "heldout_text": 5,
        "heldout_sft": 0,
        "heldout_choice": 0,
        "heldout_preference": 0,
    }


def test_what_filters_drop_counts_for_the_limit(tmp_path, datatrove):
    source = write_rows(tmp_path / "web.jsonl", texts())
    with pytest.raises(InputError, match=r"dropped 30 of 260 rows: GopherQualityFilter"):
        prepare(tmp_path / "stage", source, filters=FILTERS)


@pytest.mark.parametrize(
    ("filters", "why"),
    [
        ([{"GopherFilter": {}}], "GopherFilter: no such filter; did you mean Gopher"),
        ([{"MinHash": {}}, {"C4QualityFilter": {}}], "MinHash: must be the last"),
        ([{"MinHash": {"buckets": 3}}], "buckets: no such setting; did you mean num_buckets"),
        ([{"MinHash": {"language": "tlh2"}}], "'tlh2' doesn't have a tokenizer"),
        ([{"GopherQualityFilter": {"words": 3}}], "unexpected keyword argument 'words'"),
    ],
)
def test_a_bad_filter_is_named_before_anything_is_read(tmp_path, datatrove, filters, why):
    with pytest.raises(InputError, match=why):
        preparation(tmp_path, tmp_path / "not there.jsonl", filters=filters)


def test_without_the_extra_its_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # where installed packages are looked for
    with pytest.raises(InputError, match="datatrove is not installed here: make filters"):
        preparation(tmp_path, tmp_path / "not there.jsonl", filters=FILTERS)


@pytest.mark.parametrize("name", ["sift", "match"])
def test_a_kill_anywhere_changes_nothing(tmp_path, monkeypatch, datatrove, name):
    monkeypatch.setattr(preparing, "UNIT", (20000, 20000))
    source = write_rows(tmp_path / "web.jsonl", texts())
    settings = {"filters": FILTERS, "max_dropped": 0.5}
    whole, out = prepare(tmp_path / "whole", source, **settings)
    phase, function = pool.PASSES[name]

    def dies(work, number):
        if number == 3:
            raise KeyboardInterrupt
        function(work, number)

    monkeypatch.setitem(pool.PASSES, name, (phase, dies))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "killed", source, **settings)
    monkeypatch.setitem(pool.PASSES, name, (phase, function))
    again, other = prepare(tmp_path / "killed", source, **settings)
    assert again == whole
    assert digest_tree(other) == digest_tree(out)


def test_each_node_does_its_units_alone(tmp_path):
    for n in range(5):
        write_rows(tmp_path / f"web/{n}.jsonl", texts()[n * 40 :][:40])
    made = preparation(tmp_path / "stage", tmp_path / "web")
    made.prepared.begin()
    work, shown = made.prepared.work, []
    pool.run_pass("look", work, lambda *said: shown.append(said), node=1, nodes=2)
    assert [work.done("look", n) for n in range(5)] == [False, True, False, True, False]
    assert shown[-1][1].startswith("on this of 2 nodes, ")
    pool.run_pass("look", work, lambda *said: None, node=0, nodes=2)
    assert all(work.done("look", n) for n in range(5))


@pytest.mark.slow
def test_two_nodes_make_the_bytes_of_one(tmp_path, monkeypatch, datatrove):
    """As slurm/run.sh starts them, on this machine; test_slurm.py has it on real nodes."""
    for n in range(5):
        write_rows(tmp_path / f"web/{n}.jsonl", texts()[n * 52 :][:52])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        json.dumps({"sources": [str(tmp_path / "web")], "filters": FILTERS, "max_dropped": 0.5})
    )
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    make("data", RUN="one", DATA=str(recipe))
    make("data", RUN="two", DATA=str(recipe))
    one, two = stage_dir("one", "data"), stage_dir("two", "data")
    digest = digest_tree(two / "sets")
    for name in ("sets", "stage.json", "attempts"):
        subprocess.run(["rm", "-r", two / name], check=True)
    nodes = {
        "PET_NNODES": "2",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "127.0.0.1:29517",
        "PET_RDZV_ID": "1",
    }
    words = [sys.executable, "-m", "scripts.data", str(two)]
    children = [
        subprocess.Popen(words, cwd=ROOT, env={**os.environ, **nodes, "PET_NODE_RANK": str(n)})
        for n in range(2)
    ]
    assert [child.wait(120) for child in children] == [0, 0]
    assert digest_tree(two / "sets") == digest == digest_tree(one / "sets")
    assert read_json(two / "stage.json")["summary"] == read_json(one / "stage.json")["summary"]
