"""How the demo makes every set out of one text: what it lacks is derived from what it has.

Conversations come from neighbouring sentences of the documents, documents from the conversations,
preferences from right answers against other answers; a small text is then split by sentence, so
that nothing held out is ever trained on. Only a recipe with `derive: true` does so. Every choice is
made by hash or by a fixed seed: the same corpus gives the same bytes.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, field

from scripts.run.errors import InputError

CHOICES = 4  # answers per multiple-choice question: chance is 1 / CHOICES
KEY_WORDS = 4  # a sentence of fewer words is too common to hold out ("Return self.")
MIN_HELD_OUT = 20  # questions below which an evaluation says nothing at all


@dataclass
class Corpus:
    """Hold the material of one source. A conversation is a list of {"role", "content"} that ends
    with the assistant; a preference is {"chosen": conversation, "rejected": conversation}."""

    name: str
    documents: list[str] = field(default_factory=list)
    conversations: list[list[dict]] = field(default_factory=list)
    preferences: list[dict] = field(default_factory=list)


def conversation(question: str, answer: str) -> list[dict]:
    """Make a conversation of one user turn and one assistant turn."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass
class Splits:
    """Hold training and held-out sets; the keys of `sets` are the names of the files."""

    sets: dict[str, list[dict]]
    held_out_sentences: list[str]  # normalised; none of them occurs in any training set


def normalise(text: str) -> str:
    """Reduce a text to its words, in lower case with single spaces: two sentences count as the
    same if this is."""
    return " ".join(re.findall(r"\w+", text.lower()))


