"""make download and make upload against a hub on this machine: bytes, kills, refusals, the card."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time

import pytest
import yaml

from scripts.download import download
from scripts.run import gate
from scripts.run.errors import InputError
from scripts.tools.hub import HubFile, Snapshot
from scripts.tools.hub_download import content_problems
from scripts.upload import upload
from tests.support.hub import Hub
from tests.support.launching import assert_refused, call_make, said
from tests.support.models import CONFIG, TOKENIZER, TOKENIZER_CONFIG, write_model
from tests.support.runs import ROOT, digest_tree, read_json
from tests.support.waiting import until

MIB = 1 << 20
WEIGHTS = random.Random(0).randbytes(25 * MIB)
TEXTS = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": json.dumps(TOKENIZER).encode(),
    "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG).encode(),
    "LICENSE": b"do what you like\n",
}
MODEL = {**TEXTS, "model.safetensors": WEIGHTS}
WHOLE = [None]  # one transfer, without a Range


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, and the environment of a user who knows it, without a token."""
    server = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # the library then speaks to the server alone
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELS", str(tmp_path / "my models"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODEL", "FORCE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


@pytest.fixture
def models(hub, tmp_path):
    """The folder that downloads go to."""
    return tmp_path / "my models"


def start(script, **options):
    """Start a command as make does."""
    words = [sys.executable, "-m", f"scripts.{script}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **options}, **pipes)


def call(script, **options):
    """Run a command as make does; return how it ended."""
    process = start(script, **options)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([script, options], process.returncode, out, err)


def works(script, **options):
    """Run a command as make does, and return what it said; fail the test where it fails."""
    result = call(script, **options)
    assert result.returncode == 0, f"{result.args} failed:\n{said(result)}"
    return result.stdout


def content(directory):
    """Read a directory: {name: bytes}, without the record of a download."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name != "download.json"]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


# --- download


def test_a_download_is_the_model_and_its_record(hub, models):
    other = ("pytorch_model.bin", "model.gguf", "onnx/model.safetensors", "original/params.json")
    rest = ("README.md", "consolidated.safetensors", "training_args.bin", "rng.pth")
    commit = hub.add("org/model", {**MODEL, **dict.fromkeys((*other, *rest), b"x")}, licence="mit")
    listed = works("download", MODEL="org/model", DRY_RUN="1")
    assert "26,214,400  model.safetensors" in listed
    assert not models.exists(), "a dry run touches nothing"
    assert "every file's hash is the hub's" in works("download", MODEL="org/model")
    directory = models / "org--model"
    assert content(directory) == MODEL
    record = read_json(directory / "download.json")
    assert set(record) == {"hub", "revision", "commit", "licence", "files"}
    assert record["hub"] == "org/model"
    assert (record["commit"], record["revision"]) == (commit, "main")
    assert record["licence"] == "mit"
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in MODEL.items()}
    assert {name: file["sha256"] for name, file in record["files"].items()} == hashes
    assert [p.name for p in models.iterdir()] == ["org--model"], "nothing is left beside it"
    seen = len(hub.seen)
    assert "there already" in works("download", MODEL="org/model")
    assert not [s for s in hub.seen[seen:] if "/resolve/" in s[1]], "the second time brings nothing"
    offline = works("download", MODEL="org/model", HF_HUB_OFFLINE="1")
    assert "there already, and the hub was not asked" in offline


def test_a_named_model_comes_by_make(hub, models, monkeypatch):
    about = read_json(ROOT / "configs/models/smollm2_135m/model.json")
    hub.add(about["hub"], MODEL)
    result = call_make("download", MODEL="smollm2_135m")
    assert result.returncode == 0, said(result)
    assert content(models / "smollm2_135m") == MODEL
    licence = read_json(models / "smollm2_135m/download.json")["licence"]
    assert licence == about["licence"], "where the hub says none it is that of model.json"


def test_a_transfer_that_is_cut_goes_on_by_byte_range(hub, models):
    hub.add("org/model", MODEL)
    hub.cut["model.safetensors"] = 15 * MIB
    works("download", MODEL="org/model")
    assert content(models / "org--model") == MODEL
    assert hub.ranges("model.safetensors") == [None, f"bytes={10 * MIB}-"]


def test_a_killed_download_goes_on_by_byte_range(hub, models):
    """The library alone begins a killed process's file anew, and leaves the half one behind."""
    hub.add("org/model", MODEL)
    hub.stall["model.safetensors"] = 15 * MIB
    process = start("download", MODEL="org/model")
    part = models / "org--model.part"
    until(lambda: any(p.stat().st_size >= 10 * MIB for p in part.glob("model*.incomplete")))
    assert_refused(call("download", MODEL="org/model"), "another make download is at it")
    process.kill()
    process.communicate()
    assert not (models / "org--model").exists(), "what is not whole has not its name"
    (part / "model.safetensors.0123456789ab.incomplete").write_bytes(b"of another commit")
    works("download", MODEL="org/model")
    assert content(models / "org--model") == MODEL
    assert hub.ranges("model.safetensors") == [None, f"bytes={10 * MIB}-"]
    assert hub.ranges("config.json") == WHOLE, "a file that was whole is not brought again"
    assert not part.exists()


def test_a_hub_that_goes_away_in_the_middle(hub, models):
    hub.add("org/model", MODEL)
    hub.stall["model.safetensors"] = 15 * MIB
    process = start("download", MODEL="org/model", HF_HUB_DOWNLOAD_TIMEOUT="1")
    part = models / "org--model.part"
    until(lambda: any(p.stat().st_size >= 10 * MIB for p in part.glob("model*.incomplete")))
    hub.close()
    began = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75, error
    assert time.monotonic() - began < 20
    assert "cannot be reached" in error
    assert "then the same command goes on" in error
    assert "Traceback" not in error
    hub.open()
    works("download", MODEL="org/model")
    assert content(models / "org--model") == MODEL
    assert hub.ranges("model.safetensors") == [None, f"bytes={10 * MIB}-"]


def test_a_damaged_file_is_brought_once_more_then_named(hub, models):
    """The library compares sizes alone: a flipped byte comes through without a word."""
    hub.add("org/model", MODEL)
    hub.flip.update({"model.safetensors": 1, "config.json": 1})
    told = works("download", MODEL="org/model")
    assert "model.safetensors: came damaged" in told
    assert "config.json: came damaged" in told
    assert content(models / "org--model") == MODEL
    hub.add("org/other", MODEL)
    hub.flip["model.safetensors"] = 2
    result = call("download", MODEL="org/other")
    assert result.returncode == 1, said(result)
    assert "model.safetensors came damaged twice" in result.stderr
    assert not (models / "org--other").exists()
    works("download", MODEL="org/other")
    assert content(models / "org--other") == MODEL


def test_shards_are_those_that_the_index_names(hub, models):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    shards = {"model.safetensors.index.json": json.dumps(index).encode(), names[0]: b"1"}
    rest = {
        "model.safetensors": b"x",
        "adapter_model.safetensors": b"x",
        "model.safetensors.2": b"",
    }
    hub.add("org/model", {**TEXTS, **shards, names[1]: b"2", **rest})
    works("download", MODEL="org/model")
    assert content(models / "org--model") == {**TEXTS, **shards, names[1]: b"2"}
    hub.add("org/half", {**TEXTS, **shards})
    assert_refused(call("download", MODEL="org/half"), f"names {names[1]}, which is not there")


def test_another_revision_needs_force(hub, models):
    small = {**TEXTS, "model.safetensors": b"one"}
    first = hub.add("org/model", small)
    works("download", MODEL="org/model")
    hub.add("org/model", {**small, "model.safetensors": b"two", "merges.txt": b""})
    directory = models / "org--model"
    assert_refused(call("download", MODEL="org/model"), first[:12], "FORCE=1", "MODELS=")
    assert content(directory) == small
    works("download", MODEL=f"org/model@{first}")
    works("download", MODEL="org/model", FORCE="1")
    assert content(directory)["model.safetensors"] == b"two"
    assert [p.name for p in models.iterdir()] == ["org--model"], "the old one is gone"
    works("download", MODEL=f"org/model@{first}", FORCE="1")
    assert content(directory) == small, "merges.txt is not of this commit"
    (directory / "model.safetensors").unlink()
    result = call("download", MODEL=f"org/model@{first}")
    assert_refused(result, "model.safetensors is missing or was changed", "FORCE=1")


def test_what_make_did_not_download_is_never_replaced(hub, models):
    hub.add("org/model", MODEL)
    mine = models / "org--model"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("{}")
    result = call("download", MODEL="org/model", FORCE="1")
    assert_refused(result, "was not downloaded by make download", "MODELS=")
    assert content(mine) == {"config.json": b"{}"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"MODEL": "org/gated"}, ["gated", "no token was given", "HF_TOKEN=", "/org/gated"]),
        ({"MODEL": "org/gated", "HF_TOKEN": "hf_me"}, ["gated", "no access; ask for it at http"]),
        ({"MODEL": "org/private"}, ["no such repository", "private", "HF_TOKEN=", "hf auth login"]),
        ({"MODEL": "org/private", "HF_TOKEN": "hf_me"}, ["your token may not read"]),
        ({"MODEL": "org/nothing", "HF_TOKEN": "hf_me"}, ["org/nothing: no such repository"]),
        ({"MODEL": "org/nothing", "HF_TOKEN": "mine"}, ["does not know your token"]),
        ({"MODEL": "org/pickles@v9"}, ["no revision v9", "/commits/main"]),
        ({"MODEL": "org/pickles"}, ["only pytorch_model.bin", "can run code"]),
        ({"MODEL": "org/huge"}, ["needs 900000.00 GB more", "GB are free", "MODELS="]),
        ({"MODEL": "org/pickles", "HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set", "FROM="]),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_refused_in_words_within_seconds(hub, models, options, words):
    small = {"config.json": b"{}", "model.safetensors": b"x"}
    for name, about in (("org/gated", {"gated": {"friend"}}), ("org/huge", {})):
        commit = hub.add(name, small, **about)  # gated is told before the size
        hub.repositories[name].commits[commit]["model.safetensors"]["size"] = 9 * 10**14 - 2
    hub.add("org/private", MODEL, private=True)
    hub.add("org/pickles", {**TEXTS, "pytorch_model.bin": b"x"})
    began = time.monotonic()
    assert_refused(call("download", **options), *words)
    assert time.monotonic() - began < 10
    assert not [p for p in models.glob("*") if not p.name.endswith(".part")]
    assert hub.ranges("model.safetensors") == [], "refused before the weights come"


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["config.json", "model.safetensors"], ""),
        (["config.json", "model.safetensors", "pytorch_model.bin"], ""),
        (["model.safetensors"], "no config.json"),
        (["config.json", "pytorch_model.bin"], "only pytorch_model.bin, which can run code"),
        (["config.json", "q4.gguf"], "only q4.gguf, which is llama.cpp's format"),
        (["config.json", "tf_model.h5"], "only tf_model.h5, which is of another framework"),
        (["config.json", "adapter_model.safetensors"], "an adapter, and no model"),
        (["config.json"], "no *.safetensors"),
    ],
)
def test_what_is_no_model_is_refused(names, word):
    files = {name: HubFile(name, 1, "", False) for name in names}
    problems = content_problems(Snapshot("org/name", "main", "0", {}, files))
    assert len(problems) == bool(word)
    assert word in "".join(problems)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("debug", ["is born here", "smollm2_135m"]),
        ("smollm2_135n", ["did you mean smollm2_135m?", "MODEL=org/name"]),
        ("", ["MODEL=", "MODEL=org/name"]),
        ("org/-x", ["no repository's name"]),
    ],
)
def test_a_name_that_is_none_is_refused(model, words, tmp_path):
    with pytest.raises(InputError) as refused:
        download({"MODEL": model, "MODELS": str(tmp_path)})
    assert [word for word in words if word not in str(refused.value)] == []


