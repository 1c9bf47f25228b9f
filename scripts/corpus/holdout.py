"""Which rows are held out, which are duplicates, and which training rows hold a held-out one.

Rows are told apart by 64-bit hashes, so memory is 17 bytes a row. Held out is decided by the hash
of the *prompt*: two answers to one question stay on one side. Leaks are found as in Tülu 3 (arXiv
2411.15124, § 3.2): a training row goes if the 8-grams that it shares with one held-out item cover
at least half of that item; 8-grams of more than ten training rows are common phrases and do not
count (GPT-3, arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from scripts.corpus.shapes import CHAT, PAIR, TEXT

KINDS = (TEXT, CHAT, PAIR)
LEAST, MOST = 20, 2000  # rows held out of one kind
COMMON = 10  # rows that share a prompt or an 8-gram before it counts as a common phrase
GRAM = 8  # words
COVERED = 0.5
ITEM_WORDS = 512  # of a held-out row that are compared
# What is decided of a row. USED: a bad answer that stands in a pair; GONE: could not be read;
# FILTERED, NEAR: a text that a filter or MinHash has dropped.
KEEP, HELD, DUPLICATE, LEAK, DROPPED, USED, GONE, FILTERED, NEAR = range(9)


def words(text: str) -> list[str]:
    """Return a text's words in lower case: two texts count as the same if these are."""
    return re.findall(r"\w+", text.lower())


def digest(text: str) -> int:
    """Return a 64-bit hash of a text, the same on every machine.

    Raises UnicodeEncodeError for half a surrogate pair, which is no text.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def keys(kind: str, content: dict[str, Any], seed: int) -> tuple[int, int]:
    """Return the hashes of a row as it is, and of its prompt's words: all turns but the last, no
    system turn; of a document, all of it."""
    whole = digest(json.dumps(content, ensure_ascii=False, sort_keys=True))
    return whole, digest(f"{seed} " + prompt(kind, content))


def prompt(kind: str, content: dict[str, Any]) -> str:
    """Return the words that a row is held out by."""
    if kind == TEXT:
        return " ".join(words(content["text"]))
    turns = content["messages"][:-1] if kind == CHAT else shared_turns(content)
    asked = (" ".join(words(t["content"])) for t in turns if t["role"] != "system")
    return "\n".join(asked)


def shared_turns(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns that both sides of a pair begin with."""
    both = zip(pair["chosen"], pair["rejected"])
    found = []
    for chosen, rejected in both:
        if chosen != rejected:
            break
        found.append(chosen)
    return found


def first_of_each(whole: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Return a mask of the rows that are the first of those alive with their hash."""
    places = np.flatnonzero(alive)
    _, first = np.unique(whole[places], return_index=True)
    mask = np.zeros(len(whole), bool)
    mask[places[first]] = True
    return mask


def choose(
    kinds: np.ndarray, whole: np.ndarray, asked: np.ndarray, alive: np.ndarray, share: float
) -> np.ndarray:
    """Return a mask of the rows to hold out: of each kind `share` of the rows that are alive, at
    least LEAST and at most MOST, those with the smallest hashes of their prompt. None of a kind
    that has fewer than 2 × LEAST rows.

    A prompt of more than COMMON rows says nothing: there the hash of the whole row decides. A row
    goes with its prompt, whatever its kind.
    """
    held = np.zeros(len(kinds), bool)
    places = np.flatnonzero(alive)
    _, inverse, counts = np.unique(asked[places], return_inverse=True, return_counts=True)
    key = np.where(counts[inverse] > COMMON, whole[places], asked[places])
    chosen = np.zeros(len(places), bool)
    for number in range(len(KINDS)):
        own = key[kinds[places] == number]
        count = max(LEAST, min(round(share * len(own)), MOST))
        if share and len(own) >= 2 * LEAST:
            limit = np.partition(own, count - 1)[count - 1]
            chosen |= (kinds[places] == number) & (key <= limit)
    common = counts[inverse] > COMMON
    prompts = np.unique(asked[places][chosen & ~common])
    chosen |= np.isin(asked[places], prompts) & ~common & (kinds[places] != KINDS.index(TEXT))
    held[places] = chosen
    return held


def text(kind: str, content: dict[str, Any]) -> str:
    """Return what of a training row is compared: a document, or all turns but the system's; of a
    pair the chosen side, since the rejected one is not learned."""
    if kind == TEXT:
        return content["text"]
    turns = content["messages" if kind == CHAT else "chosen"]
    return " ".join(turn["content"] for turn in turns if turn["role"] != "system")


def item(kind: str, content: dict[str, Any]) -> list[str]:
    """Return the words of what a held-out row asks for: a document; a last answer, with its
    question where it is shorter than a gram."""
    if kind == TEXT:
        return words(content["text"])[:ITEM_WORDS]
    turns = content["messages" if kind == CHAT else "chosen"]
    answer = words(turns[-1]["content"])
    if len(answer) < GRAM and len(turns) > 1:
        answer = words(turns[-2]["content"]) + answer
    return answer[:ITEM_WORDS]


class Index:
    """Find the 8-grams of held-out items in other texts."""

    def __init__(self, held: Iterable[list[str]]):
        self.numbers: dict[int, int] = {}  # of a gram, by its hash
        self.places: list[list[tuple[int, int]]] = []  # (item, word) where a gram stands
        self.sizes: list[int] = []
        for item, found in enumerate(held):
            self.sizes.append(len(found))
            for at in range(len(found) - GRAM + 1):
                gram = hash(tuple(found[at : at + GRAM]))
                number = self.numbers.setdefault(gram, len(self.places))
                if number == len(self.places):
                    self.places.append([])
                self.places[number].append((item, at))

    def grams(self, text: Sequence[str]) -> set[int]:
        """Return the numbers of the held-out grams in a text's words."""
        get, found = self.numbers.get, set()
        for at in range(len(text) - GRAM + 1):
            number = get(hash(tuple(text[at : at + GRAM])))
            if number is not None:
                found.add(number)
        return found

    def leaks(self, grams: Iterable[int]) -> bool:
        """Tell whether grams of one row cover COVERED of an item."""
        covered: dict[int, set[int]] = {}
        for gram in grams:
            for item, at in self.places[gram]:
                covered.setdefault(item, set()).update(range(at, at + GRAM))
        return any(len(found) >= COVERED * self.sizes[item] for item, found in covered.items())
