"""The line itself, with the real tools: the demo, what it learned, what it serves, two processes, the user's own data."""

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
from pathlib import Path

import pytest
from conftest import ROOT, make
from seam import assert_same_logits, transformers_logits
from stats import loss_curve, mcnemar_p, mean_and_error, metric, paired_t, samples

from scripts.run import digests, layout
from scripts.tools.chat_tokenizer import ChatTokenizer

pytestmark = pytest.mark.slow


def tree_memory(root: int) -> int:
    """Resident bytes of a process and all below it (proportional share of shared pages)."""
    parents, total = {}, 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
        except OSError:
            continue
    for pid in parents:
        ancestor = pid
        while ancestor not in (0, root):
            ancestor = parents.get(ancestor, 0)
        if ancestor == root:
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(re.search(r"^Pss:\s+(\d+)", rollup, re.M).group(1)) * 1024
            except (OSError, AttributeError):
                continue
    return total


@pytest.fixture(scope="session")
def demo(folder):
    """`make demo`, watched."""
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(2):
            peak[0] = max(peak[0], tree_memory(os.getpid()))

    threading.Thread(target=watch, daemon=True).start()
    began, idle = time.time(), tree_memory(os.getpid())
    result = make("demo", PORT="8017")
    done.set()
    print(f"\ndemo: {time.time() - began:.0f} s, peak {(peak[0] - idle) / 1e9:.2f} GB\n{result.stdout}")
    yield {"out": result.stdout, "seconds": time.time() - began, "peak": peak[0] - idle, "runs": folder, "run": folder / "demo"}
    subprocess.run(["make", "-s", "undeploy", "RUN=demo"], cwd=ROOT, check=False)


def test_the_demo_ends_with_the_table_and_an_answer(demo):
    rows = dict(re.findall(r"^(\w+)  +(done|serving)", demo["out"], re.M))
    assert rows == {**dict.fromkeys(("data", "pretrain", "finetune", "align", "evaluate"), "done"), "deploy": "serving"}
    assert re.search(r"answered \S.+", demo["out"])
    assert demo["peak"] < 6e9


def test_the_same_command_again_does_nothing_twice(demo):
    before = [digests.digest_tree(demo["run"] / s / "model") for s in layout.TRAINED]
    began = time.time()
    again = make("demo", PORT="8017")
    assert time.time() - began < 20
    assert again.stdout.count("done already") == 5
    assert "serving already" in again.stdout
    assert before == [digests.digest_tree(demo["run"] / s / "model") for s in layout.TRAINED]


def test_lineage_walks_from_the_served_model_to_the_corpus(demo):
    out = make("lineage", RUN="demo").stdout
    for stage in ("deploy", "align", "finetune", "pretrain", "data", "corpus sha256:"):
        assert stage in out
    for stage in layout.TRAINED:
        record = layout.record(demo["run"] / stage)
        assert record["outputs"]["model"]["digest"] == digests.digest_tree(demo["run"] / stage / "model")
        assert record["inputs"]["data"]["digest"] == digests.digest_tree(demo["run"] / "data" / "sets")


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
    call = urllib.request.Request(f"http://127.0.0.1:{server['port']}{path}", data, headers, method=method)
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
    assert status == 200
    served = [next(iter(step.values()))["logprob"] for step in answer["choices"][0]["prompt_logprobs"][1:]]
    reference = transformers_logits(directory, ids).log_softmax(-1)
    differences = [abs(s - reference[i, ids[i + 1]].item()) for i, s in enumerate(served)]
    print(f"vLLM prompt log-probabilities differ by at most {max(differences):.2e}")
    assert max(differences) < 1e-4


CHAT = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "What does\n<b> io & {{ x }} do? ünïcödé"}]


def test_vllm_renders_the_template_byte_for_byte(demo):
    tokenizer = ChatTokenizer(str(demo["run"] / "align/model"))
    body = {"model": "demo", "messages": CHAT, "max_tokens": 1, "return_token_ids": True}
    status, answer = request(demo, "/v1/chat/completions", body)
    assert status == 200
    text = tokenizer.render(CHAT, add_generation_prompt=True)
    assert tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False) == text
    assert answer["prompt_token_ids"] == tokenizer.encode(text)


def test_lm_eval_renders_the_template_byte_for_byte(demo):
    tokenizer = ChatTokenizer(str(demo["run"] / "align/model"))
    for row in samples(demo["run"] / "evaluate", "relay_choice")[:50]:
        asked = tokenizer.render([{"role": "user", "content": row["doc"]["question"]}], add_generation_prompt=True)
        assert row["arguments"]["gen_args_0"]["arg_0"] == asked
        assert row["arguments"]["gen_args_0"]["arg_1"] == row["doc"]["choices"][0]


