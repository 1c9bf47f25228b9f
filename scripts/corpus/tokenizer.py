"""The tokenizer and the chat template of models that are pretrained here.

The template is the only place that says how a conversation becomes text; torchtune, lm-eval and
vLLM all render it from the model directory, so training, evaluation and serving cannot disagree.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scripts.run.errors import InputError

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


def render(conversation: list[dict]) -> str:
    """Render a conversation by CHAT_TEMPLATE."""
    return template_from(CHAT_TEMPLATE).render(
        messages=conversation, bos_token=BOS, eos_token=EOS, add_generation_prompt=False
    )


@functools.lru_cache
def template_from(source: str) -> Template:
    """Compile a chat template with the settings of transformers and vLLM, in a sandbox: a
    downloaded template may not run code."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)


def tokenize(sets: dict[str, list[dict]], sizes: dict, directory: Path) -> dict:
    """Train the tokenizer of a model of these `sizes` (tools/architecture.py) on the training
    sets, into `directory`.

    Returns {"tokens": of the pretraining text, "vocabulary": entries}. Raises InputError naming
    conversations that are longer than the model's context (the first 20).
    """
    documents = [row["text"] for row in sets["text.jsonl"]]
    turns = [turn["content"] for row in sets["sft.jsonl"] for turn in row["messages"]]
    tokenizer = train_tokenizer(documents + turns, sizes["vocab"], sizes["context"], directory)
    chats = [row["messages"] for row in sets["sft.jsonl"]]
    chats += [row[side] for row in sets["preference.jsonl"] for side in ("chosen", "rejected")]
    texts = [render(chat) for chat in chats]
    lengths = [len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    long = [(length, chat) for length, chat in zip(lengths, chats) if length > sizes["context"]]
    if long:
        raise InputError(
            f"a conversation of {length} tokens is longer than the model's context of "
            f"{sizes['context']}; shorten or remove the one that begins "
            f"{chat[0]['content'][:60]!r}"
            for length, chat in long[:20]
        )
    tokens = sum(
        len(e.ids) + 1 for e in tokenizer.encode_batch(documents)
    )  # + 1: the end of each document
    return {"tokens": tokens, "vocabulary": tokenizer.get_vocab_size()}
