"""The files that people have: each format, packed or not, alone or in a folder, cut anywhere."""

import csv
import gzip
import io
import json
import random
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts.corpus import columnar, lines
from scripts.corpus.files import Unit, find
from scripts.corpus.lines import BadRow
from scripts.corpus.preview import preview
from scripts.run.errors import InputError
from tests.support.sets import chats, prepare, write_rows

ROWS = [{"instruction": f"Frage {n} — ü?\n", "output": f"«{n}», “x”;\ty"} for n in range(60)]


def as_csv(delimiter):
    text = io.StringIO()
    table = csv.DictWriter(text, ["instruction", "output"], delimiter=delimiter)
    table.writeheader()
    table.writerows(ROWS)
    return text.getvalue().encode()


def as_arrow(write):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(ROWS)
    if write == "parquet":
        pq.write_table(table, sink, row_group_size=13)
    else:
        kind = pa.ipc.new_stream if write == "stream" else pa.ipc.new_file
        with kind(sink, table.schema) as writer:
            writer.write_table(table, 13)
    return sink.getvalue()


LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
FORMS = {
    "a.jsonl": LINES.encode(),
    "a.ndjson": LINES.encode() + b"\n\n",
    "A.JSONL": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": LINES.encode(),
    "a.csv": as_csv(","),
    "semicolon.csv": as_csv(";"),
    "a.tsv": as_csv("\t"),
    "a.parquet": as_arrow("parquet"),
    "a.arrow": as_arrow("file"),
    "stream.arrow": as_arrow("stream"),
}
PACKED = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".zst": lambda raw: zst(raw),
}


def zst(raw):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(raw)
    return sink.getvalue().to_pybytes()


def read_all(path, size=1 << 30):
    found, _ = find(path)
    return [
        row
        for file in found
        for unit in columnar.units(file, size)
        for _, row in columnar.rows(unit)
    ]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", FORMS)
def test_a_format_is_read_whole(tmp_path, name, packed):
    file = tmp_path / "[v1] a folder" / f"{name}{packed}"
    file.parent.mkdir()
    file.write_bytes(PACKED[packed](FORMS[name]))
    assert read_all(file) == ROWS
    (file.parent / "picture.png").write_bytes(b"\x89PNG")
    (file.parent / "README.md").write_text("about this")
    assert read_all(file.parent) == ROWS
    assert sorted(find(file.parent)[1]) == ["README.md", "picture.png"]


@pytest.mark.parametrize("size", [1, 50, 333, 1000, 5000])
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.parquet"])
def test_parts_of_any_size_are_the_whole(tmp_path, name, size):
    (tmp_path / name).write_bytes(FORMS[name])
    assert read_all(tmp_path / name, size) == ROWS


@pytest.mark.parametrize("size", [3000, 40_000, 1 << 30])
@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n", "\n", " "])
def test_a_text_is_cut_and_nothing_is_left_out(tmp_path, blank, size):
    chance = random.Random(1)
    words = [" ".join(f"wörd{n}" for n in range(chance.randint(1, 300))) for _ in range(300)]
    (tmp_path / "a.txt").write_bytes(blank.join(words).encode())
    documents = [row["text"] for row in read_all(tmp_path / "a.txt", size)]
    assert "".join("".join(documents).split()) == "".join("".join(words).split())
    assert max(map(len, documents)) <= 8000


def test_a_short_text_stays_whole(tmp_path):
    (tmp_path / "a.md").write_text("One.\n\nTwo.\n\n" * 1000)
    assert len(read_all(tmp_path / "a.md")) == 1


def test_what_json_allows_is_data(tmp_path):
    odd = ["a\u2028b\u0085c", "1" * 4400, "\x0b", "tab\there"]
    rows = [{"text": text} for text in odd] + [{"text": "n", "number": 0}]
    raw = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(raw.replace('"number": 0', '"number": ' + "9" * 4400))
    assert [row["text"] for row in read_all(tmp_path / "a.jsonl")] == [*odd, "n"]


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))


