"""The models that torchtitan trains here: any dense decoder of transformers, sharded by FSDP; or
torchtitan's own Llama or Qwen 3, which bring tensor and context parallelism and float8.

--model.name chooses: decoder, llama3 or qwen3. The architecture is config.json's with each.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models import llama3, qwen3
from torchtitan.models.llama3.infra import parallelize as upstream
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec

from scripts.run.errors import InputError
from scripts.tools.decoder import from_config, read_config, tied

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PREFIX = "hf."  # of transformers' names, in Decoder


def train_spec(name: str, flavor: str, directory: Path) -> TrainSpec:
    """Return torchtitan's description of a directory's model, under the flavor's name. Raises
    InputError for what cannot be trained here exactly."""
    if name == "decoder":
        parts = {
            "model_cls": Decoder,
            "parallelize_fn": parallelize,
            "pipelining_fn": None,
            "state_dict_adapter": Adapter,
        }
        read_config(directory)
        arguments: BaseModelArgs = Arguments(directory=str(directory))
        return dataclasses.replace(llama3.get_train_spec(), model_args={flavor: arguments}, **parts)
    own = {"llama3": (llama3, _llama3), "qwen3": (qwen3, _qwen3)}
    if name not in own:
        raise InputError(f"model.name {name!r}: unknown; known: decoder, {', '.join(own)}")
    package, arguments_of = own[name]
    arguments = arguments_of(directory / "config.json", read_config(directory))
    return dataclasses.replace(package.get_train_spec(), model_args={flavor: arguments})


# --- any decoder of transformers


@dataclasses.dataclass
class Arguments(BaseModelArgs):
    """Name the directory whose config.json says everything."""

    directory: str = ""

    def update_from_config(self, job_config: Any, **_: Any) -> None:
        """Leave the architecture as it is."""

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Count parameters, and floating-point operations a token: 6 a parameter and 12 · layers ·
        width · tokens of attention (PaLM, appendix B, which torchtitan follows)."""
        config, total = model.hf.config, sum(p.numel() for p in model.parameters())
        table = model.hf.get_input_embeddings().weight.numel()
        body = total if tied(config) else total - table  # tied, the table is the output's, too
        return total, 6 * body + 12 * config.num_hidden_layers * config.hidden_size * seq_len


class Decoder(ModelProtocol):
    """Hold transformers' own model: tokens (rows, tokens) → logits (rows, tokens, vocabulary)."""

    def __init__(self, model_args: Arguments):
        super().__init__(model_args)
        config = read_config(Path(model_args.directory))
        self.hf = from_config(config, torch.get_default_dtype())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.hf(input_ids=tokens, use_cache=False).logits

    def init_weights(self, buffer_device: Any = None) -> None:
        """Draw the weights as transformers does, and compute the buffers that no checkpoint holds
        (RoPE, Gemma's embedding scale): torchtitan builds on meta, where they are nothing."""
        for module in self.modules():
            for thing in (module, *module.parameters(False), *module.buffers(False)):
                thing._is_hf_initialized = False  # on meta transformers marked all as done
        for module in self.hf.modules():
            self.hf._init_weights(module)
        self.hf.tie_weights()


class Adapter(StateDictAdapter):
    """Translate names: transformers' own behind a prefix. A tied output is not in the files."""

    def __init__(self, model_args: Arguments, hf_assets_path: str | None):
        super().__init__(model_args, hf_assets_path)
        self.tied = tied(read_config(Path(model_args.directory)))

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the weights as a Hugging Face directory names them."""
        found = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
        if self.tied:
            found.pop(HEAD, None)
        return found

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a Hugging Face directory's weights as Decoder names them."""
        found = dict(hf_state_dict)
        if self.tied:
            found[HEAD] = found[EMBEDDING]
        return {PREFIX + name: tensor for name, tensor in found.items()}


