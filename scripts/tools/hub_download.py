"""Bring a model of the hub here: one commit of a repository, as a plain Hugging Face directory.

huggingface_hub keeps whole files alone, and compares sizes alone. Here a killed process's half file
goes on by byte range, and every file's hash is compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from scripts.run.digests import sha256
from scripts.run.errors import FAULT, InputError
from scripts.run.files import read_json, write_json
from scripts.run.layout import relative
from scripts.run.modeldir import weight_files
from scripts.tools.hub import ENDPOINT, MOST, HubFile, NotNow, Snapshot, look

RECORD = "download.json"
INDEX = "model.safetensors.index.json"
NOT_WEIGHTS = ("adapter_*", "consolidated*")  # of another model; the same once more, as Meta has it
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
TEXTS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json"),
    *("quantize_config.json", "quantization_config.json", "hf_quant_config.json"),
    *LICENCES,
)
GB = 1e9


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether a file's name is one of these patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def content_problems(snapshot: Snapshot) -> list[str]:
    """List why a repository is no Hugging Face model that a stage could start from."""
    names, who = list(snapshot.files), snapshot.repository
    if "config.json" not in names:
        return [f"{who}: has no config.json at its top, so it is no model of transformers"]
    weights = [n for n in names if n.endswith(".safetensors") and not matches(n, NOT_WEIGHTS)]
    if weights:
        return []
    for kinds, mend in {
        (".bin", ".pt", ".pth", ".ckpt"): "can run code when loaded; look for a converted copy",
        (".gguf",): "is llama.cpp's format; look for the repository that it was made from",
        (".h5", ".msgpack"): "is of another framework; look for a converted copy",
    }.items():
        found = [name for name in names if name.endswith(kinds)]
        if found:
            return [f"{who}: no *.safetensors, only {found[0]}, which {mend}"]
    adapter = any(name.startswith("adapter_") for name in names)
    return [f"{who}: has {'an adapter, and no model' if adapter else 'no *.safetensors'}"]


@dataclass
class Download:
    """Bring one commit to a directory, through a folder beside it that the next try goes on with.

    `licence` is what to record where the hub itself says nothing.
    """

    repository: str
    revision: str
    target: Path
    force: bool = False
    licence: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "model"
    record_name: ClassVar[str] = RECORD
    use: ClassVar[str] = "for a stage: FROM={}"

    @property
    def part(self) -> Path:
        """Return the folder that holds what has come so far."""
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def old(self) -> Path:
        """Return where what FORCE=1 replaces lies for a moment."""
        return self.target.with_name(f".{self.target.name}.old")

    def run(self, dry_run: bool = False) -> str:
        """Download what is not there, and say what was done. Raises InputError or NotNow."""
        there = self.existing()
        try:
            snapshot = look(self.repository, self.revision, self.kind)
        except NotNow:
            if there and self.revision in (there["revision"], there["commit"]) and not self.force:
                return self.done(there, "there already, and the hub was not asked")
            raise
        if there and not self.force:
            same = (there["hub"], there["commit"]) == (self.repository, snapshot.commit)
            if same:
                shutil.rmtree(self.old, ignore_errors=True)  # of a kill between two renames
                return self.done(there, "there already")
            raise InputError(
                f"{self.target}: holds {there['hub']} at {there['commit'][:12]}, and "
                f"{self.revision} of {self.repository} now is {snapshot.commit[:12]}; FORCE=1 "
                "replaces it, MODELS=<another folder> keeps both"
            )
        found = self.problems(snapshot)
        if found:
            raise InputError(found)
        snapshot.probe(self.wanted(snapshot, {})[-1])
        if dry_run:
            return self.shown(snapshot)
        self.part.mkdir(parents=True, exist_ok=True)
        with alone(self.part):
            self.fetch_all(snapshot)
            self.settle()
        return self.done(self.record, "downloaded, every file's hash is the hub's")

    def problems(self, snapshot: Snapshot) -> list[str]:
        """List why a repository is not what is to be downloaded."""
        return content_problems(snapshot)

    def existing(self) -> dict[str, Any] | None:
        """Return the record of what lies at the target, None if nothing does. Raises InputError
        where it is none of ours, or not whole any more."""
        if not self.target.exists() and not self.target.is_symlink():
            return None
        record = read_json(self.target / self.record_name) if self.target.is_dir() else None
        if not record:
            mend = "move it away, or choose another place with MODELS="
            raise InputError(f"{self.target}: was not downloaded by make download; {mend}")
        sizes = {name: file["bytes"] for name, file in record["files"].items()}
        changed = [n for n, size in sizes.items() if file_size(self.target / n) != size]
        if changed and not self.force:
            mend = "FORCE=1 downloads it anew"
            raise InputError(f"{self.target}: {changed[0]} is missing or was changed; {mend}")
        return dict(record)

    def done(self, record: dict[str, Any], how: str) -> str:
        """Say what lies at the target now."""
        size = sum(file["bytes"] for file in record["files"].values()) / GB
        licence = record.get("licence_name") or record.get("licence") or "not told by the hub"
        at = record["commit"] if "=" in record["commit"] else f"commit {record['commit'][:12]}"
        return (
            f"{record['hub']} at {at}, {size:.2f} GB, licence {licence}: "
            f"{how}; {self.use.format(shlex.quote(relative(self.target)))}"
        )

    def shown(self, snapshot: Snapshot) -> str:
        """Say what a download would bring."""
        files = [snapshot.files[name] for name in self.wanted(snapshot, {})]
        rows = [f"{file.size:>15,}  {file.path}" for file in files]
        size = sum(file.size for file in files) / GB
        return "\n".join([*rows, f"{size:.2f} GB of {snapshot.commit} would go to {self.target}"])

    def wanted(self, snapshot: Snapshot, index: dict[str, Any]) -> list[str]:
        """Name the files to bring, small ones first: weights that the index names, where there is
        one. Raises InputError if it names one that is not there."""
        texts = sorted(name for name in snapshot.files if matches(name, TEXTS))
        weights = [n for n in snapshot.files if n.endswith(".safetensors")]
        weights = sorted(n for n in weights if not matches(n, NOT_WEIGHTS))
        if "model.safetensors" in weights and INDEX not in snapshot.files:
            weights = ["model.safetensors"]
        if index:
            weights = sorted(set(index["weight_map"].values()))
        missing = [name for name in weights if name not in snapshot.files]
        if missing:
            raise InputError(f"{self.repository}: {INDEX} names {missing[0]}, which is not there")
        return [*texts, *[INDEX for name in snapshot.files if name == INDEX], *weights]

    def fetch_all(self, snapshot: Snapshot) -> None:
        """Bring every file that is not there into the folder, and write its record."""
        about = {"licence": self.licence} if self.licence else {}
        about = {**about, **snapshot.licence}
        before = read_json(self.part / self.record_name) or {}
        self.record = {
            "hub": self.repository,
            "revision": self.revision,
            "commit": snapshot.commit,
            **about,
            "files": before.get("files", {}),
        }
        if INDEX in snapshot.files:
            self.fetch(snapshot, snapshot.files[INDEX])
        names = self.wanted(snapshot, read_json(self.part / INDEX) or {})
        files = [snapshot.files[name] for name in names]
        self.remove_stale(files)
        self.refuse_what_does_not_fit(files)
        for file in files:
            self.fetch(snapshot, file)
        known = self.record["files"]
        self.record["files"] = {file.path: known[file.path] for file in files}
        write_json(self.part / self.record_name, self.record)

    def half(self, file: HubFile) -> Path:
        """Name the file that holds what has come of another. It names the content, too: bytes of
        two versions must not meet in it."""
        return self.part / f"{file.path}.{file.hash[:12]}.incomplete"

    def remove_stale(self, files: list[HubFile]) -> None:
        """Remove what a try for another commit has left."""
        kept = {self.part / self.record_name, *(self.part / f.path for f in files)}
        for path in {p for p in self.part.rglob("*") if p.is_file()} - kept:
            if path not in map(self.half, files):
                path.unlink()

    def refuse_what_does_not_fit(self, files: list[HubFile]) -> None:
        """Raise InputError if the disk cannot hold what is still to come, or http a file of it."""
        left = [f for f in files if not self.is_right(f)]
        need = sum(f.size - (file_size(self.half(f)) or 0) for f in left)
        free = shutil.disk_usage(self.part).free
        if need > free:
            raise InputError(
                f"{self.part.parent}: the download needs {need / GB:.2f} GB more, "
                f"{free / GB:.2f} GB are free; free some, or choose another disk with MODELS="
            )
        large = [f.path for f in left if f.size > MOST]
        if large:
            by_hand = f".venv/bin/hf download {self.repository} --local-dir …, then FROM="
            raise InputError(f"{large[0]}: over 50 GB, which the hub sends by xet alone; {by_hand}")

    def is_right(self, file: HubFile) -> bool:
        """Tell whether a file has come whole: by the hash that it had then, where it is large."""
        path = self.part / file.path
        if file_size(path) != file.size:
            return False
        known = self.record["files"].get(file.path, {}).get("sha256")
        return known == file.hash or file.hash_of(path) == file.hash

    def fetch(self, snapshot: Snapshot, file: HubFile) -> None:
        """Bring one file, going on where it was cut. One that came damaged is brought once more.
        Raises InputError or NotNow."""
        path, half = self.part / file.path, self.half(file)
        for _ in range(2):
            if self.is_right(file):
                break
            if (file_size(half) or 0) > file.size:
                half.unlink()
            half.parent.mkdir(parents=True, exist_ok=True)
            with open(half, "ab") as out:
                snapshot.fetch(file, out)
                out.flush()
                os.fsync(out.fileno())  # a power cut after the rename must not leave it empty
            if file.hash_of(half) == file.hash:
                os.replace(half, path)
                break
            half.unlink()
            print(f"{file.path}: came damaged, its hash is not the hub's; once more", flush=True)
        else:
            raise NotNow(
                f"{self.repository}: {file.path} came damaged twice; something between here and "
                f"{ENDPOINT} changes it (a proxy, a mirror); the other files are kept",
                FAULT,
            )
        known = file.hash if file.large else sha256(path)
        self.record["files"][file.path] = {"sha256": known, "bytes": file.size}
        write_json(self.part / self.record_name, self.record)

    def settle(self) -> None:
        """Give the folder its name by one rename; what FORCE=1 replaces goes after it."""
        shutil.rmtree(self.old, ignore_errors=True)
        if self.target.exists():
            os.rename(self.target, self.old)
        os.rename(self.part, self.target)
        shutil.rmtree(self.old, ignore_errors=True)


def file_size(path: Path) -> int | None:
    """Return a file's bytes, None if there is none."""
    return path.stat().st_size if path.is_file() else None


def files_of(model: Path) -> list[str]:
    """Name the files of a model's directory that belong to it: safetensors, and what is read with
    them."""
    names = [path.name for path in model.iterdir() if matches(path.name, TEXTS)]
    return sorted({*names, *weight_files(model), *([INDEX] if (model / INDEX).exists() else [])})


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against a second download into it. Raises InputError if one is under way."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it goes with this process
    except BlockingIOError:
        os.close(opened)
        raise InputError(f"{folder}: another make download is at it; wait for that one") from None
    except OSError:
        pass  # a filesystem without locks
    try:
        yield
    finally:
        os.close(opened)
