"""Suites: published tasks and a user's own, on data sets that were staged before."""

import functools
import hashlib
import io
import json
import os
import shutil
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from scripts.run import gate, suites
from scripts.run.errors import InputError
from scripts.tools import hub_datasets, patches
from scripts.tools.hub import NotNow
from tests.support.hub import Hub
from tests.support.launching import assert_refused, call_make, launch, said
from tests.support.models import make_model
from tests.support.runs import ROOT, read_env, read_json, stage_dir

CONFIGS = ROOT / "configs/evaluate"
STANDARD, CHAT = CONFIGS / "standard", CONFIGS / "chat"
LETTERS = ["A", "B", "C", "D"]


def packed(rows):
    """Write rows as a parquet file's bytes."""
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def page(configs):
    """Write a data set's page, which says {config: {split: path}}."""
    told = [
        {"config_name": name, "data_files": [{"split": s, "path": p} for s, p in splits.items()]}
        for name, splits in configs.items()
    ]
    return f"---\n{yaml.safe_dump({'license': 'mit', 'configs': told})}---\nrows\n".encode()


def arc(count=6):
    """Made-up rows in ARC's columns."""
    return [
        {
            "id": str(n),
            "question": f"Which of the boxes holds number {n}?",
            "choices": {"text": [f"box {n + k}" for k in range(4)], "label": LETTERS},
            "answerKey": LETTERS[n % 4],
        }
        for n in range(count)
    ]


def arc_files():
    """The files of a repository with two configs, as the real one has them."""
    configs = ("ARC-Challenge", "ARC-Easy")
    splits = ("train", "test", "validation")
    told = {c: {s: f"{c}/{s}-*" for s in splits} for c in configs}
    rows = {f"{c}/{s}-00000-of-00001.parquet": packed(arc()) for c in configs for s in splits}
    return {"README.md": page(told), **rows, ".gitattributes": b"x", "script.py": b"x"}


def hellaswag_files():
    rows = [
        {
            "ind": n,
            "activity_label": "Boxes",
            "ctx_a": f"Somebody opens box {n}.",
            "ctx_b": "they",
            "ctx": f"Somebody opens box {n}. they",
            "endings": [f"take {n + k} out of it." for k in range(4)],
            "source_id": str(n),
            "split": "val",
            "split_type": "indomain",
            "label": str(n % 4),
        }
        for n in range(6)
    ]
    told = {"default": {s: f"data/{s}-*" for s in ("train", "validation")}}
    files = {f"data/{s}-00000-of-00001.parquet": packed(rows) for s in ("train", "validation")}
    return {"README.md": page(told), **files}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, and the environment of a user who knows it."""
    server = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELS", str(tmp_path / "my models"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODEL", "FORCE", "RECIPE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two small models with weights: one, and another of the same shape."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "one", max_position_embeddings=2048)
    return folder / "one"


def own(folder, **tasks):
    """Write a folder of tasks: {name: what its YAML says}."""
    folder.mkdir(exist_ok=True)
    for name, content in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def asked(**options):
    """Say how make would launch evaluate, with what every test has."""
    names = ("PATH", "HOME", "RUNS", "MODELS")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return launch("evaluate", environment=kept, **options)


# --- what is pinned


FAMILIES = ("arc", "hellaswag", "piqa", "winogrande", "mmlu/default", "gsm8k", "ifeval")


def bundled():
    """Index those of lm-eval's folders alone that a pin is in: all take 7 seconds."""
    import lm_eval.tasks

    folders = [Path(lm_eval.tasks.__file__).parent / name for name in FAMILIES]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


