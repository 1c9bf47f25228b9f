"""GRPO by TRL in the stage align: rewards as plain functions, resume, and what it refuses."""

import json
import sys
from types import SimpleNamespace

import pytest

from scripts.run.errors import InputError
from tests.support.kills import Attempt, end_by, options, unbroken
from tests.support.launching import make
from tests.support.runs import ROOT, finished, stage_dir

RECIPE = ROOT / "configs/align/grpo.yaml"
ROW = {"prompt": [{"role": "user", "content": "join a path"}], "answer": "Join it."}


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A folder with rewards.py, which a test writes; forgotten afterwards."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write(text):
        (tmp_path / "rewards.py").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def good(completions, **_):\n    return [1 / 0]", r"rewards.good: ZeroDiv.*line 2"),
        ("def good(completions, **_):\n    return [1, 2]", "returned 2 numbers for 1 answers"),
        ("def good(completions, **_):\n    return ['much']", "rewards.good: ValueError"),
        ("def god(completions, **_):\n    return [1]", "rewards.good: no such function.*god"),
        ("def good(:", "rewards.good: SyntaxError"),
        ("import nothing_of_this_name", "rewards.good: ModuleNotFoundError"),
        (
            "def good(completions, log_metric, **_):\n    log_metric('a', 1)\n    return [1, None]",
            "2",
        ),
        ("def good(completions):\n    return [1]", "rewards.good: TypeError"),
    ],
)
def test_bad_code_in_a_reward_names_itself(rewards, text, words):
    from scripts.tools.trl_grpo import Reward

    folder = rewards(text)
    with pytest.raises(InputError, match=words):
        Reward("rewards.good", folder).check(ROW)


def test_the_rewards_of_the_recipe():
    from scripts.tools.trl_grpo import Reward

    said = ["Join it.", "join", "Join it. " * 9]
    given = {
        "prompts": [ROW["prompt"]] * 3,
        "completions": [[{"role": "assistant", "content": text}] for text in said],
        "completion_ids": [[1] * 3, [1] * 96, [1] * 200],
        "answer": [ROW["answer"]] * 3,
    }
    names = ("exact_match", "sentence", "short")
    found = {name: Reward(f"grpo.{name}", ROOT / "configs/align")(**given) for name in names}
    assert found == {"exact_match": [1, 0, 0], "sentence": [1, 0, 1], "short": [1, 0.5, 0]}


@pytest.mark.parametrize("named", ["config", "--reward_funcs", "--reward-funcs"])
def test_a_reward_is_tried_before_trl_is_imported(rewards, named):
    from scripts.tools.trl_grpo import try_rewards

    folder = rewards("def good(completions, **_):\n    return [1 / 0]")
    (folder / "sft").mkdir()
    chat = {"messages": [*ROW["prompt"], {"role": "assistant", "content": "Join it."}]}
    (folder / "sft/part-0.jsonl").write_text(json.dumps(chat) + "\n")
    config, good = folder / "config.yaml", ["trl.rewards.think_format_reward", "rewards.good"]
    config.write_text(f"reward_funcs: {json.dumps(good if named == 'config' else ['no.such'])}\n")
    arguments = [] if named == "config" else ["--beta", "1", named, *good]
    rank = SimpleNamespace(config=config, arguments=arguments, directory=folder)
    with pytest.raises(InputError, match=r"rewards.good: ZeroDivisionError"):
        try_rewards(rank, folder)


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ("num_generation: 4", [], "unknown key num_generation; .*num_generations"),
        ("", ["--learning-rat", "1"], "ARGS: unknown key learning_rat; .*learning_rate"),
        ("", ["--learning_rate", "much"], "TRL refuses ARGS"),
        ("", ["--use_peft", "True"], "use_peft: this stage does not read it"),
        ("push_to_hub: true", [], "push_to_hub: this stage does not read it"),
        ("per_device_train_batch_size: 3\ngradient_accumulation_steps: 1", [], "TRL refuses .*8"),
    ],
)
def test_what_trl_does_not_know_is_refused(tmp_path, config, arguments, words):
    from scripts.tools.trl_grpo import load_config

    file = tmp_path / "config.yaml"
    file.write_text(f"reward_funcs: [grpo.short]\n{config}\n")
    rank = SimpleNamespace(config=file, arguments=arguments, directory=tmp_path, log="its log")
    with pytest.raises(InputError, match=words):
        load_config(rank)


@pytest.mark.parametrize(("arguments", "weights"), [([], None), (["--reward_weights", "2"], [2.0])])
def test_a_reward_named_alone_has_not_the_weights_of_the_recipe(tmp_path, arguments, weights):
    from scripts.tools.trl_grpo import load_config

    arguments = ["--reward_funcs", "grpo.short", *arguments]
    rank = SimpleNamespace(config=RECIPE, arguments=arguments, directory=tmp_path, log="its log")
    assert load_config(rank)[1].reward_weights == weights


