"""The line itself, with the real tools: the demo, what it learned, what it serves, two
processes."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from bench.measures import loss_curve, mcnemar_p, mean_and_error, metric, paired_t, samples
from scripts.run.files import read_json
from scripts.tools.torchtune_tokenizer import ChatTokenizer
from tests.support.launching import assert_refused, call_make, make
from tests.support.logits import assert_same_logits, transformers_logits
from tests.support.processes import memory
from tests.support.runs import ROOT, TRAINED, digest_tree, finished

pytestmark = pytest.mark.slow  # on one worker (lanes.LANES): the demo is made once


@pytest.fixture(scope="session")
def demo(folder):
    """`make demo`, watched. Its memory is what this process and all below it hold more than before:
    under pytest -n this process is a worker, and other workers are beside it."""
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(2):
            peak[0] = max(peak[0], memory(os.getpid()))

    threading.Thread(target=watch, daemon=True).start()
    began, idle = time.time(), memory(os.getpid())
    result = make("demo", PORT="8017")
    done.set()
    print(
        f"\ndemo: {time.time() - began:.0f} s, peak {(peak[0] - idle) / 1e9:.2f} GB\n",
        result.stdout,
    )
    yield {"out": result.stdout, "peak": peak[0] - idle, "runs": folder, "run": folder / "demo"}
    call_make("undeploy", RUN="demo")


def test_the_demo_ends_with_the_table_and_an_answer(demo):
    rows = dict(re.findall(r"^(\w+)  +(done|serving)", demo["out"], re.M))
    done = dict.fromkeys(("data", "pretrain", "finetune", "align", "evaluate"), "done")
    assert rows == {**done, "deploy": "serving"}, (
        f"the table is not that of a finished demo:\n{demo['out']}"
    )
    assert re.search(r"answered \S.+", demo["out"]), (
        f"the served model gave no answer:\n{demo['out']}"
    )
    assert demo["peak"] < 6e9, (
        f"the demo needed {demo['peak'] / 1e9:.1f} GB, it promises less than 6"
    )


def test_the_same_command_again_does_nothing_twice(demo):
    def models() -> list[str]:
        return [digest_tree(demo["run"] / stage / "model") for stage in TRAINED]

    before, began = models(), time.time()
    again = make("demo", PORT="8017")
    took = time.time() - began
    assert took < 20, f"to do nothing took {took:.0f} s"
    assert again.stdout.count("done already") == 5, f"five stages are done already:\n{again.stdout}"
    assert "serving already" in again.stdout, f"the model is served already:\n{again.stdout}"
    assert before == models(), "a second demo must not touch the models"


def test_lineage_walks_from_the_served_model_to_the_corpus(demo):
    out = make("lineage", RUN="demo").stdout
    for stage in ("deploy", "align", "finetune", "pretrain", "data", "corpus sha256:"):
        assert stage in out, f"the lineage does not show {stage}:\n{out}"
    sets = digest_tree(demo["run"] / "data/sets")
    for stage in TRAINED:
        record, model = (
            finished(demo["run"] / stage),
            digest_tree(demo["run"] / stage / "model"),
        )
        assert record["outputs"]["model"]["digest"] == model, (
            f"{stage}: the record names another model"
        )
        assert record["inputs"]["data"]["digest"] == sets, f"{stage}: the record names other data"


def test_prompts_are_answered_in_their_order_and_a_torn_file_goes_on(demo, folder):
    """The answers of a run that was killed after one of three, its second line torn."""
    prompts, out = folder / "prompts.jsonl", folder / "answers.jsonl"
    rows = [{"prompt": f"What does {name} do?", "id": name} for name in ("io", "os", "re")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = json.dumps({**rows[0], "answer": "It was there."})
    out.with_name("answers.jsonl.part").write_text(f'{first}\n{{"prompt": "What')
    options = {"RUN": "demo", "DATA": str(prompts), "OUT": str(out)}
    said = make("generate", **options).stdout
    assert f"{out}: 3 answers" in said
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in answered] == ["io", "os", "re"]
    assert answered[0]["answer"] == "It was there.", "what had been answered is not asked again"
    assert all(row["answer"] for row in answered)
    assert not out.with_name("answers.jsonl.part").exists()


def test_the_model_card_tells_every_stage_and_score(demo):
    card = make("upload", RUN="demo", REPO="me/demo", DRY_RUN="1").stdout
    assert [stage for stage in TRAINED if f"\n| {stage} | " not in card] == [], card
    assert "| relay_text/bits_per_byte | " in card, card
    assert "It kept every bound." in card, card


@pytest.mark.parametrize("stage", ["pretrain", "align"])
def test_handed_on_models_have_equal_logits_everywhere(demo, stage):
    directory = demo["run"] / stage / "model"
    ids = ChatTokenizer(str(directory)).encode((ROOT / "scripts/job/stage.py").read_text())[:250]
    print(assert_same_logits(directory, ids))


def request(demo, path, body=None, key=True, method=None):
    """(status, JSON) of the served API."""
    server = json.loads((demo["run"] / "deploy/server.json").read_text())
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {(demo['run'] / 'deploy/api-key').read_text().strip()}"
    data = json.dumps(body).encode() if body is not None else None
    call = urllib.request.Request(
        f"http://127.0.0.1:{server['port']}{path}", data, headers, method=method
    )
    try:
        with urllib.request.urlopen(call, timeout=60) as response:
            text = response.read()
            return response.status, json.loads(text) if text.startswith(b"{") else text
    except urllib.error.HTTPError as error:
        return error.code, {}


def test_served_log_probabilities_are_the_models(demo):
    """vLLM's log-probabilities of a prompt against transformers' (bound: docs/verified.md)."""
    directory = demo["run"] / "align" / "model"
    ids = ChatTokenizer(str(directory)).encode((ROOT / "scripts/job/stage.py").read_text())[:200]
    body = {"model": "demo", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
    status, answer = request(demo, "/v1/completions", body)
    assert status == 200, f"the served model answered {status}: {answer}"
    served = [
        next(iter(step.values()))["logprob"] for step in answer["choices"][0]["prompt_logprobs"][1:]
    ]
    reference = transformers_logits(directory, ids).log_softmax(-1)
    differences = [abs(s - reference[i, ids[i + 1]].item()) for i, s in enumerate(served)]
    print(f"vLLM prompt log-probabilities differ by at most {max(differences):.2e}")
    assert max(differences) < 1e-4, f"vLLM's log-probabilities are off by {max(differences):.2e}"


CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "What does\n<b> io & {{ x }} do? ünïcödé"},
]


def test_vllm_renders_the_template_byte_for_byte(demo):
    tokenizer = ChatTokenizer(str(demo["run"] / "align/model"))
    body = {"model": "demo", "messages": CHAT, "max_tokens": 1, "return_token_ids": True}
    status, answer = request(demo, "/v1/chat/completions", body)
    assert status == 200, f"the served model answered {status}: {answer}"
    text = tokenizer.render(CHAT, add_generation_prompt=True)
    rendered = tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False)
    assert rendered == text, "vLLM renders the chat in another way"
    assert answer["prompt_token_ids"] == tokenizer.encode(text), (
        "vLLM makes other tokens of the same text"
    )


def test_lm_eval_renders_the_template_byte_for_byte(demo):
    tokenizer = ChatTokenizer(str(demo["run"] / "align/model"))
    for row in samples(demo["run"] / "evaluate/results", "relay_choice")[:50]:
        asked = tokenizer.render(
            [{"role": "user", "content": row["doc"]["question"]}], add_generation_prompt=True
        )
        given = row["arguments"]["gen_args_0"]
        assert given["arg_0"] == asked, "lm-eval renders the question in another way"
        assert given["arg_1"] == row["doc"]["choices"][0], "lm-eval scores another answer"


def test_an_answer_ends_by_itself(demo):
    question = samples(demo["run"] / "evaluate/results", "relay_choice")[0]["doc"]["question"]
    body = {"model": "demo", "messages": [{"role": "user", "content": question}], "max_tokens": 200}
    _, answer = request(demo, "/v1/chat/completions", body)
    assert answer["choices"][0]["finish_reason"] == "stop", (
        "generation_config.json must name the end of a turn"
    )


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/health", False, 200),
        ("/v1/models", False, 401),
        ("/v1/models", True, 200),
        ("/metrics", False, 401),
        ("/metrics", True, 200),
        ("/tokenize", True, 404),
        ("/invocations", True, 404),
        ("/openapi.json", True, 404),
        ("/v1/../tokenize", True, 404),
    ],
)
def test_the_port_answers_only_what_it_should(demo, path, key, status):
    answered = request(demo, path, key=key)[0]
    assert answered == status, (
        f"{path} {'with' if key else 'without'} a key gave {answered}, not {status}"
    )


def test_chat_streams_one_answer(demo):
    out = make("chat", RUN="demo", PROMPT="What does 'io' do?").stdout
    assert out.strip(), "make chat printed no answer"


def test_the_gate_refuses_a_model_that_was_not_judged(demo):
    other = {"FROM": str(demo["run"] / "pretrain/model"), "MODEL": "debug", "PORT": "8018"}
    result = call_make("deploy", RUN="demo", **other)
    assert_refused(result, "not for", "make clean RUN=demo STAGE=evaluate")


def test_a_wrong_argument_of_vllm_is_refused(demo):
    options = {
        "RUN": "wrong",
        "MODEL": "debug",
        "FROM": str(demo["run"] / "align/model"),
        "FORCE": "1",
        "PORT": "8021",
    }
    result = call_make("deploy", **options, ARGS="--no-such-option 1")
    assert_refused(result, "--no-such-option", "vLLM refuses")


# --- it learned something ---


@pytest.fixture(scope="session")
def scores(demo):
    """What the demo's evaluation says of the model after each stage; of the finetuned one also on
    shuffled answers."""
    data, model = str(demo["run"] / "data"), str(demo["run"] / "finetune/model")
    shuffled = {"MODEL": "debug", "ARGS": "--tasks relay_choice_shuffled"}
    make("evaluate", RUN="control", FROM=model, DATA=data, **shuffled)
    evaluation, found = demo["run"] / "evaluate", {}
    verdict = json.loads((evaluation / "verdict.json").read_text())
    told = {**verdict["before"], "align": verdict}
    for stage, folder in (("pretrain", "before"), ("finetune", "before"), ("align", "")):
        logged = evaluation / folder / stage if folder else evaluation / "results"
        found[stage] = {
            "bits": told[stage]["scores"]["relay_text/bits_per_byte"],
            "choice": metric(logged, "relay_choice", "acc_mutual_info"),
            "plain": metric(logged, "relay_choice", "acc"),
            "margin": metric(logged, "relay_preference", "margin"),
        }
    control = demo["runs"] / "control/evaluate/results"
    found["finetune"]["shuffled"] = metric(control, "relay_choice_shuffled", "acc_mutual_info")
    for stage, values in found.items():
        told = [f"{name} {mean_and_error(v)}" for name, v in values.items() if name != "bits"]
        print(stage, values["bits"], *told)
    return found


def test_pretraining_learned_to_predict_held_out_text(scores):
    untrained = 3.99  # bits per byte at random weights, three seeds 3.98 to 4.01 (docs/demo.md)
    bits = scores["pretrain"]["bits"]
    assert bits <= 2.2, f"pretraining reached {bits:.2f} bits per byte, 2.2 are usual"
    assert bits <= 0.65 * untrained, f"{bits:.2f} bits per byte are near those of random weights"


def test_finetuning_learned_to_answer(scores):
    before, after = scores["pretrain"]["choice"], scores["finetune"]["choice"]
    choice, error = mean_and_error(after)
    assert len(after) >= 500, f"{len(after)} questions are too few to tell"
    assert choice >= 0.25 + 3 * error, (
        f"{choice:.3f} ± {error:.3f} right answers: no better than chance"
    )
    p = mcnemar_p(before, after)
    assert p < 0.01, f"fine-tuning answers no better than pretraining alone: p = {p:.2g}"
    shuffled, error = mean_and_error(scores["finetune"]["shuffled"])
    assert abs(shuffled - 0.25) <= 2 * error, "the answers alone must not give the right one away"


def test_alignment_moved_preferences_and_kept_the_rest(scores):
    tuned, aligned = scores["finetune"], scores["align"]
    assert len(aligned["margin"]) >= 500, (
        f"{len(aligned['margin'])} preferences are too few to tell"
    )
    t = paired_t(tuned["margin"], aligned["margin"])
    assert t > 3, f"alignment did not move the preferences: paired t = {t:.1f}"
    (before, error), (after, _) = mean_and_error(tuned["choice"]), mean_and_error(aligned["choice"])
    assert after >= before - error, (
        f"right answers fell from {before:.3f} ± {error:.3f} to {after:.3f}"
    )
    bits = (tuned["bits"], aligned["bits"])
    assert bits[1] <= 1.05 * bits[0], f"bits per byte rose from {bits[0]:.2f} to {bits[1]:.2f}"


# --- two processes, other beginnings ---


@pytest.mark.nightly
def test_two_processes_learn_the_same(demo, scores):
    """Half the batch on each of two processes is the same batch: FSDP must agree with one
    process."""
    data = str(demo["run"] / "data")
    words = "--training.local_batch_size 2 --validation.enable --validation.freq 225"
    said = make("pretrain", RUN="two", GPUS="2", DATA=data, ARGS=words).stdout
    losses = dict(re.findall(r"step (\d+): loss (\d+\.\d+) on held-out text", said))
    assert list(losses) == ["1", "225", "450"]
    assert float(losses["450"]) < float(losses["225"]) < float(losses["1"])
    make("finetune", RUN="two", GPUS="2", DATA=data, ARGS="batch_size=2")
    make("evaluate", RUN="two", DATA=data)
    evaluation = demo["runs"] / "two/evaluate"
    bits = json.loads((evaluation / "verdict.json").read_text())["scores"][
        "relay_text/bits_per_byte"
    ]
    choice, error = mean_and_error(
        metric(evaluation / "results", "relay_choice", "acc_mutual_info")
    )
    one, one_error = mean_and_error(scores["finetune"]["choice"])
    alone = scores["finetune"]["bits"]
    compared = f"two processes: {bits:.3f} bits, choice {choice:.3f}; one: {alone:.3f}, {one:.3f}"
    print(compared)
    assert abs(bits - alone) < 0.08 * alone, f"the bits per byte differ too much: {compared}"
    bound = 3 * (error**2 + one_error**2) ** 0.5
    assert abs(choice - one) <= bound, (
        f"the right answers differ by more than {bound:.3f}: {compared}"
    )


@pytest.mark.parametrize(("name", "gpus"), [("llama3", "1"), ("decoder", "2")])
def test_pretraining_goes_on_from_a_model(demo, name, gpus):
    """FROM= in pretrain: the first loss is the model's, not a random one's (8.1), with torchtitan's
    class and, on two ranks, with transformers'. Started by what its dry run prints."""
    arguments = "--training.steps 3 --metrics.log_freq 2 --lr_scheduler.warmup_steps 1"
    options = {
        "RUN": f"on-{name}",
        "MODEL": "debug",
        "FROM": str(demo["run"] / "pretrain/model"),
        "DATA": str(demo["run"] / "data"),
        "GPUS": gpus,
        "ARGS": f"{arguments} --model.name {name}",
    }
    subprocess.run(
        ["bash", "-e"],
        input=make("pretrain", **options, DRY_RUN="1").stdout,
        cwd=ROOT,
        text=True,
        check=True,
    )
    assert "done already" in make("pretrain", **options).stdout, "make would have written the same"
    stage = demo["runs"] / f"on-{name}/pretrain"
    first = loss_curve(stage / "metrics")[0][1]
    assert first < 5.5, f"a first loss of {first:.2f} is that of random weights"
    assert read_json(stage / "stage.json")["summary"]["step"] == 3, "the last step, not the logged"
    assert_same_logits(stage / "model", list(range(5, 100)))