def sentences(text: str) -> list[str]:
    """List the sentences of a text in order; where it has none, as a log, each line is one."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        parts = re.split(r"(?<=[.!?])\s+", paragraph.strip())
        for part in parts:
            long = len(part.split()) > 60
            pieces = part.splitlines() if long else [" ".join(part.split())]
            found += [s.strip() for s in pieces if s.strip()]
    return found


def split(corpus: Corpus) -> Splits:
    """Make every set from one corpus. Raises InputError if it is too small to hold text out."""
    documents = _unique(corpus.documents, normalise)
    last_pairs = [_last_pair(turns) for turns in corpus.conversations]
    pairs = _unique(last_pairs, lambda pair: normalise(" ".join(pair)))
    multi_turn = [turns for turns in corpus.conversations if len(turns) > 2]
    preferences = list(corpus.preferences)
    if not documents:
        conversations = corpus.conversations + [p["chosen"] for p in preferences]
        documents = ["\n\n".join(turn["content"] for turn in turns) for turns in conversations]
    if not pairs:
        pairs = [_last_pair(p["chosen"]) for p in preferences] or _neighbours(documents)

    # Held-out answers, and whole held-out documents with every sentence in them.
    answers = {normalise(answer) for _, answer in pairs}
    answers = {key for key in answers if len(key.split()) >= KEY_WORDS}
    share = max(12, min(30, 60000 // max(1, len(answers))))  # per cent
    held_answers = {key for key in answers if _bucket(key) < share}
    held_documents = documents[-1:]
    if len(documents) > 50:
        held_documents = [d for d in documents if _bucket("document " + normalise(d)) < 3]
    held = _Phrases(held_answers | {normalise(s) for d in held_documents for s in sentences(d)})
    kept = set(map(id, held_documents))
    rests = (held.remove_from(d) for d in documents if id(d) not in kept)
    training_documents = [text for text in rests if text]

    train_pairs = [p for p in pairs if not held.any_in(p[0]) and not held.any_in(p[1])]
    held_pairs = [p for p in pairs if normalise(p[1]) in held_answers]
    test_pairs = _unique(held_pairs, lambda pair: normalise(pair[1]))
    train_sft = [{"messages": conversation(*p)} for p in train_pairs]
    train_sft += [{"messages": turns} for turns in multi_turn if not held.any_in_turns(turns)]
    if len(test_pairs) < MIN_HELD_OUT or not training_documents or not train_sft:
        raise InputError(
            f"{corpus.name}: too small: {len(documents)} documents and {len(pairs)} questions "
            f"leave {len(test_pairs)} held-out questions, {MIN_HELD_OUT} are needed; give DATA "
            "about 100 kB of text or more"
        )
    rng = random.Random(0)
    train_answers, test_answers = [a for _, a in train_pairs], [a for _, a in test_pairs]
    if preferences:
        preferences = [p for p in preferences if not any(map(held.any_in_turns, p.values()))]
    else:
        chosen = rng.sample(train_pairs, min(2000, len(train_pairs)))
        preferences = [_preference(q, a, _others(rng, train_answers, a, 1)[0]) for q, a in chosen]
    choices = []
    # Neighbours by name ask alike, and the control with shuffled questions needs unrelated ones.
    rng.shuffle(test_pairs)
    others = test_pairs[1:] + test_pairs[:1]
    for (question, answer), (other_question, _) in zip(test_pairs, others):
        options = [answer, *_others(rng, test_answers, answer, CHOICES - 1)]
        rng.shuffle(options)
        choices.append(
            {
                "question": question,
                "shuffled_question": other_question,
                "choices": options,
                "answer": options.index(answer),
            }
        )
    held_preferences = [
        _preference(q, a, _others(rng, test_answers, a, 1)[0]) for q, a in test_pairs
    ]
    rng.shuffle(training_documents)
    # Packing keeps the file's order: neighbours by name would share a row and a batch.
    rng.shuffle(train_sft)
    return Splits(
        sets={
            "text.jsonl": [{"text": d} for d in training_documents],
            "sft.jsonl": train_sft,
            "preference.jsonl": preferences,
            "heldout_text.jsonl": [{"text": d} for d in held_documents],
            "heldout_sft.jsonl": [{"messages": conversation(*p)} for p in test_pairs],
            "heldout_choice.jsonl": choices,
            "heldout_preference.jsonl": held_preferences,
        },
        held_out_sentences=sorted(held.phrases),
    )


class _Phrases:
    """Find any of many word sequences inside texts, in one pass over each text."""

    def __init__(self, phrases: set[str]):
        self.phrases = {p for p in phrases if len(p.split()) >= KEY_WORDS}
        self.by_key: dict[tuple, list[list[str]]] = {}
        for phrase in self.phrases:
            words = phrase.split()
            self.by_key.setdefault(tuple(words[:KEY_WORDS]), []).append(words)

    def any_in(self, text: str) -> bool:
        """Tell whether a text holds any of the phrases."""
        words = normalise(text).split()
        return any(
            words[i : i + len(phrase)] == phrase
            for i in range(len(words) - KEY_WORDS + 1)
            for phrase in self.by_key.get(tuple(words[i : i + KEY_WORDS]), ())
        )

    def any_in_turns(self, turns: list[dict]) -> bool:
        """Tell whether any turn of a conversation holds any of the phrases."""
        return any(self.any_in(turn["content"]) for turn in turns)

    def remove_from(self, document: str) -> str:
        """Return the document without the sentences that hold a phrase; "" if less than a
        sentence is left."""
        if not self.any_in(document):
            return document
        rest = "\n\n".join(filter(None, map(self._clean, re.split(r"\n\s*\n", document))))
        return "" if len(rest.split()) < KEY_WORDS or self.any_in(rest) else rest

    def _clean(self, paragraph: str) -> str:
        if not self.any_in(paragraph):
            return paragraph
        kept = "\n".join(s for s in sentences(paragraph) if not self.any_in(s))
        return "" if self.any_in(kept) else kept  # a phrase may span two sentences


def _unique(items: list, key) -> list:
    return list({key(item): item for item in reversed(items)}.values())[::-1]


def _bucket(key: str) -> int:
    """Return 0…99, the same on every machine (Python's own hash() is salted per process)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100


def _last_pair(turns: list[dict]) -> tuple[str, str]:
    return turns[-2]["content"], turns[-1]["content"]


def _neighbours(documents: list[str]) -> list[tuple[str, str]]:
    """Make a question and its answer of every two neighbouring sentences of the documents."""
    pairs = []
    for document in documents:
        short = (s for s in sentences(document) if len(s) <= 240)
        found = [s for s in short if KEY_WORDS <= len(s.split()) <= 40]
        pairs += [(f"What comes after: {a}", b) for a, b in zip(found[::2], found[1::2])]
    return pairs


def _others(rng: random.Random, answers: list[str], answer: str, count: int) -> list[str]:
    """Draw `count` different answers that are not `answer`. Raises InputError."""
    pool = rng.sample(answers, min(len(answers), 20 * (count + 1)))
    found = _unique([a for a in pool if normalise(a) != normalise(answer)], normalise)[:count]
    if len(found) < count:
        few = "too few different answers to make multiple-choice questions"
        raise InputError(f"{few}; give DATA more distinct text")
    return found


def _preference(question: str, chosen: str, rejected: str) -> dict:
    return {"chosen": conversation(question, chosen), "rejected": conversation(question, rejected)}