BAD = {
    "no such": ("missing.jsonl", None, "no such file or folder"),
    "an empty folder": ("folder", {}, "is empty"),
    "pictures": ("folder", {"a.png": b"\x89PNG", "b.jpg": b"\xff\xd8\xff"}, "holds a.png, b.jpg"),
    "another format": ("a.xlsx", b"PK\x03\x04", "give .jsonl .json .csv"),
    "empty": ("a.jsonl", b"", "empty"),
    "a zip": ("a.jsonl", b"PK\x03\x04" + bytes(50), "a zip archive, not what its name says"),
    "a gz by another name": ("a.jsonl", gzip.compress(LINES.encode()), "gzip, not what its name"),
    "no gz": ("a.jsonl.gz", LINES.encode(), "not gzip, as its name says"),
    "no parquet": ("a.parquet", LINES.encode(), "not parquet, as its name says"),
    "control characters": ("a.txt", bytes(range(32)) * 100, "not text"),
    "UTF-16": ("a.txt", "häh".encode("utf-16"), "UTF-16"),
    "cut parquet": ("a.parquet", FORMS["a.parquet"][:-40], "cut off"),
    "cut gz": ("a.jsonl.gz", gzip.compress(LINES.encode())[:-20], "cut off"),
    "cut zst": ("a.jsonl.zst", zst(LINES.encode())[:-20], "cut off"),
    "cut json": ("a.json", json.dumps(ROWS).encode()[:-9], "row 60: not JSON, or cut off"),
    "open json": ("a.json", b'[{"text": "a"},', "cut off"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named(tmp_path, what):
    name, content, words = BAD[what]
    path = tmp_path / name
    if isinstance(content, dict):
        path.mkdir()
        for child, raw in content.items():
            (path / child).write_bytes(raw)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as problem:
        read_all(path)
    assert words in str(problem.value)
    assert str(path) in str(problem.value)


@pytest.mark.parametrize("make", [tar, lambda path: zipfile.ZipFile(path, "w").writestr("x", "y")])
def test_an_archive_is_named(tmp_path, make):
    make(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="archive"):
        find(tmp_path / "a.jsonl")


def test_a_table_without_a_row_is_said_so(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS[:1]).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="holds no rows"):
        prepare(tmp_path / "stage", tmp_path / "a.parquet")


def test_a_line_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_ROW", 1000)
    write_rows(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "x" * 2000}])
    with pytest.raises(InputError, match="more than 64 MiB at byte 18"):
        read_all(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"text": "cut', "line 3: not JSON (Unterminated string"),
        (b"nope", "line 3: not JSON (Expecting value: column 1)"),
        (b'{"text": "tw\xff"}', "line 3: not UTF-8 (byte 0xff"),
        (b"[" * 100_000, "line 3: not JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_next_is_read(tmp_path, raw, why):
    good = b'{"text": "fine"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 2 + raw + b"\n" + good)
    file = find(tmp_path / "a.jsonl")[0][0]
    found = list(columnar.rows(Unit(file)))
    assert len(found) == 4
    bad = [
        f"{where.rpartition(': ')[2]}: {row.why}" for where, row in found if isinstance(row, BadRow)
    ]
    assert len(bad) == 1
    assert bad[0].startswith(why)


def test_a_preview_says_what_a_folder_holds(tmp_path):
    write_rows(tmp_path / "a.jsonl", chats(5))
    write_rows(
        tmp_path / "b.jsonl", [{"text": "t"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    )
    assert preview(tmp_path, {}) == ({"chat", "text", "pair"}, True, [])
    (tmp_path / "c.parquet").write_bytes(FORMS["a.parquet"])
    assert preview(tmp_path, {}).whole is False
    write_rows(tmp_path / "d.jsonl", [{"frage": "q", "antwort": "a"}])
    seen = preview(tmp_path, {})
    assert "d.jsonl: line 1: columns antwort, frage fit no shape" in seen.problems[0]
    assert preview(tmp_path, {"prompt": "frage", "completion": "antwort"}).problems == []
    (tmp_path / "c.parquet").unlink()  # it might have the column
    named = preview(tmp_path, {"prompt": "frage", "completion": "anwort"}).problems
    assert named[0].startswith("COLUMNS: anwort: no such column; there are ")
    assert preview(tmp_path, {"promt": "frage", "antwort": "answer"}).problems == [
        "COLUMNS: promt=frage: promt is no name of ours; did you mean prompt?",
        "COLUMNS: antwort=answer: antwort is no name of ours; turn it round: answer=antwort",
    ]


def test_a_data_set_of_the_hub_is_asked_for_and_staging_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"hf download --repo-type dataset nobody/nothing"):
        prepare(tmp_path, "nobody/nothing")
