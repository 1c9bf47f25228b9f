"""Rewards of grpo.yaml: plain functions, yours beside these; a copy is frozen with each run.

TRL calls each with lists that are equally long and adds up what they return, one number an answer:
    completions     [[{"role": "assistant", "content": answer}], …]
    completion_ids  the same as tokens
    prompts         the conversations before it
    answer          what DATA has as the answer to the same prompt
"""

import re

SENTENCE = re.compile(r"[A-Z].*[.!?]", re.S)  # from a capital letter to a full stop
LONG = 64  # tokens; an answer of twice as many earns nothing


def said(completion):
    """Return the text of an answer."""
    return completion[0]["content"].strip()


def exact_match(completions, answer, **_):
    """Give 1 for DATA's answer, word for word."""
    return [float(said(one) == right.strip()) for one, right in zip(completions, answer)]


def sentence(completions, **_):
    """Give 1 for an answer that SENTENCE matches whole."""
    return [float(bool(SENTENCE.fullmatch(said(one)))) for one in completions]


def short(completion_ids, **_):
    """Give 1 for at most LONG tokens, less for more, 0 for twice as many."""
    return [max(0.0, min(1.0, 2 - len(ids) / LONG)) for ids in completion_ids]
