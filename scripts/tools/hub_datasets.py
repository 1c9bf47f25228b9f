"""Stage what a suite asks: data sets of the hub, one commit each, and the data of nltk."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from scripts.run import suites
from scripts.run.digests import sha256
from scripts.run.errors import InputError, nearest
from scripts.run.files import read_json, write_json
from scripts.tools.hub import NotNow, Snapshot
from scripts.tools.hub_download import LICENCES, Download, matches

ROWS = re.compile(r".*\.(parquet|jsonl?|csv|tsv|arrow|txt)(\.(gz|zst|xz|bz2))?")


@dataclass
class DataDownload(Download):
    """Bring one commit of a data set: its rows, and the page that says which file is which."""

    kind: ClassVar[str] = "dataset"
    record_name: ClassVar[str] = suites.RECORD
    use: ClassVar[str] = "staged in {}"

    def problems(self, snapshot: Snapshot) -> list[str]:
        """List why a repository holds nothing that a task could read."""
        if any(ROWS.fullmatch(name) for name in snapshot.files):
            return []
        return [f"{snapshot.name}: no parquet, JSON, CSV or text, so no task can read it"]

    def wanted(self, snapshot: Snapshot, index: object) -> list[str]:
        """Name the files to bring, rows last: all of them, since the page names all."""
        visible = [n for n in sorted(snapshot.files) if not re.search(r"(^|/)\.|\\", n)]
        texts = [name for name in visible if matches(name, ("README.md", *LICENCES))]
        return [*texts, *(n for n in visible if ROWS.fullmatch(n) and n not in texts)]


def stage(recipe: str, models: Path, force: bool, dry_run: bool) -> str:
    """Stage all data sets of a suite; return what to say of them. Raises InputError or NotNow."""
    place = suites.folder(recipe)
    if place is None:
        mend = nearest(recipe, suites.known())
        raise InputError(f"RECIPE={recipe}: no suite; {mend} Or a folder of tasks: RECIPE=./mine")
    found = suites.unreadable(models)
    if found:
        raise InputError(found)
    said = []
    for name, commit in suites.data_sets(place).items():
        target = suites.staged(models, name)
        if name == suites.NLTK:
            said.append(_nltk(suites.about(place)["nltk"], target, dry_run))
            continue
        work = DataDownload(name, commit or "main", target, force)
        said.append(work.run(dry_run))
    return "\n".join(said) or f"RECIPE={recipe}: reads no data set of the hub; nothing to stage"


def _nltk(names: list[str], target: Path, dry_run: bool) -> str:
    """Bring data of nltk by its own downloader, which compares the hashes of its index. Raises
    NotNow."""
    from nltk.downloader import Downloader

    there = read_json(target / suites.RECORD)
    if there and set(names) <= set(there["packages"]):
        return f"{suites.NLTK}: {', '.join(names)}: there already"
    if dry_run:
        return f"{suites.NLTK}: {', '.join(names)} would go to {target}"
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            Downloader().download(name, str(target), quiet=True, raise_on_error=True)
        except (OSError, ValueError) as error:
            said = " ".join(str(error).split())
            again = "the same command goes on once the network lets it"
            raise NotNow(f"{suites.NLTK}: {name} did not come: {said}; {again}") from None
    for packed in target.rglob("*.zip"):
        shutil.rmtree(packed, ignore_errors=True) if packed.is_dir() else packed.unlink()
    files = {p.relative_to(target).as_posix(): sha256(p) for p in target.rglob("*") if p.is_file()}
    record = {"hub": suites.NLTK, "revision": "", "commit": "", "packages": names, "files": files}
    write_json(target / suites.RECORD, record)
    return f"{suites.NLTK}: {', '.join(names)}: staged in {target}"
