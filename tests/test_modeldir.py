"""The Hugging Face directory that stages hand on: every way it can be broken is named; a hand-over
is whole."""

import json

import pytest

from scripts.run import modeldir
from scripts.run.digests import Digests
from scripts.run.errors import InputError
from scripts.run.layout import Run
from tests.support.models import write_safetensors


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def breakage(name):
    """One way to break a directory, by name."""

    def index(model):
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": "model-00002.safetensors"}})
        )

    def pickle(model):
        (model / "model.safetensors").rename(model / "pytorch_model.bin")

    return {
        "no config": lambda m: (m / "config.json").unlink(),
        "broken config": lambda m: (m / "config.json").write_text("{"),
        "other architecture": lambda m: edit(m / "config.json", architectures=["BertModel"]),
        "cut short": lambda m: (m / "model.safetensors").write_bytes(
            (m / "model.safetensors").read_bytes()[:-1]
        ),
        "cut in header": lambda m: (m / "model.safetensors").write_bytes(
            (m / "model.safetensors").read_bytes()[:20]
        ),
        "not safetensors": lambda m: (m / "model.safetensors").write_bytes(
            b"\x08" + bytes(7) + b"notjson!"
        ),
        "missing shard": index,
        "missing layers": lambda m: write_safetensors(
            m / "model.safetensors", ["model.layers.0.mlp.down_proj.weight"]
        ),
        "pickle": pickle,
        "no weights": lambda m: (m / "model.safetensors").unlink(),
        "no tokenizer": lambda m: (m / "tokenizer.json").unlink(),
        "large tokenizer": lambda m: edit(m / "config.json", vocab_size=2),
        "own code": lambda m: edit(m / "config.json", auto_map={"AutoModel": "model.py"}),
        "other vocabulary": lambda m: (
            edit(m / "config.json", vocab_size=5),
            write_safetensors(
                m / "model.safetensors",
                [f"model.layers.{i}.x" for i in (0, 1)] + ["model.embed_tokens.weight"],
            ),
        ),
        "sentencepiece": lambda m: (m / "tokenizer.json").rename(m / "tokenizer.model"),
        "no default template": lambda m: edit(
            m / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "x"}]
        ),
        "no template": lambda m: edit(m / "tokenizer_config.json", chat_template=None),
    }[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no config", ["no config.json"]),
        ("broken config", ["config.json", "not JSON"]),
        ("other architecture", ["BertModel", "ForCausalLM"]),
        ("cut short", ["model.safetensors", "cut short", "copy"]),
        ("cut in header", ["cut short"]),
        ("not safetensors", ["not a safetensors file"]),
        ("missing shard", ["model-00002.safetensors", "missing"]),
        ("missing layers", ["layer 1 ", "1 of 2"]),
        ("pickle", ["pickle", "pytorch_model.bin", "safetensors"]),
        ("no weights", ["no *.safetensors"]),
        ("no tokenizer", ["no tokenizer.json"]),
        ("large tokenizer", ["3 entries", "vocab_size is 2"]),
        ("own code", ["auto_map", "code of its own"]),
        ("other vocabulary", ["vocab_size 5", "has 1 rows"]),
        ("sentencepiece", ["tokenizer.model", "save_pretrained"]),
        ("no default template", ["no chat template"]),
        ("no template", ["chat template"]),
    ],
)
def test_every_breakage_is_named(model, name, words):
    breakage(name)(model)
    said = " ".join(modeldir.problems(model))
    for word in words:
        assert word in said, f"the problem does not name {word!r}: {said}"


@pytest.mark.parametrize("name", ["no config", "other vocabulary"])
def test_a_tokenizer_is_not_held_against_what_is_wrong_itself(model, name):
    breakage(name)(model)
    found = modeldir.problems(model)
    assert len(found) == 1, found


def test_a_unigram_tokenizer_is_whole(model):
    """Its vocabulary is a list of tokens and scores, where that of others is a mapping."""
    edit(model / "tokenizer.json", model={"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]})
    assert modeldir.problems(model) == []
    edit(model / "config.json", vocab_size=2)
    assert "has 3 entries" in modeldir.problems(model)[0]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": None}, ""),
        ({"rope_scaling": None}, ""),
        ({"num_experts": 0}, ""),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"n_routed_experts": 64}, "mixture of experts"),
        ({"model_type": "mixtral"}, "mixture of experts"),  # 8 of them, if it does not say
        ({"hidden_size": None}, "hidden_size missing"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "no multiple"),
        ({"rope_scaling": LLAMA3}, "llama3 without low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn without factor"),
    ],
)
def test_what_cannot_be_trained_is_named(model, changes, words):
    edit(model / "config.json", **changes)
    found = modeldir.untrainable(model / "config.json")
    assert len(found) == bool(words), found
    assert words in "".join(found)


def test_hand_over_completes_verifies_and_renames(model, tmp_path):
    weights = tmp_path / "export"
    weights.mkdir()
    (model / "model.safetensors").rename(weights / "model.safetensors")
    write_safetensors(weights / "adapter_model.safetensors", ["x"])
    result = modeldir.hand_over(weights, model, tmp_path / "out", Digests(Run(tmp_path, "x")))
    out = tmp_path / "out"
    assert not weights.exists(), "the export must move, not stay behind"
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 2], (
        "vLLM must stop at the end of a turn"
    )
    assert result["parameters"] == 2, f"the two parameters were not counted: {result}"
    assert result["digest"].startswith("sha256:"), f"the digest is no SHA-256: {result}"


def test_a_broken_export_is_not_handed_over(model, tmp_path):
    weights = tmp_path / "export"
    weights.mkdir()
    write_safetensors(weights / "model.safetensors", ["model.layers.0.mlp.down_proj.weight"])
    with pytest.raises(InputError, match="layer 1 are missing"):
        modeldir.hand_over(weights, model, tmp_path / "out", Digests(Run(tmp_path, "x")))
    assert not (tmp_path / "out").exists(), "a broken export must not be handed over"