@pytest.mark.parametrize("folder", [STANDARD, CHAT], ids=lambda p: p.name)
def test_the_pinned_lm_eval_has_these_versions_shots_and_metrics(folder):
    """A new lm-eval that has changed a task turns this red: then the scores cannot be compared."""
    from lm_eval.tasks._yaml_loader import load_yaml

    index = bundled().task_index
    group = yaml.safe_load((STANDARD / "standard.yaml").read_text())
    shots = {w.get("task") or w["group"]: w["num_fewshot"] for w in group["task"]}
    scores = suites.about(folder)["scores"]
    if folder == STANDARD:
        assert {name.split("/")[0] for name in scores} == set(shots)
    data = set()
    for name, pinned in scores.items():
        task, metric = name.split("/")
        config = load_yaml(index[task].yaml_path, resolve_func=False)
        assert config["metadata"]["version"] == pinned["version"], task
        assert shots.get(task, config.get("num_fewshot")) == pinned["shots"], task
        listed = config.get("metric_list") or config["aggregate_metric_list"]
        assert metric.split(",")[0] in [m["metric"] for m in listed], name
        if "group" in config:
            anatomy = load_yaml(index[f"{task}_anatomy"].yaml_path, resolve_func=False)
            data.add(anatomy["dataset_path"])
            assert "num_fewshot" not in anatomy, "the suite's own number would not hold"
        else:
            data.add(config["dataset_path"])
    pinned = suites.about(folder)["data"]
    assert set(pinned) == data
    assert all(len(commit) == 40 for commit in pinned.values())


# --- before anything runs


@pytest.mark.parametrize("recipe", ["standard", "chat"])
def test_what_is_not_staged_is_named_with_the_command(hub, runs, model, recipe):
    result = asked(FROM=str(model), RUN="x", RECIPE=recipe)
    names = [*suites.about(CONFIGS / recipe)["data"]]
    command = f"make download RECIPE={recipe} MODELS='{os.environ['MODELS']}' stages them"
    assert_refused(result, *names, command)
    assert not runs.exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("./none", ["RECIPE=./none: no such folder", "as configs/evaluate/custom is"]),
        ("stanard", ["RECIPE=stanard: unknown", "standard", "RECIPE=./stanard"]),
        ("{mine}/empty", ["holds no task"]),
        ("{mine}/binary", ["rows.parquet: no text file"]),
        ("{mine}/about", ["suite.json: may hold scores, data, nltk"]),
    ],
)
def test_a_recipe_that_is_no_suite_is_refused(runs, model, tmp_path, recipe, words):
    (tmp_path / "empty").mkdir()
    (own(tmp_path / "binary", a={"task": "a"}) / "rows.parquet").write_bytes(b"PAR1")
    (own(tmp_path / "about", a={"task": "a"}) / "suite.json").write_text('{"score": {}}')
    result = asked(FROM=str(model), RUN="x", RECIPE=recipe.format(mine=tmp_path))
    assert_refused(result, *words)
    assert not runs.exists()


def test_a_suite_is_frozen_into_the_run_and_another_is_refused(runs, model, tmp_path):
    mine = own(tmp_path / "my tasks", a={"task": "a", "dataset_path": "json"})
    (mine / "more").mkdir()
    (mine / "more/rows.jsonl").write_text("{}\n")
    (mine / "floors.json").write_text('{"a/acc": {"min": 0.5}}')
    shown = asked(FROM=str(model), RUN="x", RECIPE=str(mine), DRY_RUN="1").stdout
    for words in ("tasks/more/rows.jsonl", "tasks/a.yaml", "evaluate/floors.json"):
        assert words in shown, shown
    assert "DATA=" not in shown
    assert "== data" not in shown, "a suite needs no held-out rows"
    script = f"set -e; cd '{ROOT}'\n" + "\n".join(
        line for line in shown.splitlines() if "-m scripts." not in line
    )
    assert os.system(f"bash << 'OUTER'\n{script}\nOUTER\n") == 0  # noqa: S605  what a user pastes
    stage = stage_dir("x", "evaluate")
    assert (stage / "tasks/more/rows.jsonl").read_text() == "{}\n"
    assert read_env(stage / "stage.env")["RECIPE"] == str(mine)
    (stage / "stage.json").write_text(json.dumps({"inputs": {}, "ended": 0, "summary": {}}))
    again = asked(FROM=str(model), RUN="x", RECIPE=str(mine))
    assert again.returncode == 0, said(again)
    other = shutil.copytree(mine, tmp_path / "other")
    assert_refused(asked(FROM=str(model), RUN="x", RECIPE=str(other)), "RECIPE was", "my tasks")
    assert_refused(asked(FROM=str(model), RUN="x"), "RECIPE was")
    own(mine, b={"task": "b"})
    assert_refused(asked(FROM=str(model), RUN="x", RECIPE=str(mine)), "tasks/b.yaml is new")
    (mine / "b.yaml").unlink()
    (mine / "more/rows.jsonl").unlink()
    result = asked(FROM=str(model), RUN="x", RECIPE=str(mine))
    assert_refused(result, "tasks/more/rows.jsonl was there, now not")


