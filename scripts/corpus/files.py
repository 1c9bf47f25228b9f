"""The files that DATA names: which there are, what each is, and where it can be cut.

lines.py reads those of lines and columnar.py the others; the launcher looks here, too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple, Optional

from scripts.run.errors import InputError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".zst")
KNOWN = ".jsonl .json .csv .tsv .parquet .arrow .txt .md, each also as .gz or .zst"
# What stands beside data and is none, by name in lower case.
BESIDE = re.compile(r"(readme|license|changelog)(\..*)?|dataset_infos?\.json|state\.json")
MAGIC = {
    b"\037\213": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"\x7fELF": "a program",
    b"\xfd7zXZ": "xz",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\xff\xfe": "UTF-16 text: iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "UTF-16 text: iconv -f utf-16 -t utf-8",
}
# A data set of the hub, as owner/name or owner/name:split.
HUB_ID = re.compile(r"(hf://(datasets/)?)?[\w.-]+/[\w.-]+(:[\w.\[\]%-]+)?")
MAX_ROW = 64 << 20  # bytes of one row
BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"


class File(NamedTuple):
    """Name one file of a source, and what it is."""

    path: Path
    format: str
    compression: str  # "", ".gz" or ".zst"


class Unit(NamedTuple):
    """Name a part of a file that one process reads at a time.

    `start` and `end`: bytes of a jsonl or text file, row groups of parquet; 0 and 0: all of it.
    """

    file: File
    start: int = 0
    end: int = 0


def find(path: Path) -> tuple[list[File], list[str]]:
    """List the data files of a file or folder in order, and what was passed over in a folder.

    Raises InputError naming every file that is not what its name says, or what there is instead of
    data.
    """
    if not path.exists():
        raise InputError(f"DATA={path}: no such file or folder")
    if not path.is_dir():
        kinds = {path: _by_name(path.name)}
    else:
        kinds = {}
        for folder, folders, names in os.walk(path, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                beside = name.startswith(".") or BESIDE.fullmatch(name.lower())
                kinds[Path(folder, name)] = None if beside else _by_name(name)
    files = [File(file, *kind) for file, kind in kinds.items() if kind]
    passed = [str(file.relative_to(path)) for file, kind in kinds.items() if not kind]
    problems = [f"{file.path}: {what}" for file in files if (what := _other_content(file))]
    if not files:
        there = ", ".join(passed[:5]) + (", …" if len(passed) > 5 else "")
        what = "is empty"
        if passed:
            what = f"holds {there}" if path.is_dir() else "not a file that can be read"
        problems = [f"DATA={path}: {what}; give {KNOWN}, or a folder of them"]
    if problems:
        raise InputError(problems[:20])
    return files, passed


def _by_name(name: str) -> Optional[tuple[str, str]]:
    """Return (format, compression) as a file's name tells them, None for no format known here."""
    name, compression = name.lower(), ""
    if name.endswith(COMPRESSIONS):
        name, _, ending = name.rpartition(".")
        compression = "." + ending
    kind = FORMATS.get("." + name.rpartition(".")[2])
    return (kind, compression) if kind else None


def _other_content(file: File) -> str:
    """Say why a file is not what its name says, "" if it is."""
    try:
        with open(file.path, "rb") as stream:
            head = stream.read(BLOCK)
    except OSError as error:
        return f"{error.strerror}"
    if not head:
        return "empty; give it rows or leave it out of DATA"
    found = next((what for magic, what in MAGIC.items() if head.startswith(magic)), "")
    if head[257:262] == b"ustar":
        found = "a tar archive"
    wanted = {".gz": "gzip", ".zst": "zstd"}.get(file.compression, "")
    if not wanted and file.format in ("parquet", "arrow"):
        wanted = file.format if file.format == "parquet" or found else ""  # a stream has no mark
    if found != wanted:
        if not found:
            return f"not {wanted}, as its name says"
        mend = "unpack it" if "archive" in found else "give it the name of what it is"
        return f"{found}, not what its name says; {mend}"
    if not wanted and file.format != "arrow" and _control_characters(head) > 0.01:
        return "more than 1 % control characters: not text"
    return ""


def _control_characters(head: bytes) -> float:
    """Return the share of bytes that no text has."""
    text = bytes(c for c in range(256) if c >= 32 or c in b"\t\n\r\f\x1b\b")
    return len(head.translate(None, text)) / len(head)


def units(file: File, size: int) -> list[Unit]:
    """Cut a file into parts of about `size` bytes, where its format allows it."""
    length = file.path.stat().st_size
    if file.compression or file.format not in ("jsonl", "text") or length <= size:
        return [Unit(file)]
    return [Unit(file, at, min(at + size, length)) for at in range(0, length, size)]
