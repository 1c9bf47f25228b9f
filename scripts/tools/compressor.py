"""llm-compressor around its pinned release: a recipe checked, run on rows of the data, and saved as
compressed-tensors has it, which transformers and vLLM load.

It needs a newer compressed-tensors than vLLM brings, so its packages lie in a folder of their own,
which this stage's rank alone looks into.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.corpus.chat import Chat
from scripts.corpus.shapes import CHAT, FOLDERS
from scripts.corpus.turns import Unusable
from scripts.job.rank import Rank
from scripts.job.stage import Stage
from scripts.run import modeldir, preflight
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.run.stages import quantizer
from scripts.tools.config_check import against_dataclass
from scripts.tools.decoder import attention

PACKAGES = Path(sys.prefix, "quantize")
EXPORT = "export"  # where in the stage's directory it saves
# Upstream's 512 rows take a CPU hours; ARGS say otherwise.
CALIBRATION = {"num_calibration_samples": 128, "max_seq_length": 2048}


def version() -> str:
    """Name the release that is installed, "" for none."""
    for found in metadata.distributions(name="llmcompressor", path=[str(PACKAGES)]):
        return f"llmcompressor {found.version}"
    return ""


def reads_rows(stage: Stage) -> bool:
    """Tell whether the stage's recipe looks at rows of the data."""
    return stage.facts["RECIPE"] != quantizer().without_rows


def problems(stage: Stage, source: Path, data: Path) -> list[str]:
    """List what can be seen without llm-compressor, in the first second: what is not installed, no
    rows, widths that no group divides, a machine that is too small."""
    found = []
    if not version():
        found.append("llm-compressor is not installed here: make .venv/quantize/installed")
    rows = (read_json(data / "data.json") or {}).get("rows", {}).get(FOLDERS[CHAT], 0)
    if reads_rows(stage) and not rows:
        found.append(
            f"{data}: holds no conversations, which {stage.facts['RECIPE']} needs; give DATA with "
            f"some, or take {quantizer().without_rows}, which reads none"
        )
    found += _group_problems(stage.config, source)
    size = modeldir.weight_bytes(source)
    found += preflight.memory_problems(size, "the weights")
    # At least a quarter of what it was: 4 bits of 16, 8 of 32.
    return found + preflight.disk_problems(stage.directory, size / 4, "the model")


def _group_problems(recipe: Path, source: Path) -> list[str]:
    """Tell whether a recipe shares each scale among a group of weights that a width of the model
    is no multiple of: a group would end in the middle."""
    named = re.search(r"^[^#\n]*group_size: *(\d+)", recipe.read_text(encoding="utf-8"), re.M)
    if not named:
        return []
    size, config = int(named[1]), read_json(source / "config.json")
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    widths = {"hidden_size": config["hidden_size"], "all heads": heads * head}
    widths["intermediate_size"] = config.get("intermediate_size") or size
    wrong = [f"{name} {width}" for name, width in widths.items() if width % size]
    if not wrong:
        return []
    fits = [n for n in (128, 64, 32, 16) if not math.gcd(*widths.values()) % n]
    mend = f"copy the recipe with group_size: {fits[0]}" if fits else "take int8 or fp8"
    return [f"{source}: {', '.join(wrong)}: no multiple of group_size {size}; {mend}"]


def quantize(rank: Rank) -> None:
    """Do the stage's work in one process: recipe, model, calibration, save. Raises InputError."""
    rank.phase("imports llm-compressor")
    sys.path.insert(0, str(PACKAGES))
    from llmcompressor.args import DatasetArguments
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {**CALIBRATION, **arguments(rank.arguments, DatasetArguments)}
    recipe, source, rows = read_recipe(rank.config), rank.path("FROM"), []
    if any(modifier.requires_calibration_data for modifier in recipe.modifiers):
        count, longest = given["num_calibration_samples"], given["max_seq_length"]
        rows = calibration(rank.path("DATA"), source, count, longest)
        rank.say(f"calibrates on {len(rows)} conversations")
    rank.phase("loads the model")
    config = read_json(source / "config.json")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **attention(config))
    rank.phase("quantises")
    logger.add(lambda line: _tell(rank, str(line), config["num_hidden_layers"]), level="DEBUG")
    compress(model, AutoTokenizer.from_pretrained(source), recipe, rows, given)
    rank.phase("saves")
    export = rank.directory / EXPORT
    model.save_pretrained(export, save_compressed=True)
    # One made of config.json, without the ends of a turn; the hand-over has the parent's, or ours.
    (export / "generation_config.json").unlink(missing_ok=True)


