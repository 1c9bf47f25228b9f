"""A dense decoder of transformers, from a directory's config.json: what both trainers build.

What cannot be trained here exactly is refused by name: a silently different RoPE or mask trains
for hours and serves nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.job.rank import Rank
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.run.modeldir import untrainable

# Families whose logits were held against transformers' in every tool: tests/test_seam.py.
PROVEN = {
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
}
KINDS = {"full_attention", "sliding_attention"}  # of layers, that masks are made for


def read_config(directory: Path):
    """Read config.json as transformers does. Raises InputError with all that keeps the model from
    being trained here."""
    from transformers import AutoConfig

    file = directory / "config.json"
    found = untrainable(file)
    if found:
        raise InputError(found)
    try:
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:  # each family validates in its own way
        raise InputError(f"{file}: {error}") from None
    other = set(getattr(config, "layer_types", None) or KINDS) - KINDS
    if other:
        raise InputError(
            f"{file}: layers of kind {', '.join(sorted(other))}: cannot be masked here"
        )
    return config


def from_config(config: Any, dtype: Any):
    """Build the model on the device and with the initialisation of the context. Raises InputError
    for one that is not made of model.layers."""
    from transformers import AutoModelForCausalLM

    options = attention(config.to_dict())
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        model.get_decoder().layers, model.get_decoder().embed_tokens
    except (AttributeError, ValueError) as error:
        raise InputError(f"config.json: {config.model_type}: {error}") from None
    return model


def attention(config: Mapping[str, Any]) -> dict[str, str]:
    """Return how transformers is to compute attention, where its own choice would be wrong: for
    Gemma 2 version 5 takes sdpa, which leaves the cap on the scores out."""
    return {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}


def tied(config: Any) -> bool:
    """Tell whether the output is the embedding; config.json may leave it to the family."""
    return bool(getattr(config, "tie_word_embeddings", False))


def count(directory: Path) -> int:
    """Count the parameters of a directory's architecture, without memory for them."""
    import torch

    with torch.device("meta"):
        model = from_config(read_config(directory), torch.float32)
    return sum(p.numel() for p in model.parameters())


def sizes(config_json: Path) -> tuple[int, int]:
    """Return how many tokens the architecture knows, and the longest row that it is made for, in
    tokens. Raises InputError for a config.json that does not say it."""
    config = read_json(config_json) or {}
    wanted = ("vocab_size", "max_position_embeddings")
    found = [key for key in wanted if not isinstance(config.get(key), int)]
    if found:
        raise InputError(
            [f"{config_json}: {key} {config.get(key)!r}; give a whole number" for key in found]
        )
    return config["vocab_size"], config["max_position_embeddings"]


def tell_unproven(rank: Rank, directory: Path) -> None:
    """Say, from rank 0, that no test has held the model's family against transformers."""
    kind = str((read_json(directory / "config.json") or {}).get("model_type"))
    if rank.first and kind not in PROVEN:
        rank.say(f"{kind}: transformers' own model, of a family that no test here has proven")