# --- staged


def stage(**options):
    """Call make download."""
    return call_make("download", **options)


def suite_on(folder, *names):
    """Write a suite that asks tasks of lm-eval, and names their data."""
    own(folder, mine={"group": "mine", "task": list(names)})
    about = {"data": {"allenai/ai2_arc": "main", "Rowan/hellaswag": ""}}
    (folder / "suite.json").write_text(json.dumps(about))
    return folder


def test_a_suite_is_staged_with_every_hash_and_goes_on(hub, tmp_path):
    files = arc_files()
    first = hub.add("datasets/allenai/ai2_arc", files)
    hub.add("datasets/Rowan/hellaswag", hellaswag_files())
    hub.flip["ARC-Easy/test-00000-of-00001.parquet"] = 1
    mine = suite_on(tmp_path / "mine", "arc_easy")
    result = stage(RECIPE=str(mine))
    assert result.returncode == 0, said(result)
    assert "came damaged" in result.stdout
    there = tmp_path / "my models/datasets/allenai--ai2_arc"
    found = {p.relative_to(there).as_posix(): p.read_bytes() for p in there.rglob("*.parquet")}
    assert found == {n: data for n, data in files.items() if n.endswith(".parquet")}
    assert not (there / "script.py").exists()
    assert read_json(there / ".download.json")["commit"] == first
    seen = len(hub.seen)
    assert stage(RECIPE=str(mine)).stdout.count("there already") == 2
    assert not [s for s in hub.seen[seen:] if "/resolve/" in s[1]]
    about = {"data": {"allenai/ai2_arc": "0" * 40}}
    (mine / "suite.json").write_text(json.dumps(about))
    with_other = suites.lacking(str(mine), tmp_path / "my models", "")
    assert "allenai/ai2_arc" in with_other[0], "it is staged at another commit"
    assert_refused(stage(RECIPE=str(mine)), "no revision 000")
    assert_refused(stage(RECIPE="heldout"), "RECIPE=heldout: no suite")
    hub.add("datasets/org/images", {"a.png": b"x"})
    (mine / "suite.json").write_text('{"data": {"org/images": ""}}')
    assert_refused(stage(RECIPE=str(mine)), "datasets/org/images: no parquet, JSON")
    assert_refused(stage(RECIPE=str(mine), MODELS=str(tmp_path / "a[b]")), "one of [ ] * ?")


@pytest.fixture
def nltk_server(tmp_path, monkeypatch):
    """The folder of a server that nltk takes for its own; it would not ask one on this machine."""
    place = tmp_path / "nltk server"
    place.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(place))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with zipfile.ZipFile(place / "punkt_tab.zip", "w") as out:
        out.writestr("punkt_tab/english/abbrev_types.txt", "dr\n")
    data = (place / "punkt_tab.zip").read_bytes()
    about = {
        "id": "punkt_tab",
        "name": "punkt",
        "subdir": "tokenizers",
        "url": f"{url}/punkt_tab.zip",
        "size": str(len(data)),
        "unzipped_size": "3",
        "checksum": hashlib.md5(data).hexdigest(),  # noqa: S324  nltk's own
        "sha256_checksum": hashlib.sha256(data).hexdigest(),
        "unzip": "1",
    }
    words = " ".join(f'{key}="{value}"' for key, value in about.items())
    index = f"<nltk_data><packages><package {words}/></packages><collections/></nltk_data>"
    (place / "index.xml").write_text(index)
    monkeypatch.setattr("nltk.pathsec._ip_is_forbidden", lambda _: False)
    monkeypatch.setattr("nltk.downloader.Downloader.DEFAULT_URL", f"{url}/index.xml")
    yield place
    server.shutdown()


