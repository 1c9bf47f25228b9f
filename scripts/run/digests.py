"""Digests of files and directories. A digest is of the bytes that are there now: what was hashed
before is remembered by size, times and inode, so a file that was changed since is hashed again."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from scripts.run.errors import InputError
from scripts.run.files import read_json, write_json
from scripts.run.layout import Run, as_fact


def sha256(path: Path) -> str:
    """Compute the hex digest of a file's bytes, in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


class Digests:
    """Hash files for one run, each once while it stays as it is (runs/<run>/digests.json)."""

    def __init__(self, run: Run, remember: bool = True):
        self.run, self.remember = run, remember
        self.file = run.directory / "digests.json"
        try:
            known = read_json(self.file)
        except InputError:  # a cache: broken, it is made anew
            known = None
        self.known: dict[str, list[Any]] = known if isinstance(known, dict) else {}

    def of_file(self, path: Path) -> str:
        """Return the hex digest of a file, from memory if size, times and inode are the same."""
        found = path.stat()
        # ctime, too: an edit can put mtime back, and cp -p keeps it.
        mark = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self.known.get(str(path.resolve()))
        if not (isinstance(known, list) and known[:-1] == mark):
            known = [*mark, sha256(path)]
            self.known[str(path.resolve())] = known
        return str(known[-1])

    def of_tree(self, path: Path) -> str:
        """Return "sha256:…" of a file, or of a directory: over the lines
        "<sha256>  <relative path>" of its files, sorted by path, so that
        `cd DIR && find -L . -type f | sed 's,^./,,' | LC_ALL=C sort | xargs -d'\\n' sha256sum |
        sha256sum` agrees. A link counts as what it leads to."""
        before = dict(self.known)
        if path.is_dir():
            names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
            lines = "".join(f"{self.of_file(path / name)}  {name}\n" for name in names)
            digest = hashlib.sha256(lines.encode()).hexdigest()
        else:
            digest = self.of_file(path)
        if self.remember and self.known != before and self.run.directory.is_dir():
            with contextlib.suppress(OSError):  # somebody else's run, a full disk: hashed again
                write_json(self.file, self.known)
        return "sha256:" + digest

    def describe(self, path: Path) -> dict[str, str]:
        """Return {"path", "digest"} of an input or output, as stage.json records it."""
        return {"path": as_fact(path, self.run.root), "digest": self.of_tree(path)}