def test_weights_must_be_as_many_as_rewards(tmp_path):
    from scripts.tools.trl_grpo import load_config

    arguments = ["--reward_funcs", "grpo.short", "--reward_weights", "1", "2"]
    rank = SimpleNamespace(config=RECIPE, arguments=arguments, directory=tmp_path, log="its log")
    with pytest.raises(InputError, match="2 of them, for 1 reward_funcs"):
        load_config(rank)


def test_torn_and_damaged_checkpoints(tmp_path):
    from scripts.run.files import write_json
    from scripts.tools.trl_checkpoints import newest

    said: list[str] = []
    rank = SimpleNamespace(directory=tmp_path, first=True, attempt_number=2, say=said.append)
    assert newest(rank) is None
    assert said == ["nothing had been saved yet: starts at step 0"]
    for step in (9, 12, 15):
        folder = tmp_path / f"checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")
        if step != 15:
            write_json(folder / "whole.json", {"model.safetensors": 7})
    (tmp_path / "checkpoints/checkpoint-12/model.safetensors").write_text("wei")
    assert newest(rank) == str(tmp_path / "checkpoints/checkpoint-9")
    assert [one.split(":")[0] for one in said[1:]] == [
        "checkpoint-15 was cut short while it was saved",
        "checkpoint-12 is damaged",
        "goes on from its checkpoint of step 9",
    ]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "checkpoint-9",
        "damaged-12",
    ]
    (tmp_path / "checkpoints/checkpoint-9/model.safetensors").unlink()
    with pytest.raises(InputError, match="not as they were saved"):
        newest(rank)


# --- the stage itself

SHORT = (
    "--num_generations 4 --per_device_train_batch_size 4 --max_completion_length 12"
    " --max_steps 12 --save_steps 3 --learning_rate 1e-3 --warmup_steps 0"
)


def asked(run, arguments=SHORT, gpus=1):
    return options(run, "align", gpus) | {"RECIPE": "grpo", "ARGS": arguments}


def digest(run):
    return finished(stage_dir(run, "align"))["outputs"]["model"]["digest"]


def saved(directory):
    found = (directory / "checkpoints").glob("checkpoint-*/whole.json")
    return [int(path.parent.name.partition("-")[2]) for path in found]


def attempt_until_saved(**settings):
    """Start an attempt; wait until it has saved beyond what it began with."""
    directory = stage_dir(settings["RUN"], "align")
    had = max(saved(directory), default=0)
    attempt = Attempt("align", **settings)
    attempt.until(lambda: max(saved(directory), default=0) > had, every=0.005)
    return attempt, attempt.watched()


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_it_goes_on_to_the_same_weights(folder, gpus):
    """Killed, stopped, and then left alone; with rewards from
    the run's own copy of grpo.py."""
    whole, broken = f"grpo-whole-{gpus}", f"grpo-broken-{gpus}"
    make("align", **asked(whole, gpus=gpus))
    assert "reward" in make("status", RUN=whole).stdout
    for way in ("kill -9 of a rank", "SIGTERM to the stage"):
        attempt, found = attempt_until_saved(**asked(broken, gpus=gpus))
        end_by(way, attempt, found)
    done = make("align", **asked(broken, gpus=gpus))
    assert "goes on from its checkpoint of step" in done.stdout
    assert digest(broken) == digest(whole)
    assert digest(whole) != finished(unbroken("finetune"))["outputs"]["model"]["digest"]
    code = [
        (folder / "grpo.py").read_text()
        for folder in (stage_dir(whole, "align"), ROOT / "configs/align")
    ]
    assert code[0] == code[1]


@pytest.mark.slow
def test_equal_rewards_teach_nothing(folder):
    """Three times 0.1 is not 0.3 to a computer; of the difference Adam would make full steps."""
    from safetensors.torch import load_file

    source = unbroken("finetune") / "model"
    arguments = SHORT.replace("4", "3").replace("12", "2") + " --reward_funcs grpo.short"
    said = make("align", **asked("grpo-equal", arguments + " --reward_weights 0.1")).stdout
    assert "2 of 2 steps taught nothing" in said
    assert said.count("align 2/2") == 1, f"the last step is told once:\n{said}"
    files = [
        next(path.glob("model*.safetensors"))
        for path in (source, stage_dir("grpo-equal", "align") / "model")
    ]
    one, other = (load_file(file) for file in files)
    assert [name for name in one if not one[name].equal(other[name])] == []
