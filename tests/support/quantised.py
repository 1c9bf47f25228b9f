"""How far small copies of every family are from themselves when they are quantised, as JSON: a
program of its own, since llm-compressor's packages must not be seen by other tests.

    python -m tests.support.quantised <directory with a tokenizer>
"""

import json
import sys
import tempfile
from pathlib import Path

from scripts.tools import compressor
from scripts.tools.decoder import attention
from tests.support.families import FAMILIES, write_family
from tests.support.runs import ROOT

SMOOTHED = "default_stage: {default_modifiers: {SmoothQuantModifier: {smoothing_strength: 0.8}}}\n"


def recipes(folder: Path) -> list[Path]:
    """Write the recipes with a group that divides the widths of small copies, and one that rounds
    nothing."""
    for path in (ROOT / "configs/quantize").glob("*.yaml"):
        text = path.read_text().replace("group_size: 64", "group_size: 32")
        (folder / path.name).write_text(text)
    (folder / "smoothed.yaml").write_text(SMOOTHED)
    return sorted(folder.glob("*.yaml"))


def main(directory: str) -> None:
    """Print {family: {recipe: mean difference of the logits, of their range}}."""
    sys.path.insert(0, str(compressor.PACKAGES))
    import torch
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.remove()
    tokenizer, found = AutoTokenizer.from_pretrained(directory), {}
    torch.manual_seed(0)
    rows, asked = torch.randint(3, 500, (8, 64)).tolist(), torch.randint(3, 500, (1, 96))
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            source = write_family(name, Path(folder, "model"))
            options = attention(json.loads((source / "config.json").read_text()))
            for path in recipes(Path(folder)):
                model = AutoModelForCausalLM.from_pretrained(source, **options)
                with torch.no_grad():
                    before = model(asked).logits
                recipe = compressor.read_recipe(path)
                needs = any(m.requires_calibration_data for m in recipe.modifiers)
                compressor.compress(model, tokenizer, recipe, rows if needs else [], {})
                with torch.no_grad():
                    away = (model(asked).logits - before).abs().mean()
                away = away / (before.max() - before.min())
                found.setdefault(name, {})[path.stem] = away.item()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
