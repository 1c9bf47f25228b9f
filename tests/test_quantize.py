"""make quantize and QUANTIZE=: a run beside the run, what is refused, what llm-compressor makes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.run import files, gate, modeldir
from scripts.run.digests import Digests
from scripts.run.errors import InputError
from scripts.run.layout import Run
from scripts.tools import compressor
from tests.support.families import FAMILIES
from tests.support.goldens import write_run
from tests.support.lanes import lacking
from tests.support.launching import assert_refused, launch, said
from tests.support.models import make_model, write_model, write_sets
from tests.support.runs import ROOT, finished, stage_dir
from tests.support.sets import chats, write_rows


@pytest.fixture
def mine(runs):
    """Run mine, whose newest model is finetune's."""
    write_run(runs / "mine")
    return runs / "mine"


def facts(result, stage):
    """Return what a dry run would write into a stage's stage.env, with the stage's directory."""
    assert result.returncode == 0, said(result)
    found = re.search(rf"(\S*)/{stage}/stage.env'? << 'EOF'\n(.*?)EOF", result.stdout, re.S)
    assert found, f"{stage} is not planned:\n{result.stdout}"
    return {"run": found[1].split("/")[-1], **files.parse_env(found[2])}


# --- what is planned


@pytest.mark.parametrize("name", ["mine", "mine-int8"])
def test_what_is_quantised_is_a_run_beside_the_run(mine, name):
    result = launch("deploy", RUN=name, QUANTIZE="int8", DRY_RUN="1")
    told = {stage: facts(result, stage) for stage in ("quantize", "evaluate", "deploy")}
    assert {each["run"] for each in told.values()} == {"mine-int8"}
    made, model = told["quantize"], "runs/mine-int8/quantize/model"
    assert (made["FROM"], made["DATA"]) == ("runs/mine/finetune/model", "runs/mine/data/sets")
    assert (made["RECIPE"], made["MODEL"]) == ("int8", "smollm2_135m")
    assert (told["evaluate"]["FROM"], told["deploy"]["FROM"]) == (model, model)
    assert told["evaluate"][gate.before_fact(gate.PARENT)] == "runs/mine/finetune/model"
    assert not Path(mine.parent, "mine-int8").exists()


def test_the_recipe_is_int8_unless_it_is_named(mine):
    for options, name in ({}, "int8"), ({"RECIPE": "fp8"}, "fp8"), ({"QUANTIZE": "int4"}, "int4"):
        told = facts(launch("quantize", RUN="mine", DRY_RUN="1", **options), "quantize")
        assert (told["run"], told["RECIPE"]) == (f"mine-{name}", name)


def test_from_and_data_win(mine, tmp_path):
    other, sets = write_model(tmp_path / "other"), write_sets(tmp_path / "sets")
    given = {"FROM": str(other), "DATA": str(sets)}
    told = facts(launch("quantize", RUN="mine", DRY_RUN="1", **given), "quantize")
    assert (told["FROM"], told["DATA"]) == (str(other), str(sets))
    told = facts(launch("quantize", RUN="mine", DRY_RUN="1", DATA=str(sets)), "quantize")
    assert (told["FROM"], told["DATA"]) == ("runs/mine/finetune/model", str(sets))


def test_it_is_evaluated_on_the_rows_of_its_base(mine):
    """Without the rule it would be evaluated on the documentation of Python, DATA's default."""
    directory = mine.parent / "mine-int8/quantize"
    write_run(mine.parent / "mine-int8")
    (mine.parent / "mine-int8/finetune").rename(directory)
    for command in {"RUN": "mine-int8"}, {"RUN": "mine", "QUANTIZE": "int8"}:
        if "QUANTIZE" in command:
            text = "MODEL=smollm2_135m\nDATA=runs/mine/data/sets\nFROM=runs/mine/finetune/model\n"
            (directory / "stage.env").write_text(text + "RECIPE=int8\n")
            (directory / "config.yaml").write_text(
                (ROOT / "configs/quantize/int8.yaml").read_text()
            )
            (directory / "args.json").write_text("[]\n")
        result = launch("evaluate", DRY_RUN="1", **command)
        assert facts(result, "evaluate")["DATA"] == "runs/mine/data/sets"
        assert "scripts.data" not in result.stdout