def test_the_data_of_nltk_is_staged_and_a_damaged_one_is_not(nltk_server, tmp_path):
    mine, models = own(tmp_path / "mine", a={"task": "a"}), tmp_path / "models"
    (mine / "suite.json").write_text('{"nltk": ["punkt_tab"]}')
    assert "nltk_data" in suites.lacking(str(mine), models, "")[0]
    whole = (nltk_server / "punkt_tab.zip").read_bytes()
    (nltk_server / "punkt_tab.zip").write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
    with pytest.raises(NotNow, match="punkt_tab did not come"):
        hub_datasets.stage(str(mine), models, force=False, dry_run=False)
    assert suites.lacking(str(mine), models, "")
    (nltk_server / "punkt_tab.zip").write_bytes(whole)
    said = hub_datasets.stage(str(mine), models, force=False, dry_run=False)
    assert "punkt_tab: staged" in said
    assert suites.lacking(str(mine), models, "") == []
    there = models / "datasets/nltk_data/tokenizers"
    assert (there / "punkt_tab/english/abbrev_types.txt").read_text() == "dr\n"
    again = hub_datasets.stage(str(mine), models, force=False, dry_run=False)
    assert "there already" in again


# --- scores


def parent_and_child(runs, tiny):
    """Write a run whose finetune has made a model of `tiny`, without having trained."""
    made = runs / "mine/finetune"
    made.mkdir(parents=True)
    shutil.copytree(tiny, made / "model")
    (made / "stage.env").write_text(f"FROM={tiny}\n".replace(" ", "%20"))
    (made / "stage.json").write_text(json.dumps({"inputs": {}, "outputs": {}, "ended": 0}))


@pytest.mark.slow
def test_published_tasks_are_scored_offline_beside_the_parent(hub, runs, tiny, tmp_path):
    hub.add("datasets/allenai/ai2_arc", arc_files())
    hub.add("datasets/Rowan/hellaswag", hellaswag_files())
    mine = suite_on(tmp_path / "mine", "arc_easy", "hellaswag")
    assert stage(RECIPE=str(mine)).returncode == 0
    hub.close()  # no stage may ask it
    parent_and_child(runs, tiny)
    result = call_make("evaluate", RUN="mine", RECIPE=str(mine), ARGS="--limit 4")
    assert result.returncode == 0, said(result)
    verdict = read_json(stage_dir("mine", "evaluate") / "verdict.json")
    wanted = {f"{task}/{metric}" for task in ("arc_easy", "hellaswag") for metric in METRICS}
    assert set(verdict["watched"]) == wanted
    assert verdict["passed"], "the same weights are not worse than their parent"
    bounds = {row["metric"]: row for row in verdict["floors"]}
    assert set(bounds) == wanted
    for name in wanted:
        error = verdict["errors"][name]
        assert bounds[name]["min"] == pytest.approx(verdict["scores"][name] - 2 * 2**0.5 * error)
        assert f"{name}: parent {verdict['scores'][name]:.3f} ± {error:.3f}, finetune" in (
            result.stdout
        )
    record = read_json(stage_dir("mine", "evaluate") / "stage.json")
    assert {"model", "tasks", "allenai/ai2_arc", "Rowan/hellaswag"} == set(record["inputs"])
    assert "arc_easy/acc_norm" in call_make("status", RUN="mine").stdout
    assert call_make("lineage", RUN="mine").returncode == 0, "what it asked is as it was"


METRICS = ("acc", "acc_norm")


@pytest.mark.slow
def test_the_example_is_scored_and_without_floors_it_does_not_pass(runs, tiny):
    result = call_make("evaluate", RUN="own", RECIPE="custom", FROM=str(tiny))
    assert result.returncode == 0, said(result)
    assert "it is measured, and does not pass" in result.stdout
    verdict = read_json(stage_dir("own", "evaluate") / "verdict.json")
    assert verdict["watched"] == ["capitals/acc"]
    assert not verdict["passed"]
    refused = call_make("deploy", RUN="own", FROM=str(tiny))
    assert_refused(refused, "names no floor and there is no parent")