def read_recipe(file: Path) -> Any:
    """Read a recipe as llm-compressor does. Raises InputError for one that it refuses, or that has
    nothing in it."""
    from llmcompressor.recipe import Recipe

    try:
        recipe = Recipe.create_instance(str(file))
    except Exception as error:  # YAML, its factory and pydantic each raise their own
        raise InputError(f"{file}: {error}") from None
    if not recipe.modifiers:
        raise InputError(f"{file}: names no modifier: nothing would be quantised")
    return recipe


def compress(
    model: Any, tokenizer: Any, recipe: Any, rows: list[list[int]], given: dict[str, Any]
) -> None:
    """Apply a recipe to a model in memory, by the tokens of `rows`; `given` are llm-compressor's
    own arguments of calibration."""
    from datasets import Dataset
    from llmcompressor import oneshot

    for modifier in [m for m in recipe.modifiers if getattr(m, "mappings", 0) is None]:
        modifier.mappings = smoothable(model, rows[0])
        if not modifier.mappings:
            recipe.modifiers.remove(modifier)  # with none it ends with an error
    masks = [[1] * len(ids) for ids in rows]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": masks}) if rows else None,
        # It shuffles without a seed.
        **{"shuffle_calibration_samples": False, **given, "num_calibration_samples": len(rows)},
    )


def smoothable(model: Any, tokens: list[int]) -> list[tuple[list[str], str]]:
    """Return (layers, norm) wherever what a norm puts out goes into linear layers, as one row shows
    it: scaling the one and its inverse on the others changes nothing that the model computes.

    llm-compressor finds them by name. In Gemma 2 and 3 it takes a norm behind attention for the one
    before the feed-forward, and the model is another (0.11 of the range of its logits); it has no
    names for Starcoder 2.
    """
    import torch

    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[Any, Any]] = {}  # by id: the norm, and its output, so that it stays
    found: dict[Any, list[Any]] = {}

    def see_norm(module: Any, _: Any, output: Any) -> None:
        made[id(output)] = (module, output)

    def see_layer(module: Any, given: Any) -> None:
        if given and id(given[0]) in made:
            found.setdefault(made[id(given[0])][0], []).append(module)

    hooks = []
    for module in names:
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(see_layer))
        elif type(module).__name__.endswith("Norm"):
            hooks.append(module.register_forward_hook(see_norm))
    with torch.no_grad():
        model(torch.tensor([tokens[:64]]))
    for hook in hooks:
        hook.remove()
    output = model.get_output_embeddings()  # may be the embedding, and is not quantised
    fed = {norm: layers for norm, layers in found.items() if output not in layers}
    return [([names[layer] for layer in layers], names[norm]) for norm, layers in fed.items()]


def _tell(rank: Rank, line: str, layers: int) -> None:
    """Show how far llm-compressor is, by the layer that its log names."""
    named = re.search(r"\blayers\.(\d+)\.", line)
    if named:
        rank.phase("quantises", f"layer {int(named[1]) + 1} of {layers}")


def arguments(words: list[str], kind: type) -> dict[str, Any]:
    """Read ARGS, key=value each, as llm-compressor's own arguments of calibration, the dataclass
    `kind`. Raises InputError with every one that it does not have or that has another type."""
    import yaml

    found = [f"ARGS: {word}: give key=value" for word in words if "=" not in word]
    pairs = (word.lstrip("-").partition("=") for word in words if "=" in word)
    values = {key: yaml.safe_load(value) for key, _, value in pairs}
    found += [f"ARGS: {problem}" for problem in against_dataclass(kind, values)]
    if found:
        raise InputError(found)
    return values


def calibration(data: Path, model: Path, count: int, longest: int) -> list[list[int]]:
    """Return the tokens of `count` conversations at equal distances in the set, each cut after
    `longest` tokens; all of them where there are fewer. Raises InputError if there is none."""
    files = sorted((data / FOLDERS[CHAT]).glob("*.jsonl"))
    total = (read_json(data / "data.json") or {}).get("rows", {}).get(FOLDERS[CHAT], 0)
    step = max(1, total // count)
    chat, texts = Chat(model), []
    lines = itertools.chain.from_iterable(map(_lines, files))
    for line in itertools.islice(lines, 0, None, step):
        try:
            texts.append(chat.render(json.loads(line)["messages"]))
        except Unusable:  # by this model's template; the set may be made for another's
            continue
        if len(texts) == count:
            break
    if not texts:
        raise InputError(f"{data}: holds no conversation that {model}'s chat template renders")
    return [ids[:longest] for ids in chat.encode(texts)]


def _lines(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8") as lines:
        yield from lines