def test_deploy_fails_closed_without_a_verdict_that_passes(mine):
    """Its own verdict, of its own files: that of the run it came from opens nothing."""
    run = Run(mine.parent, "mine-fp8")
    write_run(run.directory)
    (run.directory / "finetune").rename(run.stage("quantize"))
    made = Digests(run).describe(run.stage("quantize") / "model")
    refused = {"model": made, **gate.judge({"t/acc": 0.1}, {"t/acc": {"min": 0.4}})}
    for folder, verdict in (mine / "evaluate", {}), (run.stage("evaluate"), refused):
        folder.mkdir()
        files.write_json(folder / "verdict.json", verdict or {"passed": True})
        files.write_json(folder / "stage.json", {"status": "done"})
    assert_refused(launch("deploy", RUN="mine-fp8"), "t/acc is 0.1000, at least 0.4")


# --- what is refused


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("quantize", {"RECIPE": "int9"}, ["RECIPE=int9: unknown; known: fp8, int4, int8"]),
        ("deploy", {"QUANTIZE": "int9"}, ["QUANTIZE=int9: unknown; known: fp8, int4, int8"]),
        ("finetune", {"QUANTIZE": "int8"}, ["QUANTIZE=int8: not for finetune", "make deploy"]),
        ("pipeline", {"QUANTIZE": "int8"}, ["QUANTIZE=int8: not for pipeline", "make deploy"]),
        ("quantize", {"GPUS": "2"}, ["GPUS=2: quantize is one process"]),
        ("quantize", {"RUN": "nothing"}, ["RUN=nothing: no such run", "there are: mine"]),
        ("deploy", {"RUN": "m" * 38, "QUANTIZE": "fp8"}, ["use 1 to 40"]),
    ],
)
def test_bad_input_is_refused(mine, verb, options, words):
    assert_refused(launch(verb, **{"RUN": "mine", **options}), *words)
    assert [path.name for path in mine.parent.iterdir()] == ["mine"], "nothing is left behind"


@pytest.mark.parametrize("verb", ["quantize", "finetune", "align"])
def test_quantised_weights_are_no_beginning(mine, tmp_path, verb):
    model = write_model(tmp_path / "small")
    config = files.read_json(model / "config.json")
    sizes = {"quantization_config": {"quant_method": "compressed-tensors"}}
    files.write_json(model / "config.json", {**config, **sizes})
    assert modeldir.problems(model) == [], "it can be evaluated and served"
    options = {"RUN": "x", "FROM": str(model), "DATA": str(mine / "data/sets")}
    words = ("weights are quantised (compressed-tensors)", "start from the model that it was made")
    assert_refused(launch(verb, **options), *words)


def test_int8_needs_conversations_and_fp8_none(mine):
    files.write_json(mine / "data/sets/data.json", {"rows": {"text": 9}})
    words = "DATA has texts, quantize needs conversations"
    assert_refused(launch("deploy", RUN="mine", QUANTIZE="int8", DRY_RUN="1"), words)
    facts(launch("deploy", RUN="mine", QUANTIZE="fp8", DRY_RUN="1"), "quantize")


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="here is a GPU")
def test_four_bits_are_not_served_without_a_gpu(mine, tmp_path):
    words = "weights of 4 bits: vLLM serves them on a GPU alone"
    assert_refused(launch("deploy", RUN="mine", QUANTIZE="int4"), words)
    model = write_model(tmp_path / "small")
    config = files.read_json(model / "config.json")
    for bits in (8, 4):
        packed = {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}
        files.write_json(model / "config.json", {**config, "quantization_config": packed})
        refused = launch("deploy", RUN="mine", FROM=str(model), BIND="0.0.0.0")
        assert (words in refused.stderr) == (bits == 4), said(refused)
    # On a cluster another machine serves: its job looks.
    facts(launch("deploy", RUN="mine", QUANTIZE="int4", CLUSTER="slurm", DRY_RUN="1"), "deploy")


@pytest.fixture
def stage(tmp_path):
    """A stage as its parent sees it: int4, on a model whose widths 64 divides."""
    directory = tmp_path / "quantize"
    directory.mkdir()
    config = directory / "config.yaml"
    config.write_text((ROOT / "configs/quantize/int4.yaml").read_text())
    return SimpleNamespace(directory=directory, config=config, facts={"RECIPE": "int4"})