def test_who_has_access_downloads(hub, models):
    hub.add("me/private", {"config.json": b"{}", "model.safetensors": b"x"}, private=True)
    hub.add("org/gated", {"config.json": b"{}", "model.safetensors": b"x"}, gated={"me"})
    login = models.parent / "home/token"  # what hf auth login writes
    login.parent.mkdir()
    login.write_text("hf_me")
    works("download", MODEL="me/private")
    works("download", MODEL="org/gated")
    assert len(list(models.iterdir())) == 2


# --- upload


@pytest.fixture
def run(hub, models, runs, monkeypatch):
    """A run that finetuned a model of the hub and evaluated it, by its records alone; its folder.
    The user has a token."""
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.setenv("RUN", "mine")
    models.mkdir()
    write_model(models / "org--base")
    (models / "org--base/LICENSE").write_bytes(TEXTS["LICENSE"])
    record = {"hub": "org/base", "revision": "main", "commit": "c" * 40, "licence": "llama3.2"}
    (models / "org--base/download.json").write_text(json.dumps({**record, "files": {}}))
    folder = runs / "mine"
    for stage in ("data/sets", "finetune", "evaluate"):
        (folder / stage).mkdir(parents=True)
    model = write_model(folder / "finetune/model")
    (model / "pickle.bin").write_bytes(b"never")
    common = {"ended": 1795763133.8, "git_commit": "0123456789abcdef", "versions": {"torch": "9"}}
    sets = {"path": "runs/mine/data/sets", "digest": "sha256:" + "d" * 64}
    made = {"path": "runs/mine/finetune/model", "digest": digest_tree(model), "parameters": 1234567}
    data = {"source": "chats.jsonl", "corpus": "", "rows": {"sft": 1200}}
    base = {"path": str(models / "org--base"), "digest": "sha256:" + "b" * 64}
    before = {"scores": {"relay_answers/loss": 3.5}, "errors": {"relay_answers/loss": 0.04}}
    floors = {"relay_answers/loss": {"max": 3.4}, "relay_choice/acc": {"min": 0.3}}
    scores = {"relay_answers/loss": 3.25, "relay_choice/acc": 0.5}
    records = {
        "data": {"facts": {}, "inputs": {}, "outputs": {"sets": sets}, "summary": data},
        "finetune": {
            "facts": {"FROM": base["path"], "DATA": sets["path"]},
            "inputs": {"model": base, "data": sets},
            "outputs": {"model": made},
            "summary": {"step": 77, "loss": 2.5},
        },
        "evaluate": {"facts": {}, "inputs": {"model": made}, "outputs": {}, "summary": {}},
    }
    for stage, record in records.items():
        (folder / stage / "stage.json").write_text(json.dumps({**common, **record}))
    verdict = {"model": made, "before": {"parent": before}, "errors": {"relay_answers/loss": 0.03}}
    verdict.update(gate.judge(scores, floors))
    (folder / "evaluate/verdict.json").write_text(json.dumps(verdict))
    return folder


