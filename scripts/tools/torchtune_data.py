"""torchtune's dataset of conversations, from the data stage's sets.

torchtune's own chat_dataset learns every answer; here a turn of weight 0 is read and not learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def conversations(
    tokenizer: Any, *, data_files: list[str], train_on_input: bool = False, packed: bool = False
) -> Any:
    """Make torchtune's SFTDataset of conversations in JSON lines, {"messages": [{"role", "content",
    "weight"}]}; packed into rows of the tokenizer's max_seq_len if `packed`."""
    from torchtune.datasets import PackedDataset, SFTDataset

    rows = SFTDataset(
        source="json",
        message_transform=_Messages(train_on_input),
        model_transform=tokenizer,
        split="train",
        data_files=list(data_files),
    )
    return PackedDataset(rows, max_seq_len=tokenizer.max_seq_len) if packed else rows


class _Messages:
    """Make torchtune's messages of a row; masked ones are not learned."""

    def __init__(self, train_on_input: bool):
        self.train_on_input = train_on_input

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        from torchtune.data import Message

        return {
            "messages": [
                Message(
                    role=turn["role"],
                    content=turn["content"],
                    masked=not turn.get("weight", 1)
                    or (turn["role"] != "assistant" and not self.train_on_input),
                )
                for turn in row["messages"]
            ]
        }