def test_an_answer_ends_by_itself(demo):
    question = samples(demo["run"] / "evaluate", "relay_choice")[0]["doc"]["question"]
    body = {"model": "demo", "messages": [{"role": "user", "content": question}], "max_tokens": 200}
    _, answer = request(demo, "/v1/chat/completions", body)
    assert answer["choices"][0]["finish_reason"] == "stop", "generation_config.json must name the end of a turn"


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
    assert request(demo, path, key=key)[0] == status


def test_chat_streams_one_answer(demo):
    out = make("chat", RUN="demo", PROMPT="What does 'io' do?").stdout
    assert out.strip()


def test_the_gate_refuses_a_model_that_was_not_judged(demo):
    words = ["make", "-s", "deploy", "RUN=demo", f"FROM={demo['run'] / 'pretrain/model'}", "PORT=8018"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "not for" in result.stderr
    assert "make clean RUN=demo STAGE=evaluate" in result.stderr


def test_a_wrong_argument_of_vllm_is_refused(demo):
    words = ["make", "-s", "deploy", "RUN=wrong", f"FROM={demo['run'] / 'align/model'}", "FORCE=1", "PORT=8021"]
    result = subprocess.run([*words, "ARGS=--no-such-option 1"], cwd=ROOT, capture_output=True, text=True)
    assert "Error 64" in result.stderr
    assert "--no-such-option" in result.stderr
    assert "vLLM refuses" in result.stderr


# --- it learned something ---


@pytest.fixture(scope="session")
def scores(demo):
    """Evaluations of the model after each stage on the demo's held-out sets; the untrained one needs none."""
    data = str(demo["run"] / "data")
    tasks = "relay_text,relay_choice,relay_choice_shuffled,relay_preference"
    for stage in ("pretrain", "finetune"):
        make("evaluate", RUN=f"after-{stage}", FROM=str(demo["run"] / stage / "model"), DATA=data, ARGS=f"--tasks {tasks}")
    where = {"pretrain": "after-pretrain", "finetune": "after-finetune", "align": "demo"}
    found = {}
    for stage, run in where.items():
        evaluation = demo["runs"] / run / "evaluate"
        found[stage] = {
            "bits": json.loads((evaluation / "verdict.json").read_text())["scores"]["relay_text/bits_per_byte"],
            "choice": metric(evaluation, "relay_choice", "acc_mutual_info"),
            "plain": metric(evaluation, "relay_choice", "acc"),
            "shuffled": metric(evaluation, "relay_choice_shuffled", "acc_mutual_info") if stage != "align" else [0, 1],
            "margin": metric(evaluation, "relay_preference", "margin"),
        }
        values = found[stage]
        print(
            stage, values["bits"], *(f"{name} {mean_and_error(values[name])}" for name in ("choice", "plain", "shuffled", "margin"))
        )
    return found


def test_pretraining_learned_to_predict_held_out_text(scores):
    untrained = 3.99  # bits per byte at random weights, three seeds 3.98 to 4.01 (docs/demo.md)
    assert scores["pretrain"]["bits"] <= 2.2
    assert scores["pretrain"]["bits"] <= 0.65 * untrained


def test_finetuning_learned_to_answer(scores):
    choice, error = mean_and_error(scores["finetune"]["choice"])
    assert len(scores["finetune"]["choice"]) >= 500
    assert choice >= 0.25 + 3 * error
    assert mcnemar_p(scores["pretrain"]["choice"], scores["finetune"]["choice"]) < 0.01
    shuffled, error = mean_and_error(scores["finetune"]["shuffled"])
    assert abs(shuffled - 0.25) <= 2 * error, "the answers alone must not give the right one away"


def test_alignment_moved_preferences_and_kept_the_rest(scores):
    assert len(scores["align"]["margin"]) >= 500
    assert paired_t(scores["finetune"]["margin"], scores["align"]["margin"]) > 3
    before, error = mean_and_error(scores["finetune"]["choice"])
    assert mean_and_error(scores["align"]["choice"])[0] >= before - error
    assert scores["align"]["bits"] <= 1.05 * scores["finetune"]["bits"]


# --- two processes, own data ---


def test_two_processes_learn_the_same(demo, scores):
    """Half the batch on each of two processes is the same batch: FSDP must agree with one process."""
    data = str(demo["run"] / "data")
    make("pretrain", RUN="two", GPUS="2", DATA=data, ARGS="--training.local_batch_size 2")
    make("finetune", RUN="two", GPUS="2", DATA=data, ARGS="batch_size=2")
    make("evaluate", RUN="two", DATA=data)
    evaluation = demo["runs"] / "two/evaluate"
    bits = json.loads((evaluation / "verdict.json").read_text())["scores"]["relay_text/bits_per_byte"]
    choice, error = mean_and_error(metric(evaluation, "relay_choice", "acc_mutual_info"))
    one, one_error = mean_and_error(scores["finetune"]["choice"])
    print(f"two processes: {bits:.3f} bits, choice {choice:.3f}; one: {scores['finetune']['bits']:.3f}, {one:.3f}")
    assert abs(bits - scores["finetune"]["bits"]) < 0.08 * scores["finetune"]["bits"]
    assert abs(choice - one) <= 3 * (error**2 + one_error**2) ** 0.5


def test_a_users_own_text_goes_through_the_line(folder, tmp_path):
    """A megabyte of English: the descriptions of the packages installed here."""
    prose = [
        p.read_text(errors="replace").split("\n\n", 1)[-1]
        for p in sorted(Path(sys.prefix).glob("lib/python3*/site-packages/*/METADATA"))
    ]
    (tmp_path / "my book.txt").write_text("\n\n".join(prose)[:1_000_000])
    out = make("pipeline", RUN="book", DATA=str(tmp_path / "my book.txt"), PORT="8019").stdout
    make("undeploy", RUN="book")
    assert "serving" in out
    assert re.search(r"answered \S", out)


def test_a_users_own_conversations_go_through_the_line(folder, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} times {b}?"},
                {"role": "assistant", "content": f"{a} times {b} is exactly {a * b}."},
            ]
        }
        for a in range(2, 62)
        for b in range(2, 52)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps = {
        "PRETRAIN_ARGS": "--training.steps 150",
        "FINETUNE_ARGS": "max_steps_per_epoch=40",
        "ALIGN_ARGS": "max_steps_per_epoch=20",
    }
    out = make("pipeline", RUN="chats", DATA=str(tmp_path / "chats.jsonl"), PORT="8020", FORCE="1", **steps).stdout
    make("undeploy", RUN="chats")
    assert re.search(r"answered \S", out)


