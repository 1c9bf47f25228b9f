"""torchtune's stock recipes: what their saves leave behind, and the keys that they read."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.job.environment import JobEnvironment
from scripts.launcher.options import with_recipe
from scripts.run import stages
from scripts.run.errors import InputError
from scripts.tools import patches
from scripts.tools.torchtune import find_recipe, is_distributed
from scripts.tools.torchtune_config import device, wrong_keys
from scripts.tools.torchtune_config_keys import DISTRIBUTED, KEYS, SINGLE_DEVICE, STARTS_GROUP
from tests.support.families import write_family
from tests.support.logits import transformers_logits
from tests.support.models import make_model
from tests.support.runs import ROOT

TURN = [
    {"role": "user", "content": "join a path"},
    {"role": "assistant", "content": "os.path.join"},
]
WORSE = [TURN[0], {"role": "assistant", "content": "no"}]
RECIPES = sorted(
    f"{stage}/{path.stem}"
    for stage in ("finetune", "align")
    for path in (ROOT / "configs" / stage).glob("*.yaml")
    if not with_recipe(stages.row(stage), path.stem).tool
)
EACH = [
    pytest.param(name, marks=() if name in ("finetune/full", "align/dpo") else pytest.mark.slow)
    for name in RECIPES
]
# How far a saved model's logits, of which the largest is about 0.7, may be from the live one's.
# NF4 is saved as bfloat16; a model that learned to be rounded is saved as it is before rounding,
# so that its weights alone are compared.
EXACT = dict.fromkeys(RECIPES, 2e-5) | {"finetune/qlora": 5e-3, "finetune/qat": float("inf")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory with a tokenizer of 512 entries, sft.jsonl and preference.jsonl in it."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512}
    directory = make_model(tmp_path_factory.mktemp("tiny"), **sizes)
    rows = {
        "sft.jsonl": {"messages": TURN},
        "preference.jsonl": {"chosen": TURN, "rejected": WORSE},
    }
    for name, row in rows.items():
        (directory / name).write_text((json.dumps(row) + "\n") * 8)
    return directory


@pytest.fixture
def one_rank(monkeypatch):
    """This process as the only rank, with torchtune patched as a stage patches it, and with the
    group that recipes without a form for one process ask for."""
    import torch.distributed as dist

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    patches.torchtune(world=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def tiny_config(name: str, source: Path, tokenizer: Path, output: Path):
    """A recipe of ours as a stage completes it, on a small model: two epochs of two steps."""
    from omegaconf import OmegaConf

    from scripts.tools.torchtune_config import decide

    cfg = OmegaConf.load(ROOT / f"configs/{name}.yaml")
    cfg.output_dir = str(output)
    cfg.batch_size, cfg.epochs, cfg.max_steps_per_epoch = 2, 2, 2
    cfg.gradient_accumulation_steps, cfg.log_peak_memory_stats = 1, False
    cfg.tokenizer |= {"path": str(tokenizer), "max_seq_len": 64}
    kind = "preference" if name.startswith("align") else "sft"
    cfg.dataset |= {"data_files": [str(tokenizer / f"{kind}.jsonl")]}
    where = {"checkpoint_dir": str(source), "output_dir": str(output)}
    where["checkpoint_files"] = ["model.safetensors"]
    for key in ("checkpointer", "ref_checkpointer", "teacher_checkpointer"):
        if key in cfg:
            cfg[key] |= where
    for key in ("model", "teacher_model"):
        if key in cfg:
            cfg[key].model_dir = str(source)
    cfg.optimizer.lr = 0.01  # large, so that a wrong save is far off
    if "lr_scheduler" in cfg:
        cfg.lr_scheduler.num_warmup_steps = 0
    cfg.metric_logger.log_dir = str(output / "metrics")
    decide(cfg, source)
    cfg.device, cfg.dtype = "cpu", "fp32"
    return cfg


def start(cfg):
    """Set a recipe up as a stage does."""
    import torch.distributed as dist

    if is_distributed(cfg.recipe, 1):
        store = dist.HashStore()
        dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    run = find_recipe(cfg.recipe, 1)(cfg=cfg)
    run.setup(cfg=cfg)
    return run


def weights(directory) -> dict:
    """The weights of a Hugging Face directory."""
    from safetensors.torch import load_file

    files = [load_file(path) for path in directory.glob("model*.safetensors")]
    return {k: v for file in files for k, v in file.items()}


@pytest.mark.parametrize("name", EACH)
def test_what_a_recipe_saves_is_the_live_model(tokenizer, tmp_path, one_rank, name):
    """Two epochs, two saves: a save that changes the live base spoils the second."""
    import torch

    source = write_family("qwen2", tmp_path / "source")  # it has biases
    cfg = tiny_config(name, source, tokenizer, tmp_path / "out")
    run = start(cfg)
    run.train()
    folder = tmp_path / "out/epoch_1"
    shutil.copy(source / "config.json", folder)
    ids = list(range(7, 57))
    with torch.no_grad():
        live = run._model.eval()(torch.tensor([ids]))
    live = torch.cat(live, dim=1) if isinstance(live, list) else live
    off = (live[0] - transformers_logits(folder, ids)).abs().max()
    assert off <= EXACT[name], f"the saved model's logits are {off} from the live model's"
    before, after = weights(source), weights(folder)
    assert before.keys() == after.keys()
    if "lora_attn_modules" not in cfg.model:
        state = run._model.state_dict()
        state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
        assert [key for key in after if not after[key].equal(state[key])] == []
    assert max((after[key].float() - before[key]).abs().max() for key in before) > 1e-3
    adapter = folder / "adapter/adapter_config.json"
    assert adapter.exists() == ("lora_attn_modules" in cfg.model)
    if adapter.exists():
        peft = json.loads(adapter.read_text())
        assert peft["use_dora"] == cfg.model.get("use_dora", False)
        assert set(peft["target_modules"]) == set(cfg.model.lora_attn_modules)
    run.cleanup()


@pytest.mark.parametrize("name", ["llama with biases", "gemma", "cohere2", "starcoder2", "glm4"])
def test_a_pass_that_learns_nothing_changes_nothing(tokenizer, tmp_path, one_rank, name):
    """Families that no configuration names: bit for bit, whatever is odd about them."""
    source = write_family(name, tmp_path / "source")
    cfg = tiny_config("finetune/full", source, tokenizer, tmp_path / "out")
    cfg.optimizer |= {"lr": 0.0, "weight_decay": 0.0}
    run = start(cfg)
    run.train()
    before, after = weights(source), weights(tmp_path / "out/epoch_1")
    assert before.keys() == after.keys()
    assert [key for key in before if not after[key].equal(before[key])] == []


@pytest.mark.parametrize("name", EACH)
def test_a_resume_gives_the_same_weights(tokenizer, tmp_path, one_rank, name):
    """Save after step 3 of 4, one step into the second epoch; go on from there in a new recipe."""
    import torch.distributed as dist

    from scripts.tools.torchtune_resume import Resumable

    source = write_family("qwen2 tied", tmp_path / "source")
    cfg = tiny_config(name, source, tokenizer, tmp_path / "checkpoints")
    if "packed" in cfg.dataset:
        cfg.dataset.packed = False  # eight rows would be one
    whole = {}
    for newest in (None, 3):
        environment = JobEnvironment(rank=0, attempt=1)
        rank = SimpleNamespace(directory=tmp_path, number=0, first=True, environment=environment)
        rank.sees_stop, rank.say, rank.attempt_number = (lambda: False), print, 1
        rank.phase = print
        run = start(cfg)
        batches = Resumable(rank, run, every=3)
        batches.resume()
        assert run.global_step == (newest or 0)
        run.train()
        batches.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        saved = weights(tmp_path / "checkpoints/epoch_1")
        whole = whole or saved
    assert [key for key in whole if not saved[key].equal(whole[key])] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_attn_modules": ["q_proj", "wq"]}, r"\['wq'\].*it has \['down_proj', .*'v_proj'\]"),
        ({"lora_rank": 65}, "lora_rank 65: .* is 32 × 64; give 1 to 32|64 × 64; give 1 to 64"),
        ({"apply_lora_to_mlp": True}, "lora_attn_modules"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, changes, words):
    from scripts.components import lora_decoder

    source = write_family("qwen2", tmp_path / "source")
    options = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8}
    with pytest.raises(InputError, match=words):
        lora_decoder(str(source), **{**options, **changes})


def test_adapters_begin_alike_in_every_process(tmp_path):
    """A set of names has another order in each: two runs with one seed would differ."""
    source = write_family("qwen2", tmp_path / "source")
    code = f"""