@pytest.mark.slow
def test_a_task_that_lm_eval_does_not_know_is_named(runs, tiny, tmp_path):
    mine = own(tmp_path / "mine", mine={"group": "mine", "task": ["arc_esy", "piqqa"]})
    result = call_make("evaluate", RUN="x", RECIPE=str(mine), FROM=str(tiny))
    assert_refused(result, "arc_esy: unknown task; did you mean", "arc_easy", "piqa")
    assert not stage_dir("x", "evaluate/results").exists()


def test_a_data_set_that_was_not_staged_is_named_by_the_job(tmp_path, monkeypatch):
    """That of a bundled task that a folder names: the launcher does not see it."""
    import datasets
    import lm_eval.api.task

    monkeypatch.setattr(lm_eval.api.task, "datasets", datasets)  # to put it back
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = tmp_path / "org--rows/a.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"a": 1}\n')
    patches.lm_eval_reads_staged({"org/rows": rows.parent})
    load, cache = lm_eval.api.task.datasets.load_dataset, {"cache_dir": str(tmp_path / "cache")}
    assert load("org/rows", revision="main", **cache)["train"][0] == {"a": 1}
    own_rows = load("json", data_files={"test": str(rows)}, **cache)
    assert own_rows["test"].num_rows == 1, "a task's own rows are read as before"
    with pytest.raises(InputError, match="allenai/ai2_arc: a data set of the hub that was not"):
        load("allenai/ai2_arc", "ARC-Easy", **cache)


# --- the verdict of a suite


def results(folder, scores, more=True):
    """Write what lm-eval writes: {"task/metric,filter": (value, error)}."""
    told = {}
    for name, (value, error) in scores.items():
        task, key = name.split("/")
        metric, kept = key.split(",")
        about = {key: value, f"{metric}_stderr,{kept}": error}
        told.setdefault(task, {"alias": task}).update(about)
    known = {task: {key.split(",")[0]: more for key in row} for task, row in told.items()}
    folder.mkdir(parents=True)
    content = {"results": told, "higher_is_better": known}
    (folder / "results_1.json").write_text(json.dumps(content))


GSM = {
    "gsm8k/exact_match,strict-match": (0.5, 0.01),
    "gsm8k/exact_match,flexible-extract": (0.7, 0.01),
}


def test_two_readings_of_one_answer_are_two_scores(tmp_path):
    results(tmp_path / "now", GSM)
    now = next((tmp_path / "now").iterdir())
    assert gate.read_scores(now) == {name: value for name, (value, _) in GSM.items()}
    assert gate.directions(now, ["gsm8k/exact_match,strict-match", "not/there"]) == {
        "gsm8k/exact_match,strict-match": "more"
    }


def test_a_group_whose_direction_lm_eval_leaves_out_counts(tmp_path):
    results(tmp_path / "now", {"mmlu/acc,none": (0.5, 0.1), "mmlu_stem/acc,none": (0.5, 0.1)})
    now = next((tmp_path / "now").iterdir())
    told = read_json(now)
    del told["higher_is_better"]["mmlu"]  # as lm-eval 0.4.13 does
    now.write_text(json.dumps(told))
    assert gate.directions(now, ["mmlu/acc"]) == {"mmlu/acc": "more"}
    told["higher_is_better"]["other"] = {"acc": False}
    now.write_text(json.dumps(told))
    assert gate.directions(now, ["mmlu/acc"]) == {}, "nobody knows which way is better"


@pytest.mark.parametrize(
    ("now", "more", "passed"),
    [(0.48, True, True), (0.46, True, False), (0.54, True, True), (0.54, False, False)],
)
def test_a_suite_passes_if_it_is_not_worse_than_the_parent(tmp_path, now, more, passed):
    results(tmp_path / "now", {"t/acc,none": (now, 0.01)}, more)
    results(tmp_path / "before/parent", {"t/acc,none": (0.5, 0.01)}, more)
    verdict = gate.conclude(tmp_path / "now", tmp_path / "before", {}, [], {})
    assert verdict["passed"] is passed
    assert gate.summary(verdict) == {"t/acc": now}
    assert gate.changes(verdict, "align") == [
        f"t/acc: parent 0.500 ± 0.010, align {now:.3f} ± 0.010"
    ]


