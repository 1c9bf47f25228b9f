"""Any dense decoder of transformers in torchtune's stock recipes: three components for a config.

The architecture has one home, the directory's config.json, and weights keep transformers' names
on both sides, so nothing is mapped by hand. Seen to be exact for 17 families (docs/models.md).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torchtune import training
from torchtune.models import convert_weights
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks
from torchtune.modules.peft import DoRALinear, LoRALinear

from scripts.run.errors import InputError
from scripts.tools.decoder import from_config, read_config, tied

HEAD = "lm_head.weight"
NF4_BLOCK = 64  # weights that share a scaler (torchao's to_nf4); its scalers share one, too
NF4_SCALERS = 256  # at most: torchao's default, which many widths are no multiple of
PEFT_NAMES = {
    ".lora_a.": ".lora_A.",
    ".lora_b.": ".lora_B.",
    ".magnitude": ".lora_magnitude_vector",
}


class _Decoder:
    """What a recipe asks of torchtune's TransformerDecoder, mixed into the model's own class."""

    num_output_chunks = 0

    @property
    def layers(self) -> nn.ModuleList:
        """Return the layers; selective activation checkpointing replaces its entries."""
        return self.get_decoder().layers

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """Make forward() return logits in that many pieces, for a chunked loss."""
        self.num_output_chunks = num_output_chunks

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Load weights, and tie again: loaded from meta, tied names become two parameters."""
        result = super().load_state_dict(*arguments, **options)
        if tied(self.config):
            self.get_output_embeddings().weight = self.get_input_embeddings().weight
        return result

    def forward(self, tokens, *, mask=None, input_pos=None, **_: Any):
        """Return logits (rows, tokens, vocabulary) in float32, or a list of pieces of them.

        `mask` (rows, query, key; True: look) is torchtune's, of the documents in packed rows. It
        is used rather than positions, which not every family hands on to its own mask (gpt_oss).
        """
        options = {"position_ids": input_pos, "use_cache": False}
        if mask is not None:
            options["attention_mask"] = self._with_windows(mask)
        logits = super().forward(input_ids=tokens, **options).logits
        if self.num_output_chunks:
            return list(logits.chunk(self.num_output_chunks, dim=1))
        return logits.float()

    def _with_windows(self, mask):
        """Return the mask for each kind of layer: transformers takes a mask of four dimensions as
        it is, so a sliding window has to be in it."""
        mask, place = mask[:, None], torch.arange(mask.shape[-1], device=mask.device)
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        near = mask & (place[:, None] - place < window) if window else mask
        if self.config._attn_implementation == "eager":  # it is added to the scores there
            mask, near = (self._added(each) for each in (mask, near))
        if not kinds:
            return near
        return {kind: near if kind == "sliding_attention" else mask for kind in set(kinds)}

    def _added(self, mask):
        zeros = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
        return zeros.masked_fill(~mask, torch.finfo(self.dtype).min)

    def rope_init(self) -> None:
        """Compute the buffers that no file holds (RoPE, embedding scale) on the default device:
        distributed recipes build on meta, and call this then. Raises InputError for one that
        transformers does not compute again."""
        for name, module in self.named_modules():
            buffers = module.named_buffers(recurse=False)
            found = {key: buffer for key, buffer in buffers if buffer.is_meta}
            for key, buffer in found.items():
                empty = torch.full_like(buffer, torch.nan, device=torch.get_default_device())
                module._buffers[key] = empty
            if found:
                self._init_weights(module)
            for key in found:
                if torch.isnan(module._buffers[key]).any():
                    raise InputError(
                        f"{type(self).__name__}: {name}.{key} is in no file and transformers does "
                        "not compute it again; train on one process"
                    )


def decoder(model_dir: str) -> nn.Module:
    """Build the model of a Hugging Face directory's config.json, without its weights: a component
    for torchtune's `model`. Raises InputError for one that cannot be trained here."""
    from transformers.initialization import no_init_weights

    config = read_config(Path(model_dir))
    with no_init_weights():
        model = from_config(config, torch.get_default_dtype())
    model.tie_weights()
    name = type(model).__name__
    model.__class__ = type(name, (_Decoder, type(model)), {})
    for layer in model.layers:  # recipes find what to checkpoint and to compile by this class
        bases = (type(layer), TransformerSelfAttentionLayer)
        layer.__class__ = type(type(layer).__name__, bases, {})
    return model.train()


class _DoRALinear(DoRALinear):
    """Keep a bias out of DoRA's scaling: torchtune's layer scales it and its merge does not."""

    def forward(self, x):
        bias, self._parameters["bias"], self.use_bias = self._parameters["bias"], None, False
        try:
            out = super().forward(x)
        finally:
            self._parameters["bias"], self.use_bias = bias, bias is not None
        return out if bias is None else out + bias


