"""What configs name by `_component_`, for torchtune to look up; each is made in scripts/tools."""

from scripts.tools.architecture import torchtune_lora_model, torchtune_model
from scripts.tools.torchtune_data import conversations
from scripts.tools.torchtune_tokenizer import ChatTokenizer

__all__ = ["ChatTokenizer", "conversations", "torchtune_lora_model", "torchtune_model"]
