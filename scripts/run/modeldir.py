"""The one thing stages hand on: a Hugging Face directory. Verify it, complete it, hand it over atomically.

Standard library only: the launcher refuses a broken directory before anything is queued.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

from scripts.run.digests import digest_tree
from scripts.run.errors import InputError
from scripts.run.files import dump_json, read_json, write_atomic
from scripts.run.layout import as_fact

ARCHITECTURES = ("LlamaForCausalLM",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors shards, from the index where there is one. Raises InputError."""
    index = read_json(directory / "model.safetensors.index.json")
    if index is not None:
        return sorted(set(index["weight_map"].values()))
    return sorted(p.name for p in directory.glob("*.safetensors") if not p.name.startswith("adapter_"))


def read_header(path: Path) -> dict:
    """The tensors of a safetensors file: {name: {"dtype", "shape", "data_offsets"}}.

    Raises InputError if the file is cut short or not safetensors: 8 bytes of header length, a JSON header,
    then exactly the bytes its offsets name (https://huggingface.co/docs/safetensors).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        raw = file.read(8)
        length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else size
        if length + 8 > size:
            raise InputError(f"{path}: cut short: {size} bytes do not hold its header; copy the file again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise InputError(f"{path}: not a safetensors file; copy the file again") from None
    header.pop("__metadata__", None)
    end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    if end != size:
        raise InputError(f"{path}: cut short: {size} bytes of {end}; copy the file again")
    return header


def problems(directory: Path, tokenizer: bool = True) -> list[str]:
    """Everything wrong with a Hugging Face directory as input of a stage; [] if it is whole."""
    if not directory.is_dir():
        return [f"{directory}: no such directory; give FROM a Hugging Face directory, or train the stage before"]
    found = []
    try:
        found += _config_problems(directory)
        found += _weight_problems(directory)
        if tokenizer:
            found += tokenizer_problems(directory)
    except InputError as error:
        found += error.problems
    return found


def _config_problems(directory: Path) -> list[str]:
    config = read_json(directory / "config.json")
    if config is None:
        return [f"{directory}: no config.json; FROM must be a whole Hugging Face directory"]
    names = config.get("architectures") or []
    if not set(names) & set(ARCHITECTURES):
        return [f"{directory}/config.json: architecture {', '.join(names) or 'missing'}; known: {', '.join(ARCHITECTURES)}"]
    return []


def _weight_problems(directory: Path) -> list[str]:
    files = weight_files(directory)
    if not files:
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            return [
                f"{directory}: weights only as pickle ({pickles[0]}), which can run code when loaded; "
                "convert them to safetensors: save_pretrained(…, safe_serialization=True) where you trust them"
            ]
        return [f"{directory}: no *.safetensors; FROM must be a whole Hugging Face directory"]
    found, tensors = [], set()
    for name in files:
        try:
            tensors |= set(read_header(directory / name))
        except FileNotFoundError:
            found.append(f"{directory}: {name} is named in model.safetensors.index.json but missing; copy it again")
        except InputError as error:
            found += error.problems
    layers = (read_json(directory / "config.json") or {}).get("num_hidden_layers", 0)
    missing = [f"model.layers.{i}" for i in range(layers) if f"model.layers.{i}.mlp.down_proj.weight" not in tensors]
    if missing and not found:
        found.append(f"{directory}: weights of {missing[0]} are missing ({len(missing)} of {layers} layers); copy it again")
    return found


def tokenizer_problems(directory: Path) -> list[str]:
    """What is wrong with the tokenizer of a directory that has a config.json."""
    absent = [name for name in TOKENIZER_FILES[:2] if not (directory / name).exists()]
    if absent:
        return [f"{directory}: no {' and no '.join(absent)}; FROM must be a whole Hugging Face directory"]
    found = []
    tokenizer = read_json(directory / "tokenizer.json")
    ids = list(tokenizer["model"]["vocab"].values()) + [t["id"] for t in tokenizer.get("added_tokens", [])]
    size = (read_json(directory / "config.json") or {}).get("vocab_size", 0)
    if max(ids) >= size:
        found.append(
            f"{directory}: the tokenizer has {max(ids) + 1} entries, the model's vocab_size is {size}; "
            "use the tokenizer this model was made with"
        )
    if not chat_template(directory):
        found.append(
            f"{directory}: no chat template in tokenizer_config.json or chat_template.jinja; add one: "
            "finetune, align and chat need it"
        )
    return found


def chat_template(directory: Path) -> str:
    """The directory's chat template, "" if it has none. chat_template.jinja wins, as in transformers."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = (read_json(directory / "tokenizer_config.json") or {}).get("chat_template") or ""
    return template if isinstance(template, str) else next(t["template"] for t in template if t["name"] == "default")


def weight_bytes(directory: Path) -> int:
    """Size of the directory's weights."""
    return sum((directory / name).stat().st_size for name in weight_files(directory))


def parameter_count(directory: Path) -> int:
    """Parameters in the directory's weights, from the headers alone."""
    total = 0
    for name in weight_files(directory):
        for tensor in read_header(directory / name).values():
            count = 1
            for side in tensor["shape"]:
                count *= side
            total += count
    return total


def complete(weights: Path, assets: Path) -> None:
    """Add to a directory of fresh weights what upstream trainers leave out, from `assets` (the directory that
    the model came from, or the tokenizer and config of one born here): config, generation config, tokenizer.

    torchtitan exports weights only; torchtune copies some files; both would leave vLLM without a chat template.
    """
    for name in ("config.json", *TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"):
        if (assets / name).exists():
            shutil.copyfile(assets / name, weights / name)
    tokenizer = read_json(weights / "tokenizer.json")
    settings = read_json(weights / "tokenizer_config.json")
    ids = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}}
    name_of = lambda key: settings[key]["content"] if isinstance(settings.get(key), dict) else settings.get(key)  # noqa: E731
    if not (weights / "special_tokens_map.json").exists():
        names = {key: name_of(key) for key in ("bos_token", "eos_token", "pad_token") if settings.get(key)}
        write_atomic(weights / "special_tokens_map.json", dump_json(names))
    if not (weights / "generation_config.json").exists():
        # Every token that ends a turn: without the end-of-turn token here vLLM never stops an answer.
        ends = [ids[t] for t in (name_of("eos_token"), "<|end_of_turn|>", "<|eot_id|>", "<|im_end|>") if t in ids]
        generation = {"bos_token_id": ids.get(name_of("bos_token")), "eos_token_id": ends, "do_sample": False}
        write_atomic(weights / "generation_config.json", dump_json(generation))


def hand_over(weights: Path, assets: Path, model: Path) -> dict:
    """Complete, verify and move a directory of fresh weights to `model` in one rename.

    Returns {"path", "digest", "parameters"}. Raises InputError if it is not whole; `model` then does not exist.
    """
    complete(weights, assets)
    for path in weights.iterdir():
        if path.name.startswith("adapter_"):
            path.unlink()  # merged already: transformers would apply a LoRA adapter a second time
    found = problems(weights)
    if found:
        raise InputError(found)
    result = {"path": as_fact(model), "digest": digest_tree(weights), "parameters": parameter_count(weights)}
    for path in weights.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # a power cut after the rename must not leave empty files
        path.chmod(0o644)  # some writers make files that only their owner can read
    if model.exists():
        shutil.rmtree(model)  # an attempt that was killed between this rename and stage.json
    os.replace(weights, model)
    return result
