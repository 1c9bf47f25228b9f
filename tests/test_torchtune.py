"""torchtune's stock recipes: what their saves leave behind, and the keys that they read."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.job.environment import JobEnvironment
from scripts.run.errors import InputError
from scripts.tools import patches
from scripts.tools.torchtune import device, find_recipe, wrong_keys
from scripts.tools.torchtune_config_keys import DISTRIBUTED, KEYS, SINGLE_DEVICE, STARTS_GROUP
from tests.support.models import make_model
from tests.support.runs import ROOT

TURN = [
    {"role": "user", "content": "join a path"},
    {"role": "assistant", "content": "os.path.join"},
]
WORSE = [TURN[0], {"role": "assistant", "content": "no"}]
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 400}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def born(tmp_path_factory):
    """A tiny model directory with sft.jsonl and preference.jsonl in it."""
    directory = make_model(tmp_path_factory.mktemp("tiny"), **TINY)
    rows = {
        "sft.jsonl": {"messages": TURN},
        "preference.jsonl": {"chosen": TURN, "rejected": WORSE},
    }
    for name, row in rows.items():
        (directory / name).write_text((json.dumps(row) + "\n") * 8)
    return directory


@pytest.fixture
def one_rank(monkeypatch):
    """This process as the only rank, with torchtune patched as a stage patches it."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    patches.torchtune(world=1)


def tiny_config(recipe: str, source, output, **more):
    """The shipped config of a LoRA recipe on the tiny model: two epochs of two steps."""
    from omegaconf import OmegaConf

    stage = "align/debug" if recipe == "lora_dpo" else "finetune/debug-lora"
    cfg = OmegaConf.load(ROOT / f"configs/{stage}.yaml")
    cfg.recipe, cfg.output_dir = recipe, str(output)
    cfg.batch_size, cfg.epochs, cfg.max_steps_per_epoch = 2, 2, 2
    cfg.tokenizer |= {"path": str(source), "max_seq_len": 64}
    data = source / ("preference.jsonl" if recipe == "lora_dpo" else "sft.jsonl")
    cfg.dataset |= {"data_files": [str(data)], "packed": False}
    if recipe == "lora_dpo":
        del cfg.dataset["packed"]
    cfg.model.model_dir = str(source)
    where = {"checkpoint_dir": str(source), "output_dir": str(output)}
    cfg.checkpointer |= {**where, "checkpoint_files": ["model.safetensors"]}
    cfg.optimizer.lr = 0.1  # large, so that a wrong save is far off
    cfg.lr_scheduler.num_warmup_steps = 0
    cfg.metric_logger.log_dir = str(output / "metrics")
    if recipe == "knowledge_distillation":
        cfg.teacher_model = cfg.model
        cfg.teacher_model = {"_component_": "scripts.components.torchtune_model"}
        cfg.teacher_model.model_dir = str(source)
        cfg.teacher_checkpointer = cfg.checkpointer
        cfg.kd_loss = {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}
        cfg.kd_ratio = 0.5
    return cfg


def weights(directory) -> dict:
    """The weights of a Hugging Face directory of the tiny model, under torchtune's names."""
    from safetensors.torch import load_file
    from torchtune.models import convert_weights

    files = [load_file(path) for path in directory.glob("model*.safetensors")]
    sizes = {"num_heads": TINY["num_attention_heads"], "num_kv_heads": 1, "dim": 32}
    return convert_weights.hf_to_tune({k: v for file in files for k, v in file.items()}, **sizes)


@pytest.mark.parametrize("recipe", ["lora_finetune", "lora_dpo", "knowledge_distillation"])
def test_a_lora_save_leaves_the_live_model_alone(born, tmp_path, one_rank, recipe):
    """Two epochs, two saves: the second is base + B·A, and the live base is that of the start."""
    cfg = tiny_config(recipe, born, tmp_path / "out")
    run = find_recipe(recipe, 1)(cfg=cfg)
    run.setup(cfg=cfg)
    run.train()
    base, saved = weights(born), weights(tmp_path / "out/epoch_1")
    live, scale = run._model.state_dict(), cfg.model.lora_alpha / cfg.model.lora_rank
    for name, weight in base.items():
        assert live[name].equal(weight), f"{name} of the live model was changed by a save"
        module = name.removesuffix(".weight")
        if f"{module}.lora_a.weight" in live:
            learned = scale * live[f"{module}.lora_b.weight"] @ live[f"{module}.lora_a.weight"]
            assert learned.abs().max() > 1e-2
            weight = weight + learned
        assert (saved[name] - weight).abs().max() < 1e-6, name
    run.cleanup()


