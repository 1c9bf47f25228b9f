"""config.json → torchtitan's and torchtune's model. The one place that reads an architecture.

What a tool cannot express exactly is refused by name: a silently different RoPE or norm trains
for hours and serves nonsense.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.run.errors import InputError
from scripts.run.files import read_json

LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_architecture(config_json: Path) -> dict[str, Any]:
    """Read the sizes of a Llama from its config.json.

    Returns vocab, dim, layers, heads, kv_heads, hidden (feed-forward), context (tokens), eps,
    theta (RoPE base), scaling (None or the llama3 scaling's numbers), tied (embeddings). Raises
    InputError naming everything that a Llama of torchtitan or torchtune cannot be.
    """
    config = read_json(config_json)
    if config is None:
        raise InputError(f"{config_json}: no such file; every model needs its config.json")
    try:
        heads = config["num_attention_heads"]
        # transformers 5 writes rope_parameters; transformers 4 wrote rope_theta and rope_scaling.
        rope = {
            "rope_theta": config.get("rope_theta", 10000.0),
            **(config.get("rope_scaling") or {}),
            **(config.get("rope_parameters") or {}),
        }
        sizes = {
            "vocab": config["vocab_size"],
            "dim": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads", heads),
            "hidden": config["intermediate_size"],
            "context": config["max_position_embeddings"],
            "eps": config["rms_norm_eps"],
            "theta": rope["rope_theta"],
            "scaling": None,
            "tied": config.get("tie_word_embeddings", False),
        }
    except KeyError as error:
        raise InputError(f"{config_json}: {error.args[0]} is missing") from None
    kind = rope.get("rope_type", rope.get("type", "default"))
    found = []
    if kind == "llama3":
        sizes["scaling"] = {key: rope[key] for key in ("factor", *LLAMA3_SCALING)}
    elif kind != "default":
        found.append(f"rope_type {kind!r} (known: default, llama3)")
    if config.get("model_type") != "llama":
        found.append(f"model_type {config.get('model_type')!r} (known: llama)")
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act {config['hidden_act']!r} (known: silu)")
    found += [f"{key} true" for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if config.get("head_dim", sizes["dim"] // heads) * heads != sizes["dim"]:
        found.append(f"head_dim {config['head_dim']} × {heads} heads ≠ hidden_size {sizes['dim']}")
    if found:
        raise InputError(
            [f"{config_json}: {what}: cannot be trained here exactly" for what in found]
        )
    return sizes


def torchtitan_model_args(config_json: Path):
    """Make torchtitan's TransformerModelArgs for an architecture. Raises InputError."""
    from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs

    sizes = read_architecture(config_json)
    if sizes["tied"]:
        raise InputError(
            f"{config_json}: tie_word_embeddings true: torchtitan's llama3 cannot tie; "
            "finetune such a model"
        )
    scaling = dict(sizes["scaling"] or {"factor": 1.0, **LLAMA3_SCALING})
    # The feed-forward is multiple_of · ⌈multiplier · 8/3·dim / multiple_of⌉ wide (torchtitan's
    # model.py, FeedForward): with multiple_of = width and a multiplier that brings 8/3·dim to at
    # most that width it is exactly the width.
    default = int(2 * 4 * sizes["dim"] / 3)
    return TransformerModelArgs(
        dim=sizes["dim"],
        n_layers=sizes["layers"],
        n_heads=sizes["heads"],
        n_kv_heads=sizes["kv_heads"],
        vocab_size=sizes["vocab"],
        multiple_of=sizes["hidden"],
        ffn_dim_multiplier=None if default <= sizes["hidden"] else sizes["hidden"] / (2 * default),
        norm_eps=sizes["eps"],
        rope_theta=sizes["theta"],
        rope_scaling_args=RoPEScalingArgs(scaling_factor=scaling.pop("factor"), **scaling),
        max_seq_len=sizes["context"],
    )


def torchtune_model(model_dir: str):
    """Build torchtune's model from a Hugging Face directory's config.json, without its weights, for
    torchtune's `model._component_`. Raises InputError if torchtune cannot build it exactly."""
    builder, arguments = _torchtune(Path(model_dir))
    return builder(**arguments)


def torchtune_lora_model(
    model_dir: str,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
):
    """Build what torchtune_model builds, with LoRA adapters; the other arguments are torchtune's.
    Raises InputError likewise."""
    lora = {key: value for key, value in locals().items() if key != "model_dir"}
    builder, arguments = _torchtune(Path(model_dir), lora=True)
    return builder(**arguments, **lora)


def _torchtune(directory: Path, lora: bool = False):
    from torchtune.models import llama3, llama3_1, llama3_2

    sizes = read_architecture(directory / "config.json")
    arguments = {
        "vocab_size": sizes["vocab"],
        "num_layers": sizes["layers"],
        "num_heads": sizes["heads"],
        "num_kv_heads": sizes["kv_heads"],
        "embed_dim": sizes["dim"],
        "max_seq_len": sizes["context"],
        "intermediate_dim": sizes["hidden"],
        "norm_eps": sizes["eps"],
        "rope_base": sizes["theta"],
    }
    family, name = llama3, "llama3"
    if sizes["scaling"]:
        scaling = {key: sizes["scaling"][key] for key in LLAMA3_SCALING}
        if scaling != LLAMA3_SCALING:
            raise InputError(
                f"{directory}/config.json: RoPE scaling {scaling}: torchtune fixes {LLAMA3_SCALING}"
            )
        family, name = (llama3_2, "llama3_2") if sizes["tied"] else (llama3_1, "llama3_1")
        arguments["scale_factor"] = sizes["scaling"]["factor"]
    elif sizes["tied"]:
        raise InputError(
            f"{directory}/config.json: tied embeddings without llama3 RoPE scaling: torchtune has "
            "no such model"
        )
    from importlib import import_module

    builders = import_module(f"{family.__name__}._component_builders")
    return getattr(builders, f"lora_{name}" if lora else name), arguments
