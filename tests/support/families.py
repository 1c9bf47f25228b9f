"""Small copies of many families of decoders, with what is odd about each, and random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
# name: config.json's model_type, and what is not as in SMALL
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama scaled": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama tied and scaled": (
        "llama",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral with a window": ("mistral", {"sliding_window": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 with a window": ("phi3", {"sliding_window": 32}),
    "phi4-mini": ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "num_hidden_layers": 2}),
    "cohere2": ("cohere2", {"sliding_window": 32}),
    "starcoder2": ("starcoder2", {"sliding_window": 32}),
    "glm4": ("glm4", {"head_dim": 16}),
}
# torchtitan's own models that can be the same
OWN = {"llama": ("llama3", "qwen3"), "llama scaled": ("llama3",), "llama tied": ("qwen3",)}
OWN |= {"mistral": ("qwen3",), "qwen3": ("qwen3",), "qwen3 tied": ("qwen3",)}


def write_family(name: str, directory: Path, **changes: Any) -> Path:
    """Write a Hugging Face directory of a family's small copy, without a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, odd = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **odd, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms, too, must be seen to arrive
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    assert written["architectures"]
    return directory
