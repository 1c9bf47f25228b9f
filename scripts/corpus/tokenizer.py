"""The tokenizer and the chat template of models that are pretrained here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, END_OF_TURN = "<|begin|>", "<|end_of_text|>", "<|end_of_turn|>"
SPECIAL_TOKENS = [BOS, EOS, END_OF_TURN, "<|system|>", "<|user|>", "<|assistant|>"]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end_of_turn|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, context: int, directory: Path
) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` entries, specials included, and write
    tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json.

    `context` is the model's maximum length in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # With BOS in the post-processor torchtitan, transformers and vLLM all add it to plain text,
    # and each of them once.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    for file, content in {
        "tokenizer_config.json": {**settings, "chat_template": CHAT_TEMPLATE},
        "special_tokens_map.json": names,
    }.items():
        (directory / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return tokenizer
