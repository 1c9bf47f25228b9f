"""Every named model, and every recipe over it, as far as that needs no GPU and no weights."""

import json

import pytest

from scripts.launcher import models
from scripts.launcher.options import MODELS, settings, with_recipe
from scripts.run import modeldir, stages
from tests.support.runs import ROOT

NAMED = sorted(path.parent.name for path in MODELS.glob("*/model.json"))
EVERY = sorted(path.name for path in MODELS.iterdir() if path.is_dir())


def read(name: str, file: str) -> dict:
    return json.loads((MODELS / name / file).read_text())


@pytest.mark.parametrize("name", NAMED)
def test_the_architecture_has_the_parameters_that_are_published(name):
    """Built without memory: a wrong width, depth or tie is another number."""
    from scripts.tools.decoder import PROVEN, count

    config, said = read(name, "config.json"), read(name, "model.json")
    assert count(MODELS / name) == said["parameters"]
    assert config["model_type"] in PROVEN
    assert config["max_position_embeddings"] == said["context"]
    assert modeldir.untrainable(MODELS / name / "config.json") == []
    assert set(said) == {
        "hub",
        "revision",
        "licence",
        "gated",
        "parameters",
        "context",
        "source",
    }


@pytest.mark.parametrize("name", NAMED)
def test_names_map_one_to_one(name):
    """What torchtitan's adapter writes is what transformers calls its weights, and back."""
    import torch

    from scripts.tools import patches

    patches.torchtitan_on_cpu()
    from scripts.tools.decoder import from_config, read_config, tied
    from scripts.tools.torchtitan_model import train_spec

    config = read_config(MODELS / name)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    spec = train_spec("decoder", "x", MODELS / name)
    adapter = spec.state_dict_adapter(spec.model_args["x"], None)
    with torch.device("meta"):
        theirs = from_config(config, torch.float32).state_dict()
    ours = {f"hf.{key}": value for key, value in theirs.items()}
    written = adapter.to_hf(ours)
    assert set(theirs) - set(written) == ({"lm_head.weight"} if tied(config) else set())
    assert adapter.from_hf(written).keys() == ours.keys()


@pytest.mark.parametrize("name", EVERY)
def test_what_a_model_sets_is_read_by_the_tool_of_its_stage(name):
    """In every recipe of the stage: an unknown key or a wrong type would stop a user's run."""
    from omegaconf import OmegaConf

    from scripts.tools import patches
    from scripts.tools.torchtune_config import wrong_keys

    patches.torchtitan_on_cpu()
    from torchtitan.config import ConfigManager

    files = {path.name.split(".")[0] for path in (MODELS / name).glob("*.args")}
    assert files <= set(stages.names()), "a file of settings for no stage"
    for row in (stages.row(stage) for stage in ("finetune", "align")):
        for path in (ROOT / "configs" / row.name).glob("*.yaml"):
            if with_recipe(row, path.stem).tool:
                continue
            cfg = OmegaConf.merge(
                OmegaConf.load(path), OmegaConf.from_dotlist(settings(name, row.name))
            )
            cfg.output_dir = "x"
            assert wrong_keys(cfg) == [], path
    for path in (ROOT / "configs/pretrain").glob("*.toml"):
        words = ["--job.config_file", str(path), *settings(name, "pretrain")]
        ConfigManager().parse_args(words)


def test_a_config_without_its_sizes_is_named(tmp_path):
    from scripts.run.errors import InputError
    from scripts.tools.decoder import sizes

    file = tmp_path / "config.json"
    file.write_text('{"vocab_size": 7, "max_position_embeddings": 9}')
    assert sizes(file) == (7, 9)
    file.write_text('{"vocab_size": null}')
    with pytest.raises(InputError) as refused:
        sizes(file)
    assert [said.split(": ")[1].split()[0] for said in refused.value.problems] == [
        "vocab_size",
        "max_position_embeddings",
    ]


def test_a_recipe_names_no_model_and_a_model_no_recipe():
    """Models × recipes is a sum: adding either touches one folder."""
    recipes = [p for row in stages.TABLE for p in (ROOT / "configs" / row.name).glob("*.*")]
    texts = {path: path.read_text() for path in recipes}
    named = [(p, name) for p, text in texts.items() for name in NAMED if name in text]
    assert named == []
    odd = {"lora", "qlora", "dora", "qat", "distillation", "full_dpo", "grpo"}
    texts = {path: path.read_text() for path in MODELS.glob("*/*") if path.is_file()}
    named = [(p, word) for p, text in texts.items() for word in odd if word in text.lower()]
    assert named == []


def test_the_documentation_has_the_table_that_make_models_prints():
    text = (ROOT / "docs/models.md").read_text()
    assert "\n".join(models.table()) in text, "python3 -m scripts.launch models prints it anew"


def test_the_documentation_names_every_family_and_recipe():
    from scripts.tools.decoder import PROVEN

    text = (ROOT / "docs/models.md").read_text()
    names = {
        p.stem
        for row in stages.TABLE
        if row.recipe
        for p in (ROOT / "configs" / row.name).glob("*.*")
    }
    assert [name for name in PROVEN | names if name not in text] == []