def wide(tmp_path, **sizes):
    """Write a model with these sizes in its config.json."""
    model = write_model(tmp_path / "model")
    config = {**files.read_json(model / "config.json"), "hidden_size": 576, "head_dim": 64}
    more = {"num_attention_heads": 9, "intermediate_size": 1536}
    files.write_json(model / "config.json", {**config, **more, **sizes})
    return model


def test_a_machine_or_model_that_does_not_fit_is_named(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(compressor, "version", lambda: "there")
    model, sets = wide(tmp_path), write_sets(tmp_path / "sets")
    assert compressor.problems(stage, model, sets) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    monkeypatch.setattr("scripts.run.preflight.free_memory", lambda: 7)
    files.write_json(sets / "data.json", {"rows": {"text": 5}})
    found = "\n".join(compressor.problems(stage, model, sets))
    assert "holds no conversations, which int4 needs" in found
    assert "the weights will need at least 0.00 GB of memory" in found
    assert "the model will need 0.00 GB, 0.00 are free" in found


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"intermediate_size": 1504}, "intermediate_size 1504: no multiple of group_size 64; copy"),
        ({"hidden_size": 100, "head_dim": None}, "hidden_size 100, all heads 99"),
        ({"intermediate_size": 1500}, "take int8 or fp8"),
    ],
)
def test_a_width_that_no_group_divides_is_named(stage, tmp_path, monkeypatch, sizes, words):
    monkeypatch.setattr(compressor, "version", lambda: "there")
    model, sets = wide(tmp_path, **sizes), write_sets(tmp_path / "sets")
    [found] = compressor.problems(stage, model, sets)
    assert words in found
    stage.config.write_text((ROOT / "configs/quantize/int8.yaml").read_text())
    assert compressor.problems(stage, model, sets) == [], "int8 knows no groups"