def test_lora_finetuning_hands_on_a_merged_model(demo):
    """The same stage with another recipe; the adapter stays beside the model, for PEFT."""
    source, data = str(demo["run"] / "pretrain/model"), str(demo["run"] / "data")
    make(
        "finetune",
        RUN="lora",
        MODEL="debug",
        RECIPE="lora",
        FROM=source,
        DATA=data,
        ARGS="epochs=1 max_steps_per_epoch=7 log_every_n_steps=5",
    )
    summary = read_json(demo["runs"] / "lora/finetune/stage.json")["summary"]
    assert summary["step"] == 7, "the last step, which no log told"
    assert "loss" in summary
    names = {p.name for p in (demo["runs"] / "lora/finetune/model").iterdir()}
    adapters = [name for name in names if name.startswith("adapter")]
    assert not adapters, f"files of adapters were handed on: {adapters}"
    assert_same_logits(demo["runs"] / "lora/finetune/model", list(range(5, 100)))
    adapter = demo["runs"] / "lora/finetune/adapter"
    assert {p.name for p in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


# --- faults ---


@pytest.mark.parametrize(
    ("stage", "config", "words"),
    [
        (
            "pretrain",
            '[training]\nstep = 3\nseq_len = "long"\n',
            ["training.step", "did you mean training.steps", "training.seq_len"],
        ),
        ("pretrain", "[training\n", ["not TOML"]),
        ("pretrain", "[checkpoint]\nenable = false\n", ["checkpoint.enable must be true"]),
        (
            "pretrain",
            "[training]\nlocal_batch_size = 100000\nseq_len = 256\n"
            "[checkpoint]\nenable = true\nlast_save_model_only = false",
            ["less than one batch"],
        ),
        (
            "finetune",
            None,
            ["batchsize", "did you mean batch_size", "epochs", "optimizer.learning_rate"],
        ),
        ("finetune", "recipe: full_finetun\n", ["full_finetun"]),
        ("finetune", "a: [b\n", ["config.yaml"]),
        ("evaluate", "task: [x]\nbatch_size: 1\n", ["unknown key task"]),
        ("evaluate", "- x\n", ["key: value"]),
    ],
)
def test_bad_configs_are_refused_in_the_job(demo, stage, config, words):
    directory = demo["runs"] / "bad" / stage
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    source = demo["run"] / stage
    if config is None:
        config = (
            (source / "config.yaml")
            .read_text()
            .replace("batch_size: 1", "batchsize: 4\nbatch_size: 1")
            .replace("epochs: 1", "epochs: two")
        )
        config = config.replace("  lr: ", "  learning_rate: 1\n  lr: ")
    for name in ("stage.env", "architecture.json", "floors.json"):
        if (source / name).exists():
            (directory / name).write_text((source / name).read_text())
    (directory / "args.json").write_text("[]")  # the model's own settings would win
    (directory / f"config.{'toml' if stage == 'pretrain' else 'yaml'}").write_text(config)
    command = [sys.executable, "-m", f"scripts.{stage}", str(directory)]
    assert_refused(subprocess.run(command, cwd=ROOT, capture_output=True, text=True), *words)
    for name in ("model", "stage.json"):
        assert not (directory / name).exists(), f"a refused stage must leave no {name}"