def test_what_was_uploaded_comes_back_as_it_was(hub, models, run):
    told = works("upload", REPO="me/mine")
    repository = hub.repositories["me/mine"]
    assert f"{hub.address}/me/mine: commit {repository.refs['main']}, private" in told
    assert repository.private
    files = repository.commits[repository.refs["main"]]
    model = {name: data for name, data in content(run / "finetune/model").items()}
    del model["pickle.bin"]
    model["LICENSE"] = TEXTS["LICENSE"]  # the parent's goes with what was made from it
    assert set(files) == {*model, "README.md", ".gitattributes"}
    works("download", MODEL="me/mine")
    assert content(models / "me--mine") == model
    result = call("upload", REPO="me/mine")
    assert_refused(result, "me/mine exists, with 6 files", "FORCE=1", "REPO=")
    assert repository.refs["main"] in told, "a refusal changes nothing"


def test_the_card_tells_lineage_data_scores_and_licence(hub, run):
    works("upload", REPO="me/mine")
    repository = hub.repositories["me/mine"]
    readme = repository.commits[repository.refs["main"]]["README.md"]
    card = (hub.folder / readme["oid"]).read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "llama3.2",
        "base_model": "org/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["torch-relay"],
    }
    for words in (
        "# mine\n",
        f"[org/base](https://huggingface.co/org/base) at commit `{'c' * 40}`",
        "1,234,567 parameters",
        "vllm serve me/mine",
        f"| finetune | 2026-11-27 | `sha256:{'d' * 12}…` | 77 | 2.500 |",
        "`0123456789ab`",
        "torch 9",
        "- finetune: 1,200 conversations from chats.jsonl",
        "| score | parent | this model | bound |",
        "| relay_answers/loss | 3.500 ± 0.040 | 3.250 ± 0.030 | at most 3.4 |",
        "| relay_choice/acc |  | 0.500 | at least 0.3 |",
        "kept every bound",
        "whose licence is `llama3.2`",
    ):
        assert words in text, f"the card does not say {words!r}:\n{card}"
    assert str(run.parent) not in card, "a card that all may read names no path of this machine"
    assert works("upload", REPO="me/mine", DRY_RUN="1").startswith(card), "a dry run prints it"


