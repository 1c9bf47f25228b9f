"""The rows of what needs a library: parquet, arrow and zst by pyarrow, the hub by datasets."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from scripts.corpus import files, lines
from scripts.corpus.files import File, Unit
from scripts.run.errors import InputError

BATCH = 1000  # rows that are turned into Python objects at a time
HUB = "hub"  # the format of what is no file here but a data set of the hub, "owner/name:split"


def units(file: File, size: int) -> list[Unit]:
    """Cut a file into parts of about `size` bytes; parquet between its row groups."""
    if file.format == HUB:
        return [Unit(file)]
    if file.format != "parquet" or file.compression:
        return files.units(file, size)
    with _named(file):
        metadata = pq.ParquetFile(file.path).metadata
    found, start, held = [], 0, 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= size or group + 1 == metadata.num_row_groups:
            found.append(Unit(file, start, group + 1))
            start, held = group + 1, 0
    return found or [Unit(file)]  # without a row


def rows(unit: Unit) -> lines.Rows:
    """Read (where, row or BadRow) of any unit. Raises InputError where it cannot be read on."""
    read = {"parquet": _parquet, "arrow": _arrow, HUB: _hub}.get(unit.file.format, _lines)
    with _named(unit.file):
        yield from read(unit)


class _named:
    """Turn a library's error into an InputError that names the file."""

    def __init__(self, file: File):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, (pa.ArrowException, pa.ArrowInvalid, OSError, EOFError)):
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{self.file.path}: cut off or damaged ({said}); copy it again"
            ) from None


def _open(file: File) -> IO[bytes]:
    """Open any file unpacked."""
    if file.compression == ".zst":
        return io.BufferedReader(pa.input_stream(str(file.path), compression="zstd"), files.BLOCK)
    return lines.open_plain(file)


def _lines(unit: Unit) -> lines.Rows:
    with _open(unit.file) as stream:
        yield from lines.rows(unit, stream)


def _parquet(unit: Unit) -> lines.Rows:
    source = pa.BufferReader(_open(unit.file).read()) if unit.file.compression else unit.file.path
    table = pq.ParquetFile(source)
    groups = range(unit.start, unit.end) if unit.end else range(table.num_row_groups)
    before = sum(table.metadata.row_group(g).num_rows for g in range(unit.start))
    yield from _batches(unit, table.iter_batches(BATCH, row_groups=list(groups)), before)


def _arrow(unit: Unit) -> lines.Rows:
    """Read an arrow file, or a stream as datasets writes it."""
    source: Any = pa.memory_map(str(unit.file.path))
    if unit.file.compression:
        source = pa.BufferReader(_open(unit.file).read())
    try:
        table = pa.ipc.open_file(source)
        batches: Iterator[Any] = map(table.get_batch, range(table.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        batches = iter(pa.ipc.open_stream(source))
    small = (batch.slice(at, BATCH) for batch in batches for at in range(0, len(batch), BATCH))
    yield from _batches(unit, small, 0)


def _batches(unit: Unit, batches: Iterator[Any], before: int) -> lines.Rows:
    number = before
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{unit.file.path}: row {number}", row


def _hub(unit: Unit) -> lines.Rows:
    name, _, split = str(unit.file.path).partition(":")
    huggingface_hub = importlib.import_module("huggingface_hub")
    datasets = importlib.import_module("datasets")  # two seconds, for the hub alone
    try:
        # Without it datasets asks again for half a minute where there is no network.
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
        table = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(table, 1):
            yield f"{name}: row {number}", row
    except InputError:
        raise
    except Exception as error:  # the library raises a dozen kinds, requests' and httpx's among them
        folder = f"data/{name.rpartition('/')[2]}"
        raise InputError(
            f"DATA={name}: no such file or folder here, and as a data set of the hub: "
            f"{str(error).splitlines()[0][:200]}; where there is no network, stage it: "
            f"hf download --repo-type dataset {name} --local-dir {folder}, then DATA={folder}"
        ) from None