def test_a_suite_with_neither_floors_nor_parent_does_not_pass(tmp_path):
    results(tmp_path / "now", {"t/acc,none": (0.9, 0.01), "t/other,none": (0.9, 0.01)})
    suite = {"scores": {"t/acc": {}}}
    verdict = gate.conclude(tmp_path / "now", tmp_path / "before", {}, [], suite)
    assert not verdict["passed"]
    assert gate.summary(verdict) == {"t/acc": 0.9}
    kept = gate.conclude(tmp_path / "now", tmp_path / "before", {"t/acc": {"min": 0.8}}, [], suite)
    assert kept["passed"]


def test_data_sets_are_found_where_tasks_name_them(tmp_path):
    mine = own(tmp_path / "mine", a={"task": "a", "dataset_path": "org/rows"}, b={"task": "b"})
    (mine / "c.yaml").write_text('task: c\ndataset_path: "json"\nx: {dataset_path: other/rows}\n')
    assert suites.data_sets(mine) == {"org/rows": "", "other/rows": ""}
    (mine / "suite.json").write_text("[1]")
    with pytest.raises(InputError, match="may hold"):
        suites.data_sets(mine)
    assert suites.hub_name(suites.staged(Path("m"), "org/a--b")) == "org/a--b"


# --- chat


def punkt(folder, monkeypatch):
    """Write what nltk's punkt_tab is, learned from a few made-up sentences."""
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    trainer, place = PunktTrainer(), folder / "tokenizers/punkt_tab/english"
    trainer.train("Here is one. Dr. Smith has another. And Mr. Jones writes a third. " * 20)
    place.mkdir(parents=True)
    monkeypatch.setenv("NLTK_DATA", str(folder))  # nltk writes nowhere else
    monkeypatch.setattr("nltk.data.path", [str(folder)])
    save_punkt_params(trainer.get_params(), dir=str(place))


@pytest.mark.slow
def test_instructions_are_judged_by_rules(hub, runs, tiny, tmp_path, monkeypatch):
    pin = suites.about(CHAT)["data"]["google/IFEval"]
    asks = {"no_comma": ("punctuation:no_comma", {}), "three": (SENTENCES, THREE)}
    rows = [
        {"key": n, "prompt": name, "instruction_id_list": [rule], "kwargs": [{**EMPTY, **given}]}
        for n, (name, (rule, given)) in enumerate(asks.items())
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {"README.md": b"---\nlicense: apache-2.0\n---\n", "ifeval_input_data.jsonl": text}
    commit = hub.add("datasets/google/IFEval", files)
    repository = hub.repositories["datasets/google/IFEval"]
    repository.commits[pin] = repository.commits.pop(commit)  # as the real one is called
    place = tmp_path / "my models/datasets/nltk_data"
    punkt(place, monkeypatch)
    (place / ".download.json").write_text('{"commit": "", "packages": ["punkt_tab"], "files": {}}')
    assert stage(RECIPE="chat").returncode == 0
    hub.close()
    arguments = "--gen_kwargs max_gen_toks=8"
    result = call_make("evaluate", RUN="c", RECIPE="chat", FROM=str(tiny), ARGS=arguments)
    assert result.returncode == 0, said(result)
    verdict = read_json(stage_dir("c", "evaluate") / "verdict.json")
    assert verdict["watched"] == list(suites.about(CHAT)["scores"])
    strict = verdict["scores"]["ifeval/prompt_level_strict_acc"]
    assert strict in (0.0, 0.5, 1.0)
    assert verdict["scores"]["ifeval/inst_level_strict_acc"] == strict


SENTENCES = "length_constraints:number_sentences"
THREE = {"num_sentences": 3, "relation": "at least"}
EMPTY = {"num_sentences": None, "relation": None}