def test_without_the_packages_their_command_is_named(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(compressor, "PACKAGES", tmp_path / "not there")
    [found] = compressor.problems(stage, wide(tmp_path), write_sets(tmp_path / "sets"))
    assert found == "llm-compressor is not installed here: make .venv/quantize/installed"


# --- what the stage does around llm-compressor


def test_rows_are_taken_at_equal_distances(tmp_path):
    model = make_model(tmp_path / "model")
    rows = chats(20)
    for number in range(2):
        write_rows(tmp_path / f"sets/sft/{number}.jsonl", rows[number * 10 :][:10])
    files.write_json(tmp_path / "sets/data.json", {"rows": {"sft": 20}})
    chat = compressor.Chat(model)
    wanted = chat.encode([chat.render(row["messages"]) for row in rows])
    taken = compressor.calibration(tmp_path / "sets", model, 4, 500)
    assert taken == wanted[::5]
    assert compressor.calibration(tmp_path / "sets", model, 50, 7) == [ids[:7] for ids in wanted]


def test_a_quantised_model_keeps_its_own_config(tmp_path):
    made, parent = write_model(tmp_path / "made"), write_model(tmp_path / "parent")
    own = {**files.read_json(made / "config.json"), "quantization_config": {"format": "x"}}
    files.write_json(made / "config.json", own)
    (parent / "chat_template.jinja").write_text("{{ messages }} ")
    run = Run(tmp_path, "x")
    modeldir.hand_over(made, parent, tmp_path / "model", Digests(run, remember=False))
    assert files.read_json(tmp_path / "model/config.json") == own
    assert (tmp_path / "model/chat_template.jinja").exists(), "all else comes from the parent"


# --- the whole of it


@pytest.mark.slow
def test_a_small_model_is_quantised_judged_and_answers(runs, tmp_path):
    """int8, against its parent, and fp8; transformers reads what was made, vLLM answers from it."""
    if not compressor.version():
        lacking("llm-compressor is an extra: make .venv/quantize/installed")
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    (model / "generation_config.json").unlink()  # then it must be ours, which ends at a turn's end
    given = {"FROM": str(model), "DATA": str(write_rows(tmp_path / "chats.jsonl", chats()))}
    options = {"RUN": "x", **given, "OMP_NUM_THREADS": "1"}
    wrong = launch("quantize", **options, ARGS="num_calibration_sample=8")
    assert_refused(
        wrong, "unknown key num_calibration_sample; did you mean num_calibration_samples"
    )
    quick = {"QUANTIZE_ARGS": "num_calibration_samples=8", "EVALUATE_ARGS": "--limit 8"}
    judged = launch("evaluate", **options, **quick, QUANTIZE="int8")
    assert judged.returncode == 0, said(judged)
    options["DATA"] = str(stage_dir("x-int8", "data"))
    made = launch("quantize", **options, RECIPE="fp8")
    assert made.returncode == 0, said(made)
    verdict = files.read_json(stage_dir("x-int8", "evaluate") / "verdict.json")
    assert set(verdict["before"]) == {gate.PARENT}, "it is held against what it was made from"
    assert verdict["passed"], verdict["floors"]
    again = launch("evaluate", **{**options, **given}, **quick, QUANTIZE="int8")
    assert "quantize: done already" in again.stdout, said(again)
    for recipe, dtype in ("int8", "torch.int8"), ("fp8", "torch.float8_e4m3fn"):
        small = stage_dir(f"x-{recipe}", "quantize") / "model"
        record = finished(small.parent)
        assert record["outputs"]["model"]["parameters"] == modeldir.parameter_count(model)
        assert record["summary"]["tool"].startswith("llmcompressor ")
        assert ("data" in record["inputs"]) == (recipe == "int8"), "fp8 reads no rows"
        assert modeldir.weight_bytes(small) < 0.6 * modeldir.weight_bytes(model)
        assert files.read_json(small / "generation_config.json")["do_sample"] is False
        assert distance(small, model, dtype) < 0.05
        prompts, out = tmp_path / "prompts.jsonl", tmp_path / f"{recipe}.jsonl"
        write_rows(prompts, [{"prompt": "What is this?"}])
        words = {"RUN": "x", "QUANTIZE": recipe, "DATA": str(prompts), "OUT": str(out)}
        answer(**words, ARGS="--max-model-len 128 --enforce-eager --dtype float32")
        assert json.loads(out.read_text())["answer"], "vLLM answers something"


@pytest.mark.slow
def test_every_family_stays_what_it_is(tmp_path):
    """Smoothing alone changes nothing; llm-compressor's own table made other models of Gemma 2 and
    3 (0.11), and ended with an error for Starcoder 2 and OLMo 2."""
    if not compressor.version():
        lacking("llm-compressor is an extra: make .venv/quantize/installed")
    words = [sys.executable, "-m", "tests.support.quantised", str(make_model(tmp_path / "model"))]
    env = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(FAMILIES)
    most = {"smoothed": 1e-4, "int8": 0.01, "fp8": 0.03, "int4": 0.1}
    far = {
        name: away
        for name, away in found.items()
        if any(away[recipe] > bound for recipe, bound in most.items())
    }
    assert far == {}


def distance(small, model, dtype):
    """Return how far the logits of a quantised model are from its parent's, of the range of these.
    Its weights must be of `dtype` in the file."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    kinds = {str(tensor.dtype) for tensor in load_file(small / "model.safetensors").values()}
    assert dtype in kinds, f"{small} has weights of {kinds}"
    tokens = torch.arange(200)[None] % 500
    with torch.no_grad():
        now, before = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
            for folder in (small, model)
        )
    away = ((now - before).abs().mean() / (before.max() - before.min())).item()
    assert away > 0, "nothing was quantised"
    return away


def answer(**options):
    """Call make generate as a user does."""
    words = [sys.executable, "-m", "scripts.generate"]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **options}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-3000:] + done.stderr.decode()[-3000:]


def test_an_argument_that_calibration_does_not_have_is_named():
    kind = make_dataclass("Arguments", [("batch_size", int)])
    assert compressor.arguments(["batch_size=4"], kind) == {"batch_size": 4}
    with pytest.raises(InputError) as refused:
        compressor.arguments(["batchsize=4", "batch_size=many", "8"], kind)
    found = "\n".join(refused.value.problems)
    for words in ("did you mean batch_size?", "batch_size = 'many'", "8: give key=value"):
        assert words in found
