"""Small model directories."""

import json
import struct
from pathlib import Path

from scripts.corpus.tokenizer import train_tokenizer
from tests.support.runs import ROOT

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4,
    "hidden_size": 4,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
}
TOKENIZER = {
    "model": {"vocab": {"a": 0, "b": 1}},
    "added_tokens": [{"id": 2, "content": "<|end_of_turn|>"}],
}
TOKENIZER_CONFIG = {"eos_token": "b", "bos_token": "a", "chat_template": "{{ messages }}"}


def write_safetensors(path: Path, names: list[str]) -> None:
    """Write a safetensors file of one float32 zero per name."""
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i, name in enumerate(names)
    }
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4 * len(names)))


def write_model(directory: Path) -> Path:
    """Write a directory that passes every check of its form, with next to nothing inside."""
    directory.mkdir()
    files = {
        "config.json": CONFIG,
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    layers = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    write_safetensors(directory / "model.safetensors", layers)
    return directory


def write_sets(directory: Path) -> Path:
    """Write a directory that passes for a data stage's sets, with nothing inside."""
    directory.mkdir()
    rows = {"text": 100, "sft": 100, "preference": 100}
    (directory / "data.json").write_text(json.dumps({"rows": rows}))
    return directory


def make_model(directory, **changes):
    """Write a Hugging Face directory of the debug architecture, with changes, and random
    weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**json.loads((ROOT / "configs/models/debug/config.json").read_text()), **changes}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(directory)
    (directory / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"]})
    )
    texts = [
        (ROOT / "scripts" / name).read_text()
        for name in ("corpus/derive.py", "corpus/lines.py", "job/stage.py")
    ]
    train_tokenizer(texts, config["vocab_size"], config["max_position_embeddings"], directory)
    return directory