def test_pretraining_goes_on_from_a_model(demo):
    """FROM= in pretrain: the first loss is the model's, not a random one's (8.1). Started by what its dry run prints."""
    arguments = "--training.steps 3 --metrics.log_freq 1 --lr_scheduler.warmup_steps 1"
    options = {"RUN": "on", "FROM": str(demo["run"] / "pretrain/model"), "DATA": str(demo["run"] / "data"), "ARGS": arguments}
    subprocess.run(["bash", "-e"], input=make("pretrain", **options, DRY_RUN="1").stdout, cwd=ROOT, text=True, check=True)
    assert "done already" in make("pretrain", **options).stdout, "make would have written the same"
    assert loss_curve(demo["runs"] / "on/pretrain/metrics")[0][1] < 5.5


def test_lora_finetuning_hands_on_a_merged_model(demo):
    """The same stage with another config; no adapter files are handed on."""
    source, data = str(demo["run"] / "pretrain/model"), str(demo["run"] / "data")
    make("finetune", RUN="lora", MODEL="debug-lora", FROM=source, DATA=data, ARGS="epochs=1 max_steps_per_epoch=10")
    names = {p.name for p in (demo["runs"] / "lora/finetune/model").iterdir()}
    assert not [n for n in names if n.startswith("adapter")]
    assert_same_logits(demo["runs"] / "lora/finetune/model", list(range(5, 100)))


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
            "[training]\nlocal_batch_size = 100000\nseq_len = 256\n[checkpoint]\nenable = true\nlast_save_model_only = false",
            ["less than one batch"],
        ),
        ("finetune", None, ["batchsize", "did you mean batch_size", "epochs", "optimizer.learning_rate"]),
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
            .replace("batch_size: 4", "batchsize: 4\nbatch_size: 4")
            .replace("epochs: 2", "epochs: two")
        )
        config = config.replace("  lr: ", "  learning_rate: 1\n  lr: ")
    for name in ("stage.env", "args.json", "architecture.json", "floors.json"):
        if (source / name).exists():
            (directory / name).write_text((source / name).read_text())
    (directory / f"config.{'toml' if stage == 'pretrain' else 'yaml'}").write_text(config)
    result = subprocess.run([sys.executable, "-m", f"scripts.{stage}", str(directory)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 64, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert not (directory / "model").exists()
    assert not (directory / "stage.json").exists()
