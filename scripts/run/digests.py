"""Digests of files and directories."""

from __future__ import annotations

import hashlib
from pathlib import Path

from scripts.run.layout import (
    as_fact,
    record,
)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def digest_tree(directory: Path) -> str:
    """Digest of a directory: sha256 over the sorted lines "<sha256>  <relative path>" of its files, so
    `cd DIR && find . -type f | sed 's,^./,,' | LC_ALL=C sort | xargs -d'\\n' sha256sum | sha256sum` agrees."""
    files = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    lines = "".join(f"{sha256(directory / name)}  {name}\n" for name in files)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def describe(directory: Path) -> dict:
    """{"path", "digest"} of an input directory: the digest that its own stage recorded, else one of its bytes."""
    outputs = (record(directory.parent) or {}).get("outputs", {})
    known = outputs.get(directory.name) or {"digest": digest_tree(directory)}
    return {"path": as_fact(directory), "digest": known["digest"]}
