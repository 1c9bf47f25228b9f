"""Bring a file or a folder of this machine to the volume, in chunks that the desk acknowledges: cut
off, the same command goes on after the last. It lies there under its digest, once for all runs."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

from scripts.clusters.kubectl import Kubectl
from scripts.clusters.kubernetes_text import VOLUME
from scripts.run.digests import Digests
from scripts.run.errors import InputError
from scripts.run.layout import Run

CHUNK = 32 << 20  # bytes: seconds on a slow line
MOST = 4 << 30  # bytes, by way of the API server


class Bringer:
    """Know what is to be brought for this command, and bring it."""

    def __init__(self, kubectl: Kubectl):
        self.kubectl = kubectl
        self._paths: dict[str, tuple[Path, str]] = {}  # fact: (path here, digest)

    def place(self, path: Path, run: Run) -> str:
        """Return where a path of this machine will be in pods. Reads it all; writes nothing. Raises
        InputError for more than MOST."""
        size = sum(file.stat().st_size for file in _files(path))
        if size > MOST:
            raise InputError(
                f"{path}: {size / 2**30:.1f} GiB; {MOST >> 30} GiB at most go through the API"
                f" server. Copy it to the volume yourself and give its path there, {VOLUME}/…, or"
                " let the volume be filled from an object store by its CSI driver"
            )
        digest = Digests(run, remember=False).of_tree(path).partition(":")[2]
        fact = f"{VOLUME}/.brought/{digest[:16]}/{path.name}"
        self._paths[fact] = (path, digest)
        return fact

    def lines(self, facts: dict[str, str]) -> str:
        """Format what a dry run says of these facts: no line that one could paste brings them."""
        named = {fact: self._paths[fact][0] for fact in facts.values() if fact in self._paths}
        return "".join(f"# make brings {path} to {fact}\n" for fact, path in named.items())

    def bring(self, facts: dict[str, str]) -> None:
        """Bring what these facts name, as far as it is not there. Raises InputError."""
        for fact in facts.values():
            if fact in self._paths:
                self._bring(fact, *self._paths[fact])

    def _bring(self, fact: str, path: Path, digest: str) -> None:
        there = json.loads(self.kubectl.volume("have", fact))
        if there is None:  # whole
            return
        files = _files(path)
        size, sent = sum(file.stat().st_size for file in files), 0
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            at = min(there.get(name, 0), file.stat().st_size)
            sent += at
            with open(file, "rb") as opened:
                opened.seek(at)
                while (chunk := opened.read(CHUNK)) or at == 0:
                    words = ("append", fact, name, str(at), sha256(chunk).hexdigest())
                    self.kubectl.volume(*words, given=chunk)
                    at, sent = at + len(chunk), sent + len(chunk)
                    print(f"  {path.name}: {sent >> 20} of {size >> 20} MiB are there", flush=True)
                    if not chunk:
                        break
        self.kubectl.volume("keep", fact, digest)


def _files(path: Path) -> list[Path]:
    """List the files of a folder, links followed, or the file itself."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and os.access(p, os.R_OK))
