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
        "other architecture": lambda m: edit(m / "config.json", architectures=["MambaForCausalLM"]),
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
        "no template": lambda m: edit(m / "tokenizer_config.json", chat_template=None),
    }[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no config", ["no config.json"]),
        ("broken config", ["config.json", "not JSON"]),
        ("other architecture", ["MambaForCausalLM", "LlamaForCausalLM"]),
        ("cut short", ["model.safetensors", "cut short", "copy"]),
        ("cut in header", ["cut short"]),
        ("not safetensors", ["not a safetensors file"]),
        ("missing shard", ["model-00002.safetensors", "missing"]),
        ("missing layers", ["model.layers.1", "1 of 2"]),
        ("pickle", ["pickle", "pytorch_model.bin", "safetensors"]),
        ("no weights", ["no *.safetensors"]),
        ("no tokenizer", ["no tokenizer.json"]),
        ("large tokenizer", ["3 entries", "vocab_size is 2"]),
        ("no template", ["chat template"]),
    ],
)
def test_every_breakage_is_named(model, name, words):
    breakage(name)(model)
    said = " ".join(modeldir.problems(model))
    for word in words:
        assert word in said, f"the problem does not name {word!r}: {said}"


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
    with pytest.raises(InputError, match=r"model.layers.1"):
        modeldir.hand_over(weights, model, tmp_path / "out", Digests(Run(tmp_path, "x")))
    assert not (tmp_path / "out").exists(), "a broken export must not be handed over"