def test_a_resume_after_a_lora_save_gives_the_same_weights(born, tmp_path, one_rank):
    """Save after step 3 of 4, one step into the second epoch; go on from there in a new recipe."""
    from scripts.tools.torchtune_resume import Resumable

    cfg = tiny_config("lora_finetune", born, tmp_path / "checkpoints")
    whole = {}
    for newest in (None, 3):
        environment = JobEnvironment(rank=0, attempt=1)
        rank = SimpleNamespace(directory=tmp_path, number=0, first=True, environment=environment)
        rank.sees_stop, rank.say, rank.attempt_number = (lambda: False), print, 1
        rank.phase = print
        run = find_recipe("lora_finetune", 1)(cfg=cfg)
        run.setup(cfg=cfg)
        batches = Resumable(rank, run, every=3)
        batches.resume()
        assert run.global_step == (newest or 0)
        run.train()
        batches.wait()
        saved = weights(tmp_path / "checkpoints/epoch_1")
        whole = whole or saved
    assert [name for name in whole if not saved[name].equal(whole[name])] == []


@pytest.mark.parametrize(
    "recipe", sorted(k for k in KEYS if "save_adapter_weights_only" in KEYS[k])
)
def test_distributed_recipes_merge_into_copies_too(one_rank, recipe):
    """On one rank qat_lora_finetune shares its weights with what it saves; on more FSDP gathers."""
    from torchtune.modules import peft

    module = sys.modules[find_recipe(recipe, 2).__module__]
    assert module.get_merged_lora_ckpt is peft.get_merged_lora_ckpt
    assert module.get_merged_lora_ckpt.__module__ == "scripts.tools.patches"


# --- the table of keys ---


def keys_in_source(tree: ast.Module) -> set[str]:
    """Keys of `cfg` that a recipe reads: cfg.key, cfg["key"], cfg.get("key", …)."""
    found = set()
    for node in ast.walk(tree):
        inner = getattr(node, "func", node)  # a call's callee
        of_cfg = isinstance(getattr(inner, "value", None), ast.Name) and inner.value.id == "cfg"
        if isinstance(node, ast.Call) and of_cfg and getattr(inner, "attr", "") == "get":
            key = node.args[0]
            found.add(
                key.value if isinstance(key, ast.Constant) else {"PROFILER_KEY": "profiler"}[key.id]
            )
        elif isinstance(node, ast.Subscript) and of_cfg:
            found.add(ast.literal_eval(node.slice))
        elif isinstance(node, ast.Attribute) and of_cfg and node.attr != "get":
            found.add(node.attr)
    return found


def test_the_table_of_keys_is_what_the_pinned_recipes_read():
    import torchtune

    read, starts, variants = {}, set(), {"single_device": set(), "distributed": set()}
    for variant, names in variants.items():
        for path in (Path(torchtune.__file__).parent.parent / "recipes").glob(f"*_{variant}.py"):
            name = path.stem.removesuffix(f"_{variant}")
            tree = ast.parse(path.read_text())
            names.add(name)
            read.setdefault(name, set()).update(keys_in_source(tree))
            classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
            starts |= {name} if "init_process_group(" in ast.unparse(classes) else set()
    assert read == KEYS
    assert variants == {"single_device": SINGLE_DEVICE, "distributed": DISTRIBUTED}
    assert starts == STARTS_GROUP


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("batchsize", 4, "did you mean batch_size"),
        ("epochs", "two", "epochs = 'two'"),
        ("kd_ratio", 0.5, "unknown key kd_ratio"),  # another recipe's
        ("optimizer.learning_rate", 1.0, "optimizer.learning_rate"),
        ("loss._component_", "torchtune.no_such.Loss", "loss._component_"),
    ],
)
def test_a_wrong_key_is_refused_by_name(tmp_path, key, value, words):
    from omegaconf import OmegaConf

    cfg = tiny_config("lora_finetune", tmp_path, tmp_path)
    assert wrong_keys(cfg) == []
    OmegaConf.update(cfg, key, value, force_add=True)
    problems = wrong_keys(cfg)
    assert len(problems) == 1
    assert words in problems[0]


@pytest.mark.parametrize(
    ("name", "world"), [("full_finetun", 1), ("ppo_full_finetune", 2), (None, 1)]
)
def test_a_recipe_that_torchtune_lacks_is_refused_by_name(name, world):
    with pytest.raises(InputError, match=f"recipe: {name}: .*full_finetune"):
        find_recipe(name, world)


@pytest.mark.parametrize(
    ("config", "arguments", "wanted"),
    [
        ("model: x\ndevice: cpu\n", [], "cpu"),
        ("device: 'cuda'  # one\n", ["device=cpu"], "cpu"),
        ("device: cpu\n", ["device=cpu", "device=cuda"], "cuda"),
        ("optimizer:\n  device: cpu\n", [], ""),
    ],
)
def test_a_config_for_the_cpu_is_known_before_torchtune_is_imported(config, arguments, wanted):
    """On a machine with a GPU torchtune chooses kernels that the CPU has not, when imported."""
    assert device(config, arguments) == wanted


def test_components_are_light():
    """torchtune looks them up by name in every check of a config."""
    heavy = "{'torch', 'torchtune', 'transformers'} & set(sys.modules)"
    command = [
        sys.executable,
        "-c",
        f"import sys, scripts.components; sys.exit(str({heavy} or ''))",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.strip() == ""
