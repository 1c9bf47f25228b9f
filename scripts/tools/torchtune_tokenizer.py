"""torchtune's tokenizer for any Hugging Face directory, with the directory's own chat template.

torchtune 0.6.1 knows a prompt format per model family; this renders the template that lm-eval and
vLLM render.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from scripts.corpus.tokenizer import template_from
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.run.modeldir import chat_template


class ChatTokenizer:
    """Tokenize for torchtune (ModelTokenizer in torchtune/modules/transforms/tokenizers/_utils.py).

    `path` is the Hugging Face directory; `max_seq_len` the longest conversation in tokens (None:
    the model's context). A longer one raises InputError: cutting an answer off would teach the
    model to stop mid-sentence.
    """

    def __init__(self, path: str, max_seq_len: int | None = None):
        directory = Path(path)
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        settings = read_json(directory / "tokenizer_config.json")
        named = {key: settings.get(key) for key in ("bos_token", "eos_token", "pad_token")}
        self.names = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()}
        self.bos_id = self._id(self.names["bos_token"])
        self.eos_id = self._id(self.names["eos_token"])
        self.pad_id = self._id(self.names["pad_token"] or self.names["eos_token"])
        added = read_json(directory / "tokenizer.json").get("added_tokens", [])
        self.special_tokens = {token["content"]: token["id"] for token in added}
        self.stop_tokens = [self.eos_id]
        config = read_json(directory / "config.json")
        self.max_seq_len = max_seq_len or config["max_position_embeddings"]
        self.template = template_from(chat_template(directory))

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.tokenizer.token_to_id(token)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Return the token ids of plain text; special tokens written in it count as such."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        begin = [self.bos_id] if add_bos and self.bos_id is not None else []
        end = [self.eos_id] if add_eos and self.eos_id is not None else []
        return begin + ids + end

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Render a conversation ({"role", "content"} each) by the directory's chat template."""
        names = {key: value or "" for key, value in self.names.items()}
        return self.template.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **names
        )

    def tokenize_messages(self, messages: list, **_: Any) -> tuple[list[int], list[bool]]:
        """Return the token ids of a conversation and its mask (True: not learned), equally long.

        The text is cut where an answer begins and where its turn ends, and each piece is encoded
        alone: at serving time, too, the prompt is encoded without the answer, so no token may
        span that boundary. Raises InputError.
        """
        turns = [{"role": m.role, "content": m.text_content} for m in messages]
        ids: list[int] = []
        mask: list[bool] = []
        done, asked = "", 0
        for position, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.render(turns[:position], add_generation_prompt=True)
            after = self.render(turns[: position + 1])
            if not before.startswith(done) or not after.startswith(before):
                raise InputError(
                    "the chat template does not render a conversation as a prefix of its "
                    "continuation; simplify it: training on such a template would teach other text "
                    "than serving sends"
                )
            prompt_masked = all(m.masked for m in messages[asked:position])
            prompt, answer = before[len(done) :], after[len(before) :]
            for text, masked in ((prompt, prompt_masked), (answer, message.masked)):
                piece = self.encode(text)
                ids += piece
                mask += [masked] * len(piece)
            done, asked = after, position + 1
        if len(ids) > self.max_seq_len:
            raise InputError(
                f"a conversation of {len(ids)} tokens is longer than {self.max_seq_len}; shorten "
                f"or remove the one that begins {turns[0]['content'][:60]!r}, or raise "
                "tokenizer.max_seq_len"
            )
        return ids, mask

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> Mapping[str, Any]:
        """Replace sample["messages"] by "tokens" and "mask" (torchtune's transform)."""
        sample = dict(sample)
        sample["tokens"], sample["mask"] = self.tokenize_messages(sample.pop("messages"))
        return sample
