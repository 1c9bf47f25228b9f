"""The one thing that stages hand on: a Hugging Face directory. It is checked, completed, and handed
over by one rename. The launcher refuses a broken one before anything is queued."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any, Optional

from scripts.run.digests import Digests
from scripts.run.errors import InputError
from scripts.run.files import read_json, write_json

DECODER = "ForCausalLM"  # how transformers' names of such models end
LAYER = re.compile(r"\b(?:layers|blocks|h)\.(\d+)\.")  # of a tensor's name
# Sizes that every trainer asks for, and what says that a layer chooses among several networks.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
ROPE = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # what each kind of RoPE needs (transformers' modeling_rope_utils.py)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TURN_ENDS = ("<|end_of_turn|>", "<|eot_id|>", "<|im_end|>")
WHOLE = "FROM must be a whole Hugging Face directory"


def weight_files(directory: Path) -> list[str]:
    """Name the safetensors shards, from the index where there is one. Raises InputError."""
    index = read_json(directory / "model.safetensors.index.json")
    if index is not None:
        return sorted(set(index["weight_map"].values()))
    names = (p.name for p in directory.glob("*.safetensors"))
    return sorted(name for name in names if not name.startswith("adapter_"))


def read_header(path: Path) -> dict[str, Any]:
    """Read the tensors of a safetensors file: {name: {"dtype", "shape", "data_offsets"}}.

    Raises InputError if the file is cut short or not safetensors: 8 bytes of header length, a JSON
    header, then exactly the bytes its offsets name (https://huggingface.co/docs/safetensors).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        raw = file.read(8)
        length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else size
        if length + 8 > size:
            raise InputError(
                f"{path}: cut short: {size} bytes do not hold its header; copy the file again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise InputError(f"{path}: not a safetensors file; copy the file again") from None
    header.pop("__metadata__", None)
    end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    if end != size:
        raise InputError(f"{path}: cut short: {size} bytes of {end}; copy the file again")
    return dict(header)


def problems(directory: Path, tokenizer: bool = True) -> list[str]:
    """List what is wrong with a Hugging Face directory as input of a stage; [] if it is whole."""
    if directory.is_file():
        return [f"{directory}: a file; give the directory that it is in: FROM={directory.parent}"]
    if not directory.is_dir():
        mend = "give FROM a Hugging Face directory, or train the stage before"
        return [f"{directory}: no such directory; {mend}"]
    found = []
    try:
        found += _config_problems(directory)
        weights = _weight_problems(directory)
        found += weights
        if tokenizer:
            found += tokenizer_problems(directory, sized=not weights)
    except InputError as error:
        found += error.problems
    return found


def _config_problems(directory: Path) -> list[str]:
    config = read_json(directory / "config.json")
    if config is None:
        return [f"{directory}: no config.json; {WHOLE}"]
    names = config.get("architectures") or []
    if not any(name.endswith(DECODER) for name in names):
        given = ", ".join(names) or "missing"
        return [f"{directory}/config.json: architecture {given}; stages know …{DECODER} alone"]
    if config.get("auto_map"):
        return [
            f"{directory}/config.json: auto_map: this model brings code of its own, which no stage "
            "runs; take its form without code, where transformers knows the family by now"
        ]
    return []


def untrainable(config_json: Path) -> list[str]:
    """List what keeps the model of a config.json from being trained here; it may be served."""
    config = read_json(config_json)
    if config is None:
        return [f"{config_json}: no such file; every model needs its config.json"]
    missing = [key for key in SIZES if config.get(key) is None]
    if missing:
        what = f"{', '.join(missing)} missing: no decoder that can be trained here"
        return [f"{config_json}: {what} (docs/models.md)"]
    found = []
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "quantised")
        mend = "start from the model that it was made from; this one can be served"
        found.append(f"{config_json}: weights are quantised ({method}); {mend}")
    chosen = any((config.get(key) or 0) > 1 for key in EXPERTS)
    if chosen or re.search("moe|mixtral", str(config.get("model_type")), re.I):  # by default
        found.append(f"{config_json}: a mixture of experts: cannot be trained here exactly")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if heads % (kv_heads or heads):
        found.append(
            f"{config_json}: num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{kv_heads}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    lacks = [key for key in ROPE.get(kind, ()) if rope.get(key) is None]
    if lacks:
        found.append(f"{config_json}: rope_type {kind} without {', '.join(lacks)}")
    return found


def _weight_problems(directory: Path) -> list[str]:
    files = weight_files(directory)
    if not files:
        kinds = (".bin", ".pt", ".pth", ".ckpt")
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in kinds)
        if pickles:
            return [
                f"{directory}: weights only as pickle ({pickles[0]}), which can run code when "
                "loaded; convert them to safetensors where you trust them: "
                "save_pretrained(…, safe_serialization=True)"
            ]
        return [f"{directory}: no *.safetensors; {WHOLE}"]
    found: list[str] = []
    tensors: dict[str, Any] = {}
    for name in files:
        try:
            tensors.update(read_header(directory / name))
        except FileNotFoundError:
            where = f"{name} is named in model.safetensors.index.json but missing"
            found.append(f"{directory}: {where}; copy it again")
        except InputError as error:
            found += error.problems
    if found:
        return found
    config = read_json(directory / "config.json") or {}
    layers = config.get("num_hidden_layers", 0)
    there = {int(number) for name in tensors for number in LAYER.findall(name)}
    missing = sorted(set(range(layers)) - there)
    if missing:
        count = f"{len(missing)} of {layers} layers"
        found.append(
            f"{directory}: weights of layer {missing[0]} are missing ({count}); copy it again"
        )
    rows = tensors.get("model.embed_tokens.weight", {}).get("shape", [None])[0]
    if rows is not None and config.get("vocab_size") not in (None, rows):
        found.append(
            f"{directory}/config.json: vocab_size {config['vocab_size']}, and the embedding in the "
            f"weights has {rows} rows; give the number that the weights have"
        )
    return found


def tokenizer_problems(directory: Path, sized: bool = True) -> list[str]:
    """List what is wrong with the tokenizer of a directory. `sized`: its config.json has the
    vocab_size of its weights, so that the tokenizer can be held against it."""
    absent = [name for name in TOKENIZER_FILES[:2] if not (directory / name).exists()]
    if absent:
        mend = WHOLE
        if (directory / "tokenizer.model").exists():
            mend = "from its tokenizer.model: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        return [f"{directory}: no {' and no '.join(absent)}; {mend}"]
    found = []
    ids = list(_token_ids(directory).values())
    size = (read_json(directory / "config.json") or {}).get("vocab_size")
    if sized and size is not None and max(ids) >= size:
        found.append(
            f"{directory}: the tokenizer has {max(ids) + 1} entries, the model's vocab_size is "
            f"{size}; use the tokenizer this model was made with"
        )
    if not chat_template(directory):
        found.append(
            f"{directory}: no chat template in tokenizer_config.json or chat_template.jinja; "
            "add one: finetune, align and chat need it"
        )
    return found


def chat_template(directory: Path) -> str:
    """Read the directory's chat template, "" if it has none. chat_template.jinja wins, as in
    transformers."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = (read_json(directory / "tokenizer_config.json") or {}).get("chat_template") or ""
    if isinstance(template, str):
        return template
    named = {t["name"]: t["template"] for t in template}
    return str(named.get("default", ""))


def _token_ids(directory: Path) -> dict[str, int]:
    """Read {token: id} from tokenizer.json; a Unigram's vocabulary is a list of (token, score)."""
    tokenizer = read_json(directory / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}
    return {**vocabulary, **added}


def special_token(settings: dict[str, Any], key: str) -> Optional[str]:
    """Read a token's text, such as "eos_token", from the content of tokenizer_config.json."""
    value = settings.get(key)
    return value["content"] if isinstance(value, dict) else value


def weight_bytes(directory: Path) -> int:
    """Add up the size of the directory's weights, in bytes."""
    return sum((directory / name).stat().st_size for name in weight_files(directory))


def parameter_count(directory: Path) -> int:
    """Count the parameters in the directory's weights, from the headers alone."""
    total = 0
    for name in weight_files(directory):
        for tensor in read_header(directory / name).values():
            count = 1
            for side in tensor["shape"]:
                count *= side
            total += count
    return total


def complete(weights: Path, assets: Path) -> None:
    """Add to a directory of fresh weights what upstream trainers leave out, from `assets`: the
    directory that the model came from, or the tokenizer and config of one born here.

    torchtitan exports weights only, torchtune copies some files; both would leave vLLM without a
    chat template. A quantised model's own config.json says how to read its weights: it stays.
    """
    names = [*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"]
    if not (read_json(weights / "config.json") or {}).get("quantization_config"):
        names.append("config.json")
    for name in names:
        if (assets / name).exists():
            shutil.copyfile(assets / name, weights / name)
    settings, ids = read_json(weights / "tokenizer_config.json"), _token_ids(weights)
    if not (weights / "special_tokens_map.json").exists():
        keys = ("bos_token", "eos_token", "pad_token")
        tokens = {key: special_token(settings, key) for key in keys if settings.get(key)}
        write_json(weights / "special_tokens_map.json", tokens)
    if not (weights / "generation_config.json").exists():
        ends = (special_token(settings, "eos_token"), *TURN_ENDS)
        generation = {
            "bos_token_id": ids.get(special_token(settings, "bos_token") or ""),
            # Without the end of a turn here vLLM never stops an answer.
            "eos_token_id": [ids[token] for token in ends if token in ids],
            "do_sample": False,
        }
        write_json(weights / "generation_config.json", generation)


def hand_over(weights: Path, assets: Path, model: Path, digests: Digests) -> dict[str, Any]:
    """Complete, check and move a directory of fresh weights to `model` in one rename.

    Returns {"path", "digest", "parameters"}. Raises InputError if it is not whole; `model` then
    does not exist.
    """
    complete(weights, assets)
    for path in weights.iterdir():
        if path.name.startswith("adapter_"):
            path.unlink()  # merged already: transformers would apply the adapter a second time
    found = problems(weights)
    if found:
        raise InputError(found)
    for path in weights.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # a power cut after the rename must not leave empty files
        path.chmod(0o644)  # some writers make files that only their owner can read
    if model.exists():
        shutil.rmtree(model)  # an attempt that was killed between this rename and stage.json
    os.replace(weights, model)
    return {**digests.describe(model), "parameters": parameter_count(model)}