def lora_decoder(
    model_dir: str,
    lora_attn_modules: list[str],
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
) -> nn.Module:
    """Build what decoder() builds, with adapters on the linear layers that `lora_attn_modules`
    names as the model does: q_proj, gate_proj and so on. The other arguments are torchtune's.
    Raises InputError."""
    if apply_lora_to_mlp or apply_lora_to_output:
        raise InputError(
            "apply_lora_to_mlp, apply_lora_to_output: must be false; name the linear layers in "
            "model.lora_attn_modules, as [q_proj, gate_proj], or [all]"
        )
    model = decoder(model_dir)
    linears, wanted = linear_layers(model), set(lora_attn_modules)
    if not wanted <= linears.keys():
        raise InputError(
            f"model.lora_attn_modules {sorted(wanted - linears.keys())}: this model has no linear "
            f"layer called so; it has {sorted(linears)}, or [all] for every one"
        )
    kind = _DoRALinear if use_dora else LoRALinear
    adapted = [(name, *one) for name, each in linears.items() if name in wanted for one in each]
    for name, parent, child in adapted:  # in the model's order: adapters draw random numbers
        sides = (child.in_features, child.out_features)
        if not 0 < lora_rank <= min(sides):
            raise InputError(
                f"model.lora_rank {lora_rank}: {name} is {sides[1]} × {sides[0]}; give 1 to "
                f"{min(sides)}"
            )
        options = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout}
        options |= {"use_bias": child.bias is not None, "quantize_base": quantize_base}
        if quantize_base:
            options |= _nf4(name, child.weight.numel())
        setattr(parent, name, kind(*sides, **options))
    if quantize_base:
        _register_reparametrize_state_dict_hooks(model)  # NF4 → bfloat16 in what is saved
    return model


def linear_layers(model: nn.Module) -> dict[str, list[tuple[nn.Module, nn.Linear]]]:
    """Return {name: [(its parent, it)]} of a decoder's linear layers, those of all layers alike
    under one name; not the output."""
    found: dict[str, list[tuple[nn.Module, nn.Linear]]] = {}
    for parent in model.get_decoder().modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                found.setdefault(name, []).append((parent, child))
    return found


def _nf4(name: str, count: int) -> dict[str, int]:
    """Return torchao's block sizes for a weight of `count` elements. Raises InputError."""
    if count % NF4_BLOCK:
        raise InputError(
            f"{name}: {count} weights are no multiple of NF4's block of {NF4_BLOCK}: "
            "quantize_base cannot hold this model; train it with RECIPE=lora"
        )
    return {"scaler_block_size": math.gcd(count // NF4_BLOCK, NF4_SCALERS)}


class Checkpointer(training.FullModelHFCheckpointer):
    """torchtune's own, for any family: names stay transformers'. A tied output is in the model and
    not in the file."""

    def __init__(self, checkpoint_dir: str, model_type: str = "LLAMA3", **options: Any):
        super().__init__(checkpoint_dir=checkpoint_dir, model_type=model_type, **options)
        config = read_config(Path(checkpoint_dir))
        self._config = {**config.to_dict(), **self._config}  # it asks for keys that may be left out
        self._config["num_key_value_heads"] = config.num_key_value_heads
        self._embedding = "model.embed_tokens.weight" if tied(config) else None

    @contextlib.contextmanager
    def _own_names(self, dora: bool = False) -> Iterator[None]:
        def read(weights, **_: Any):
            for name in [n for n in weights if n.endswith("rotary_emb.inv_freq")]:
                # Old Llamas have it in their files; it is computed from config.json.
                del weights[name], self._weight_map[name]
            if HEAD in weights or not self._embedding:
                return weights
            return {**weights, HEAD: weights[self._embedding]}

        def write(weights, **_: Any):
            missing = sorted(self._weight_map.keys() - weights.keys())
            if missing:
                raise ValueError(f"{missing[0]} is in the files that were read, not in the model")
            drop = {HEAD} - self._weight_map.keys() if self._embedding else set()
            return {name: w.contiguous() for name, w in weights.items() if name not in drop}

        def adapter(weights, **_: Any):
            renamed = {}
            for name, tensor in weights.items():
                for theirs, pefts in PEFT_NAMES.items():
                    name = name.replace(theirs, pefts)
                renamed[f"base_model.model.{name}"] = tensor.contiguous()
            return renamed

        def adapter_config(adapter_config, base_model_name_or_path=None):
            base = {"base_model_name_or_path": base_model_name_or_path, "task_type": "CAUSAL_LM"}
            return {**adapter_config, **base, "use_dora": dora}

        names = {"hf_to_tune": read, "tune_to_hf": write}
        names |= {"tune_to_peft_adapter_weights": adapter}
        names |= {"tune_to_peft_adapter_config": adapter_config}
        with mock.patch.multiple(convert_weights, **names):
            yield

    def load_checkpoint(self) -> dict[str, Any]:
        """Read the weights."""
        with self._own_names():
            return super().load_checkpoint()

    def save_checkpoint(self, state_dict, epoch, intermediate_checkpoint=False, adapter_only=False):
        """Write a directory of weights, an adapter of it in adapter/: transformers would apply one
        that lies beside the merged weights a second time."""
        dora = any("magnitude" in name for name in state_dict.get(training.ADAPTER_KEY, {}))
        with self._own_names(dora):
            super().save_checkpoint(state_dict, epoch, intermediate_checkpoint, adapter_only)
        folder = self._output_dir / f"epoch_{epoch}"
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if (folder / name).exists():
                (folder / "adapter").mkdir(exist_ok=True)
                (folder / name).replace(folder / "adapter" / name)