def parallelize(model: Decoder, parallel_dims: Any, job_config: Any) -> Decoder:
    """Recompute activations and shard over the ranks, layer by layer, as torchtitan does with its
    own models. Other ways of sharding are refused before (torchtitan_options.py)."""
    training, decoder = job_config.training, model.hf.get_decoder()
    if job_config.activation_checkpoint.mode != "none":
        saved = upstream._op_sac_save_list
        apply_ac(decoder, job_config.activation_checkpoint, op_sac_save_list=saved)
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
        options: dict[str, Any] = {
            "mesh": parallel_dims.get_mesh([*names, "fsdp"]),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
                reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            ),
            "reshard_after_forward": job_config.parallelism.fsdp_reshard_after_forward != "never",
        }
        if training.enable_cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy()
        for layer in decoder.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
        upstream.disable_fsdp_gradient_division(model)
    elif parallel_dims.dp_replicate_enabled:
        upstream.apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=False)
    return model


# --- torchtitan's own models


def _own(file: Path, config: Any, name: str, families: set[str], ropes: set[str]) -> dict[str, Any]:
    """Return RoPE's parameters of a config that torchtitan's own `name` can be. Raises InputError
    with all that keeps it from that."""
    rope = dict(config.rope_parameters or {})
    found = []
    if config.model_type not in families:
        found.append(f"model_type {config.model_type!r} (known: {', '.join(sorted(families))})")
    if rope.get("rope_type", "default") not in ropes:
        found.append(f"rope_type {rope['rope_type']!r} (known: {', '.join(sorted(ropes))})")
    if config.hidden_act != "silu":
        found.append(f"hidden_act {config.hidden_act!r} (known: silu)")
    found += [f"{key} true" for key in ("attention_bias", "mlp_bias") if getattr(config, key, None)]
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        found.append(f"sliding_window {config.sliding_window}")
    if found:
        mend = f"torchtitan's own {name} is no such model; leave --model.name out"
        raise InputError([f"{file}: {what}: {mend}" for what in found])
    return rope


def _llama3(file: Path, config: Any) -> BaseModelArgs:
    """Make torchtitan's TransformerModelArgs. Raises InputError."""
    from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs

    rope = _own(file, config, "llama3", {"llama"}, {"default", "llama3"})
    width = config.hidden_size
    if tied(config):
        raise InputError(f"{file}: tie_word_embeddings true: its llama3 cannot tie; qwen3 can")
    if getattr(config, "head_dim", None) not in (None, width // config.num_attention_heads):
        raise InputError(f"{file}: head_dim {config.head_dim}: its llama3 divides hidden_size")
    # A factor of 1 leaves the frequencies as they are, whatever the others say.
    names = {"factor": "scaling_factor", "low_freq_factor": "low_freq_factor"}
    names |= {"high_freq_factor": "high_freq_factor"}
    names |= {"original_max_position_embeddings": "original_max_position_embeddings"}
    given = {theirs: rope[ours] for ours, theirs in names.items() if ours in rope}
    # The feed-forward is multiple_of · ⌈multiplier · 8/3·dim / multiple_of⌉ wide (torchtitan's
    # model.py, FeedForward): with multiple_of = width and a multiplier that brings 8/3·dim to at
    # most that width it is exactly the width.
    default, hidden = int(2 * 4 * width / 3), config.intermediate_size
    return TransformerModelArgs(
        dim=width,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        multiple_of=hidden,
        ffn_dim_multiplier=None if default <= hidden else hidden / (2 * default),
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling_args=RoPEScalingArgs(**{"scaling_factor": 1.0, **given}),
        max_seq_len=config.max_position_embeddings,
    )


def _qwen3(file: Path, config: Any) -> BaseModelArgs:
    """Make torchtitan's Qwen3ModelArgs: a Qwen 3, or a Llama or Mistral, whose heads have no norms
    of their own. Raises InputError."""
    from torchtitan.models.qwen3.model.args import Qwen3ModelArgs

    rope = _own(file, config, "qwen3", {"qwen3", "llama", "mistral"}, {"default"})
    return Qwen3ModelArgs(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        hidden_dim=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        qk_norm=config.model_type == "qwen3",
        max_seq_len=config.max_position_embeddings,
        enable_weight_tying=tied(config),
    )
