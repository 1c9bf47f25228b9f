"""Whether prepared sets fit the model that is to be trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.run.digests import sha256


def tokenizer_differs(made: Mapping[str, Any], model: Path) -> list[str]:
    """Return a problem if sets (`made` is their data.json) were prepared with another tokenizer
    than a model's: their tokens would mean other text, their lengths other lengths."""
    if made.get("tokenizer") == f"sha256:{sha256(model / 'tokenizer.json')}":
        return []
    return [
        f"DATA was prepared with another tokenizer than {model}'s; prepare it in a run of its own "
        "with this FROM"
    ]