import torch
from scripts.components import lora_decoder
torch.manual_seed(0)
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = lora_decoder({str(source)!r}, names, 4, 8)
print([round(p.sum().item(), 6) for n, p in model.named_parameters() if "lora_a" in n])
"""
    said = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", code]
        result = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        said.add(result.stdout)
    assert len(said) == 1


def test_widths_that_nf4_cannot_hold_are_refused(tmp_path):
    from scripts.components import lora_decoder

    source = write_family("qwen2", tmp_path / "source", hidden_size=36)
    options = {"lora_attn_modules": ["q_proj"], "lora_rank": 4, "lora_alpha": 8}
    with pytest.raises(InputError, match=r"no multiple of NF4's block of 64.*RECIPE=lora"):
        lora_decoder(str(source), **options, quantize_base=True)


@pytest.mark.parametrize(
    "recipe", sorted(k for k in KEYS if "save_adapter_weights_only" in KEYS[k])
)
def test_distributed_recipes_merge_into_copies_too(one_rank, recipe):
    """On one rank qat_lora_finetune shares its weights with what it saves; on more FSDP gathers."""
    from torchtune.modules import peft

    module = sys.modules[find_recipe(recipe, 2).__module__]
    assert module.get_merged_lora_ckpt is peft.get_merged_lora_ckpt
    assert module.get_merged_lora_ckpt.__module__ == "scripts.tools.patches"


def test_packed_rows_have_masks_that_every_model_takes(monkeypatch):
    """Where there is a GPU torchtune makes masks for its own kernels. Two documents of 2 and 1."""
    import torch
    from torchtune.modules import attention_utils

    monkeypatch.setattr(attention_utils, "_SUPPORTS_FLEX_ATTENTION", True)
    patches.torchtune(world=1)
    mask = attention_utils.packed_block_causal_mask([torch.tensor([2, 1])])
    assert mask.int().tolist() == [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]


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

    cfg = OmegaConf.load(ROOT / "configs/finetune/lora.yaml")
    cfg.output_dir = "x"
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


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    from types import SimpleNamespace

    from scripts.tools.torchtune_config import _teacher

    stage = SimpleNamespace(arguments=["teacher=/no/such"], path=lambda fact: tmp_path)
    with pytest.raises(InputError, match="teacher=/no/such: no such directory"):
        _teacher(stage, {"teacher": None})


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
