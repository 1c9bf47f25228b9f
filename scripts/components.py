"""What configs name by `_component_`, for torchtune to look up; each is made in scripts/tools.

Looked up one by one: checking a config must not import torch for a component that it has not.
"""

from importlib import import_module
from typing import Any

WHERE = {
    "ChatTokenizer": "torchtune_tokenizer",
    "Checkpointer": "torchtune_model",
    "conversations": "torchtune_data",
    "decoder": "torchtune_model",
    "lora_decoder": "torchtune_model",
}


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"scripts.components has no {name}; it has {', '.join(WHERE)}")
    return getattr(import_module(f"scripts.tools.{WHERE[name]}"), name)
