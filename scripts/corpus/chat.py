"""How a conversation becomes tokens: by the chat template of a Hugging Face directory.

The template is the only place that says so; torchtune, lm-eval and vLLM all render it from the
model directory, so training, evaluation and serving cannot disagree.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from scripts.corpus.turns import Unusable
from scripts.run.errors import InputError
from scripts.run.files import read_json
from scripts.run.modeldir import chat_template, special_token


class Piece(NamedTuple):
    """Hold a part of a rendered conversation: what is asked, or an answer with its end."""

    text: str
    turns: Sequence[dict[str, Any]]  # that it renders
    answer: bool


class Chat:
    """Render and tokenize conversations as one Hugging Face directory does.

    Raises InputError if it has no tokenizer.
    """

    def __init__(self, directory: Path):
        settings = read_json(directory / "tokenizer_config.json")
        if settings is None or not (directory / "tokenizer.json").exists():
            raise InputError(f"{directory}: no tokenizer.json and tokenizer_config.json")
        self.directory = directory
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        keys = ("bos_token", "eos_token", "pad_token")
        self.names = {key: special_token(settings, key) for key in keys}
        self.bos, self.eos = (self.id(self.names[key]) for key in keys[:2])
        self.source = chat_template(directory)

    def id(self, token: str | None) -> int | None:
        """Return a token's number, None for no token."""
        return None if token is None else self.tokenizer.token_to_id(token)

    @functools.cached_property
    def template(self) -> Template:
        """Return the compiled chat template. Raises InputError if there is none, or a bad one."""
        if not self.source:
            raise InputError(f"{self.directory}: no chat template; conversations need one")
        try:
            return template_from(self.source)
        except TemplateError as error:
            raise InputError(f"{self.directory}: chat template: {error}") from None

    def render(self, turns: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Render a conversation. Raises Unusable where the template refuses it."""
        names = {key: value or "" for key, value in self.names.items()}
        try:
            return self.template.render(
                messages=turns, add_generation_prompt=add_generation_prompt, **names
            )
        except TemplateError as error:
            raise Unusable(f"the chat template refuses it: {error}") from None

    def pieces(self, turns: Sequence[dict[str, Any]]) -> list[Piece]:
        """Cut a rendered conversation where each answer begins and where its turn ends.

        Each piece is encoded alone: at serving time, too, the prompt is encoded without the answer,
        so no token may span that boundary. Raises Unusable, and InputError for a template that
        does not render a conversation as a prefix of its continuation.
        """
        found: list[Piece] = []
        done, asked = "", 0
        for position, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self.render(turns[:position], add_generation_prompt=True)
            after = self.render(turns[: position + 1])
            if not before.startswith(done) or not after.startswith(before):
                raise InputError(
                    f"{self.directory}: its chat template does not render a conversation as a "
                    "prefix of its continuation; simplify it: training on such a template would "
                    "teach other text than serving sends"
                )
            found.append(Piece(before[len(done) :], turns[asked:position], False))
            found.append(Piece(after[len(before) :], turns[position : position + 1], True))
            done, asked = after, position + 1
        return found

    def check(self, turns: Sequence[dict[str, Any]]) -> None:
        """Raise InputError if the template shows an answer otherwise than it was given: what would
        be learned is then not the answer."""
        for piece in self.pieces(turns):
            said = piece.turns[0]["content"].strip() if piece.answer else ""
            if said not in piece.text:
                raise InputError(
                    f"{self.directory}: its chat template changes an answer: {said[:60]!r} becomes "
                    f"{piece.text[:60]!r}; finetuning would learn the latter"
                )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of rendered texts; special tokens written in them count as such."""
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of documents to pretrain on, each between the begin and end tokens."""
        begin = [] if self.bos is None else [self.bos]
        end = [] if self.eos is None else [self.eos]
        return [begin + ids + end for ids in self.encode(texts)]


@functools.lru_cache
def template_from(source: str) -> Template:
    """Compile a chat template with the settings, functions and filters of transformers and vLLM, in
    a sandbox: a downloaded template may not run code."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    environment.filters["tojson"] = _as_json
    return environment.from_string(source)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)  # local time, as transformers has it


def _as_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