def test_force_writes_over_a_repository_and_leaves_no_foreign_weights(hub, run):
    hub.add("me/mine", {"model-00001-of-00002.safetensors": b"x", "notes.md": b"kept"})
    repository = hub.repositories["me/mine"]
    assert_refused(call("upload", REPO="me/mine", FORCE="1"), "is public already", "PUBLIC=1")
    works("upload", REPO="me/mine", FORCE="1", PUBLIC="1")
    files = repository.commits[repository.refs["main"]]
    assert {"model.safetensors", "notes.md", "README.md"} <= set(files)
    assert "model-00001-of-00002.safetensors" not in files
    repository.private = True
    works("upload", REPO="me/mine", FORCE="1", STAGE="finetune")
    assert repository.private
    works("upload", REPO="me/mine", FORCE="1", PUBLIC="1")
    assert not repository.private


@pytest.mark.parametrize("fail", [("POST /api/models/me/mine/commit", 500), ("PUT /lfs/", 403)])
def test_an_upload_that_was_cut_off_goes_on(hub, run, fail):
    """Its repository is there by then, with nothing but what the hub itself puts into it."""
    hub.fail = fail
    result = call("upload", REPO="me/mine")
    assert result.returncode == 75, said(result)
    assert "the same command goes on" in result.stderr
    assert "Traceback" not in result.stderr
    hub.fail = ("", 0)
    works("upload", REPO="me/mine")
    assert len(hub.repositories["me/mine"].commits) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"HF_TOKEN": ""}, ["to upload needs a token", "HF_TOKEN=", "hf auth login"]),
        ({"HF_TOKEN": "mine"}, ["does not know your token"]),
        ({"REPO": "org/mine"}, ["refuses with 403", "take a token that may"]),
        ({"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_upload_is_refused_in_words(hub, run, options, words):
    assert_refused(call("upload", **{"REPO": "me/mine", **options}), *words)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"REPO": "mine"}, ["REPO=mine", "REPO=org/name"]),
        ({"STAGE": "align"}, ["STAGE=align", "have: finetune"]),
        ({"RUN": "other"}, ["RUN=other: no such run", "mine"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_upload_of_what_is_not_there_is_refused(run, options, words):
    with pytest.raises(InputError) as refused:
        upload({**os.environ, "REPO": "me/mine", **options})
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_model_that_was_changed_since_is_not_uploaded(hub, run):
    (run / "finetune/model/tokenizer_config.json").write_text(
        json.dumps({**TOKENIZER_CONFIG, "x": 1})
    )
    with pytest.raises(InputError, match="was changed since finetune made it"):
        upload({**os.environ, "REPO": "me/mine"})
    (run / "finetune/stage.json").unlink()
    with pytest.raises(InputError, match="no stage has finished a model"):
        upload({**os.environ, "REPO": "me/mine"})
    assert not hub.repositories
