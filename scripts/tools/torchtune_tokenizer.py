"""torchtune's tokenizer for any Hugging Face directory, with the directory's own chat template.

torchtune 0.6.1 knows a prompt format per model family; this renders the template that lm-eval and
vLLM render (corpus/chat.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.corpus.chat import Chat
from scripts.corpus.turns import Unusable
from scripts.run.errors import InputError
from scripts.run.files import read_json


class ChatTokenizer:
    """Tokenize for torchtune (ModelTokenizer in torchtune/modules/transforms/tokenizers/_utils.py).

    `path` is the Hugging Face directory; `max_seq_len` the longest conversation in tokens (None:
    the model's context). A longer one raises InputError: cutting an answer off would teach the
    model to stop mid-sentence.
    """

    def __init__(self, path: str, max_seq_len: int | None = None):
        directory = Path(path)
        self.chat = Chat(directory)
        self.bos_id, self.eos_id = self.chat.bos, self.chat.eos
        pad = self.chat.names["pad_token"] or self.chat.names["eos_token"]
        self.pad_id = self.chat.id(pad)
        added = read_json(directory / "tokenizer.json").get("added_tokens", [])
        self.special_tokens = {token["content"]: token["id"] for token in added}
        self.stop_tokens = [self.eos_id]
        config = read_json(directory / "config.json")
        self.max_seq_len = max_seq_len or config["max_position_embeddings"]

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Return the token ids of plain text; special tokens written in it count as such."""
        begin = [self.bos_id] if add_bos and self.bos_id is not None else []
        end = [self.eos_id] if add_eos and self.eos_id is not None else []
        return begin + self.chat.encode([text])[0] + end

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self.chat.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Render a conversation ({"role", "content"} each) by the directory's chat template."""
        return self.chat.render(messages, add_generation_prompt)

    def tokenize_messages(self, messages: list, **_: Any) -> tuple[list[int], list[bool]]:
        """Return the token ids of a conversation and its mask (True: not learned), equally long.
        Raises InputError."""
        turns = [{"role": m.role, "content": m.text_content, "masked": m.masked} for m in messages]
        try:
            pieces = self.chat.pieces(turns)
        except Unusable as problem:
            raise InputError(f"{problem}: {turns[0]['content'][:60]!r}") from None
        ids: list[int] = []
        mask: list[bool] = []
        for piece, found in zip(pieces, self.chat.encode([piece.text for piece in pieces])):
            ids += found
            mask += [all(turn["masked"] for turn in piece.turns)] * len(found)
        if len(ids) > self.max_seq_len:
            raise InputError(
                f"a conversation of {len(ids)} tokens is longer than {self.max_seq_len}; prepare "
                "DATA for this model (make data FROM=…), or raise tokenizer.max_seq_len; it begins "
                f"{turns[0]['content'][:60]!r}"
            )
        return ids, mask

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> Mapping[str, Any]:
        """Replace sample["messages"] by "tokens" and "mask" (torchtune's transform)."""
        sample = dict(sample)
        sample["tokens"], sample["mask"] = self.tokenize_messages(sample.pop("messages"))
        return sample
