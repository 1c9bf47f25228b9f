"""The rows of files of lines: jsonl, json, csv, tsv and text, plain or unpacked by the caller.

Standard library alone: the launcher looks at the first rows before a job is queued.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from scripts.corpus.files import BLOCK, BOM, MAX_ROW, File, Unit
from scripts.run.errors import InputError

CUT_ABOVE = 32 << 10  # bytes of a text file that stays one document
DOCUMENT = 2000  # bytes: about this long are the documents that a longer one is cut into
BETWEEN_VALUES = re.compile(r"[\s,]*")
BLANK_LINE = re.compile(rb"\n[ \t]*\r?\n")
# Numbers keep their digits as text: Python refuses to read one of more than 4,300.
DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


class BadRow(NamedTuple):
    """Stand for a row that cannot be read, and say why."""

    why: str


Rows = Iterator[tuple[str, Any]]  # (where it stands, the row or a BadRow)


def open_plain(file: File) -> IO[bytes]:
    """Open a file that is plain or .gz for reading."""
    return gzip.open(file.path) if file.compression else open(file.path, "rb")  # type: ignore


def rows(unit: Unit, stream: IO[bytes]) -> Rows:
    """Read the rows of a part of a line-based file that is open as `stream`.

    Raises InputError where the file cannot be read on.
    """
    kind = unit.file.format
    if kind == "jsonl" and _head(stream).lstrip()[:1] == b"[":
        kind = "json"  # a list in a file of lines
        unit = unit._replace(end=0)
        if unit.start:
            return
    read = {"jsonl": _lines, "json": _values, "csv": _table, "text": _documents}[kind]
    try:
        yield from read(unit, stream)
    except UnicodeDecodeError as error:
        raise InputError(f"{unit.file.path}: {_not_utf8(error)}") from None
    except (EOFError, OSError, zlib.error) as error:
        how = "cut off" if isinstance(error, EOFError) else str(error)
        raise InputError(f"{unit.file.path}: {how}; copy it again") from None


def _head(stream: IO[bytes]) -> bytes:
    """Return the first bytes, and stay before them."""
    return cast(io.BufferedReader, stream).peek(BLOCK).removeprefix(BOM)


def _not_utf8(error: UnicodeDecodeError) -> str:
    bad = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
    return f"not UTF-8 ({bad}); convert it: iconv -f latin1 -t utf-8"


def _lines(unit: Unit, stream: IO[bytes]) -> Rows:
    path, number, at = unit.file.path, 0, unit.start
    if unit.start:
        stream.seek(unit.start - 1)
        at += len(_whole_line(stream, path, at)) - 1  # it belongs to the part before
    following = at
    while not unit.end or following < unit.end:
        at, number = following, number + 1
        line = _whole_line(stream, path, at)
        if not line:
            return
        following += len(line)
        # A part in the middle does not know its lines' numbers; a byte leads there as well.
        where = f"{path}: byte {at}" if unit.start else f"{path}: line {number}"
        line = line.removeprefix(BOM) if at == 0 else line
        if line.strip():
            yield where, _value(line)


def _value(line: bytes) -> object:
    """Read one line of JSON; return a BadRow if it is none."""
    try:
        text = line.decode("utf-8").strip()
        value, end = DECODER.raw_decode(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value
    except UnicodeDecodeError as error:
        return BadRow(_not_utf8(error))
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON ({error.msg}: column {error.colno})")
    except RecursionError:
        return BadRow("not JSON (nested too deep)")


def _whole_line(stream: IO[bytes], path: Path, at: int) -> bytes:
    """Read the line at a byte. Raises InputError for one that would fill the memory."""
    line = stream.readline(MAX_ROW)
    if len(line) == MAX_ROW and not line.endswith(b"\n"):
        raise InputError(f"{path}: a row of more than 64 MiB at byte {at}; cut it or leave it out")
    return line


def _values(unit: Unit, stream: IO[bytes]) -> Rows:
    """Read JSON values one after the other, and the items of a list one by one."""
    path, number, at, ended = unit.file.path, 0, 0, False
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    buffer = text.read(BLOCK).lstrip()
    listed = buffer.startswith("[")
    at = int(listed)
    while True:
        at = BETWEEN_VALUES.match(buffer, at).end()  # type: ignore[union-attr]
        if listed and buffer.startswith("]", at):
            return
        why = "its list has no end"
        try:
            value, end = DECODER.raw_decode(buffer, at)
            whole = ended or end < len(buffer)  # a number at the end of a block may go on
        except json.JSONDecodeError as error:
            whole, why = False, error.msg if buffer[at:] else why
        if whole:
            at, number = end, number + 1
            yield f"{path}: row {number}", value
        elif not ended:
            buffer, at = buffer[at:], 0
            if len(buffer) > MAX_ROW:
                raise InputError(f"{path}: row {number + 1}: not JSON, or of more than 64 MiB")
            more = text.read(max(BLOCK, len(buffer)))
            buffer, ended = buffer + more, not more
        elif listed or buffer[at:]:
            raise InputError(f"{path}: row {number + 1}: not JSON, or cut off ({why})")
        else:
            return


def _table(unit: Unit, stream: IO[bytes]) -> Rows:
    csv.field_size_limit(MAX_ROW)
    path = unit.file.path
    head = _head(stream).partition(b"\n")[0]
    tabs = path.name.lower().endswith((".tsv", ".tsv.gz", ".tsv.zst"))
    delimiter = "\t" if tabs else max(",;\t", key=lambda c: head.count(c.encode()))
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    table = csv.reader(text, delimiter=delimiter)
    try:
        columns = next(table, [])
        for cells in table:
            row: object = dict(zip(columns, cells))
            if len(cells) > len(columns):
                row = BadRow(f"{len(cells)} cells under {len(columns)} columns")
            if cells:
                yield f"{path}: line {table.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}: near line {table.line_num}: {error}") from None


def _documents(unit: Unit, stream: IO[bytes]) -> Rows:
    """Read a text as documents: a short file whole; of a longer one, parts that end at a blank
    line, else at a line's end. Together they are the text: nothing is left out."""
    path, ended = unit.file.path, False
    begin = _after_blank_line(stream, unit.start) if unit.start else 0
    left = _after_blank_line(stream, unit.end) - begin if unit.end else None
    if unit.end:
        stream.seek(begin)
    buffer, at = b"", 0  # `at`: where in the buffer the next document begins
    while True:
        if len(buffer) - at < 2 * CUT_ABOVE and not ended:
            block = stream.read(BLOCK if left is None else min(BLOCK, left))
            left = None if left is None else left - len(block)
            buffer, begin, at = buffer[at:] + block, begin + at, 0
            ended = not block
            continue
        if at == len(buffer):
            return
        whole = begin + at == 0 and len(buffer) <= CUT_ABOVE
        end = len(buffer) if whole else _cut(buffer, at)
        piece, where = buffer[at:end], f"{path}: byte {begin + at}"
        piece = piece.removeprefix(BOM) if begin + at == 0 else piece
        at = end
        if piece.strip():
            try:
                text = piece.decode("utf-8").replace("\r\n", "\n").strip("\n")
                yield where, {"text": text}
            except UnicodeDecodeError as error:
                line = buffer[: end - len(piece) + error.start].count(b"\n") + 1
                found = f"line {line}: " if begin == 0 else ""
                yield where, BadRow(found + _not_utf8(error))


def _cut(buffer: bytes, at: int) -> int:
    """Return where a document ends that begins at a byte: behind the first blank line after
    DOCUMENT bytes, or the last line or word before four times that; never inside a character."""
    least, limit = at + DOCUMENT, min(len(buffer), at + 4 * DOCUMENT)
    found = BLANK_LINE.search(buffer, least, limit)
    if found:
        return found.end()
    if len(buffer) <= limit:
        return len(buffer)
    for mark in (b"\n", b" "):
        end = buffer.rfind(mark, least, limit)
        if end > 0:
            return end + 1
    while buffer[limit] & 0xC0 == 0x80:  # a byte that goes on with a character
        limit -= 1
    return limit


def _after_blank_line(stream: IO[bytes], at: int) -> int:
    """Return the first byte behind the first blank line at or after a byte; else the end."""
    stream.seek(at)
    buffer = b""
    while True:
        block = stream.read(BLOCK)
        buffer += block
        found = BLANK_LINE.search(buffer)
        if found or not block:
            return at + (found.end() if found else len(buffer))
        kept = buffer[-64:]  # a blank line may go across two blocks
        buffer, at = kept, at + len(buffer) - len(kept)
