"""datatrove's filters and its MinHash over texts: two passes more, where a recipe names `filters`.

    filters:
      - GopherQualityFilter: {min_doc_words: 20}   # any of datatrove's filters, by its arguments
      - MinHash: {n_grams: 5}                      # last: drops near-duplicates

Its steps are called on one unit at a time by our own passes, so that one kill, one set of nodes and
one table serve all. datatrove's executors keep their own record of what is done, which does not
notice an edited input. It is an extra: `make filters` installs it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata  # datatrove uses it without importing it
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scripts.corpus.holdout import FILTERED, KEEP, KINDS, NEAR
from scripts.corpus.passes import Dropped, Work, mask, rows_of
from scripts.corpus.shapes import TEXT
from scripts.run.errors import InputError, nearest

MINHASH = "MinHash"
ENGLISH = "eng"


def check(given: list[dict[str, dict[str, Any]]]) -> None:
    """Make every filter once. Raises InputError naming what is not known, not installed or not
    there, with its mend."""
    try:
        importlib.metadata.version("datatrove")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("filters: datatrove is not installed here: make filters") from None
    found = []
    for place, (name, settings) in enumerate(_named(given)):
        if name == MINHASH and place + 1 < len(given):
            found.append(f"filters: {MINHASH}: must be the last")
        try:
            step = _signatures(Path(), settings) if name == MINHASH else _filter(name, settings)
            getattr(getattr(step, "model", None), "model", None)  # loads a language's model
        except TypeError as problem:
            found.append(f"filters: {name}: {str(problem).rpartition('() ')[2]}")
        except Exception as problem:  # whatever a filter refuses, or cannot download
            away = isinstance(problem, OSError)
            mend = "; leave it out, or run it once on a machine that reaches it" if away else ""
            found.append(f"filters: {name}: {problem}{mend}")
    if found:
        raise InputError(found)


def _named(given: list[dict[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in given:
        for name, settings in entry.items():
            yield name, settings or {}


def _filter(name: str, settings: dict[str, Any], dropped: Any = None) -> Any:
    """Make one of datatrove's filters. Raises InputError for a name that is none."""
    from datatrove.pipeline import filters

    known = [n for n in dir(filters) if n.endswith("Filter") and "Lambda" not in n]
    if name not in known:
        raise InputError(f"no such filter; {nearest(name, [*known, MINHASH])}")
    return getattr(filters, name)(**settings, exclusion_writer=dropped)


def _config(settings: dict[str, Any]) -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    settings = {key: value for key, value in settings.items() if key != "language"}
    known = [f.name for f in dataclasses.fields(MinhashConfig) if not f.name.endswith("_config")]
    for key in set(settings) - set(known):
        raise InputError(f"{key}: no such setting; {nearest(key, [*known, 'language'])}")
    # Its default, xxhash, ends in a TypeError with xxhash 4, which datasets brings.
    return MinhashConfig(**settings, hash_config=HashConfig(hash_fc="sha1"))


def _signatures(folder: Path, settings: dict[str, Any]) -> Any:
    from datatrove.pipeline.dedup import MinhashDedupSignature

    language = settings.get("language", ENGLISH)
    return MinhashDedupSignature(str(folder / "signatures"), _config(settings), language)


class _Reasons:
    """Note what one filter drops, as datatrove's writer of what is excluded."""

    def __init__(self, name: str, dropped: Dropped):
        self.name, self.dropped = name, dropped

    def __enter__(self) -> _Reasons:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, document: Any, rank: int = 0) -> None:
        """Note one document."""
        why = document.metadata.get("filter_reason", "")
        reason = f"{self.name}: {why}" if why else self.name
        self.dropped.add(document.metadata["where"], reason, {"text": document.text})


def sift(work: Work, number: int) -> None:
    """Filter the texts of a unit, and write the signatures of those that pass."""
    if work.done("sift", number):
        return
    dropped, passed = Dropped(work, "sift", number), array("I")
    documents: Any = _documents(work, number)
    for name, settings in _named(work.recipe.filters):
        if name == MINHASH:
            signatures = _signatures(_folder(work), settings)
            signatures.run(_noted(documents, passed), number, len(work.units))
            documents = iter(())
        else:
            step = _filter(name, settings, _Reasons(name, dropped))
            documents = step.run(documents, number, len(work.units))
    for _ in _noted(documents, passed):
        pass
    np.save(work.file("sift", number, ".npy"), np.array(passed, np.uint32))
    work.finish("sift", number, {"dropped": dropped.save()})


def _documents(work: Work, number: int) -> Iterator[Any]:
    from datatrove.data import Document

    for index, what, where, kind, content in rows_of(work, number, mask(work, "first", number)):
        if what == KEEP and kind == TEXT:
            yield Document(content["text"], str(index), metadata={"where": where})


def _noted(documents: Iterator[Any], passed: array[int]) -> Iterator[Any]:
    """Pass documents on, and note each one's row."""
    for document in documents:
        passed.append(int(document.id))
        yield document


def match(work: Work, number: int) -> None:
    """Look for equal signatures in the buckets that fall to this unit's number."""
    if work.done("match", number):
        return
    from datatrove.pipeline.dedup import MinhashDedupBuckets

    for settings in _minhash(work):
        config, folder = _config(settings), _folder(work)
        step = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=config)
        for bucket in range(number, config.num_buckets, len(work.units)):
            step.run(None, bucket, config.num_buckets)
    work.finish("match", number, {})


def decide(work: Work, kinds: np.ndarray, decided: np.ndarray) -> None:
    """Mark the texts that a filter or MinHash drops in `decided`, after both passes; `kinds` and
    `decided` are of all rows, uint8."""
    for settings in _minhash(work):
        from datatrove.pipeline.dedup import MinhashDedupCluster

        folder = str(_folder(work))
        MinhashDedupCluster(f"{folder}/pairs", f"{folder}/remove", _config(settings)).run()
    start = 0
    for number in range(len(work.units)):
        end = start + work.report("look", number)["rows"]
        passed = np.load(work.file("sift", number, ".npy"))
        part = decided[start:end]
        read = (part == KEEP) & (kinds[start:end] == KINDS.index(TEXT))
        read[passed] = False
        part[read] = FILTERED
        near = _folder(work) / "remove" / f"{number:06d}.remove"
        if near.exists():
            part[passed[np.fromfile(near, "<u4")]] = NEAR
        start = end


def _minhash(work: Work) -> list[dict[str, Any]]:
    return [settings for name, settings in _named(work.recipe.filters) if name == MINHASH]


def _folder(work: Work) -> Path:
    return work.folder / "minhash"
