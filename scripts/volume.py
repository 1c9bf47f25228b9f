"""What is done beside the volume for a client that does not see it. Pods of kubernetes/ call it:

    python3 -m scripts.volume receive FOLDER DIRECTORY JOB   submission → the stage's directory
    python3 -m scripts.volume read RUN                       small files of a run → JSON on stdout
    python3 -m scripts.volume remove DIRECTORY               a run, or one stage of it
    python3 -m scripts.volume have PATH                      {file: bytes} of PATH that came so far
    python3 -m scripts.volume append PATH NAME AT SHA256     stdin → PATH/NAME (PATH, if it is ""),
                                                             from byte AT
    python3 -m scripts.volume keep PATH SHA256               all has come: it is PATH from now on

Standard library alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Optional

from scripts.run import attempts
from scripts.run.digests import Digests
from scripts.run.errors import DONE, WRONG_INPUT, InputError
from scripts.run.layout import Run, finished
from scripts.run.submission import Submission, from_key

SMALL = 1 << 20  # bytes of a file that is read; of a longer log its end, of others nothing
# Folders that are not read; they stand in what is told, empty.
HEAVY = ("checkpoints", "model", "sets", "sets.partial", "export", "assets", "metrics")


def receive(folder: Path, directory: Path, job: str) -> None:
    """Write a submission, mounted as one flat folder, into the stage's directory, for a job.

    Raises InputError if the stage was begun with other settings, or is done.
    """
    submission = Submission(directory)
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):  # ..data, by which a ConfigMap is exchanged
            submission.files[from_key(path.name)] = path.read_text(encoding="utf-8")
    running = attempts.running(directory)
    # A Job's name is free only when the pods of the last one are gone.
    if running and running["job"] != job and running["job"].startswith("k8s:"):
        attempts.record_lost(directory, running, f"job {running['job']} is gone")
    begun = finished(directory) or (directory / "checkpoints").exists()
    changed = submission.differences() if begun else []
    if changed:
        run, stage = directory.parent.name, directory.name
        raise InputError(
            f"{directory} exists with other settings: {'; '.join(changed)}. Choose another RUN, or "
            f"remove this stage and what it made: make clean STAGE={stage} RUN={run}"
        )
    try:
        submission.write(f"kubectl create -k runs/{directory.parent.name}/{directory.name}")
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; the volume's folder must be writable by uid 1000"
        ) from None


def read(run: Path) -> dict[str, dict[str, str]]:
    """Read {stage: {path: text}} of a run's small files, of a folder the oldest first: not models,
    checkpoints and sets, which stand in it as empty folders ("model/": "")."""
    found: dict[str, dict[str, str]] = {}
    for stage in sorted(path for path in run.iterdir() if path.is_dir()) if run.is_dir() else ():
        texts = found[stage.name] = {}
        for path in sorted(stage.iterdir()):
            if path.is_dir() and path.name in HEAVY:
                texts[f"{path.name}/"] = ""
                continue
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in sorted(filter(_is_small, files), key=_age):
                with contextlib.suppress(FileNotFoundError):  # replaced by a newer in this moment
                    texts[file.relative_to(stage).as_posix()] = _text(file)
        data = stage / "sets/data.json"
        if data.exists():
            texts["sets/data.json"] = _text(data)
    return found


def _is_small(file: Path) -> bool:
    if not file.is_file() or file.is_symlink() or file.name == "api-key":
        return False
    return file.suffix == ".log" or file.stat().st_size <= SMALL


def _age(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0


def _text(file: Path) -> str:
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - SMALL))
        return opened.read().decode("utf-8", errors="replace")


def remove(directory: Path) -> None:
    """Remove a run or a stage. Raises InputError while something in it runs."""
    stages = [directory, *(p for p in directory.glob("*") if p.is_dir())]
    busy = [p for p in stages if (p / "attempts").is_dir() and attempts.running(p)]
    if busy:
        raise InputError(f"{busy[0]}: runs; first make stop RUN={busy[0].parent.name}")
    if directory.exists():
        shutil.rmtree(directory)


def _coming(path: Path) -> Path:
    return path.with_name(f".{path.name}.coming")


def have(path: Path) -> Optional[dict[str, int]]:
    """Return the bytes of each file of a path that have come so far, by name ("" for one that is a
    file itself); None if it is there whole."""
    if path.exists():
        return None
    coming = _coming(path)
    if coming.is_file():
        return {"": coming.stat().st_size}
    files = [p for p in coming.rglob("*") if p.is_file()]
    return {p.relative_to(coming).as_posix(): p.stat().st_size for p in files}


def append(path: Path, name: str, at: int, digest: str, chunk: bytes) -> None:
    """Write a chunk of a file that comes, from byte `at`. Raises InputError if it came damaged, or
    leaves a gap."""
    if hashlib.sha256(chunk).hexdigest() != digest:
        raise InputError(f"{path}: {len(chunk)} bytes came damaged; the same again")
    coming = _coming(path)
    file = coming / name if name else coming
    if name and coming not in file.resolve().parents:
        raise InputError(f"{name}: leads out of {path}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as opened:
        if opened.seek(0, os.SEEK_END) < at:
            raise InputError(f"{path}: byte {at} of {name or path.name} comes too early")
        opened.seek(at)
        opened.write(chunk)
        opened.truncate()
        os.fsync(opened.fileno())


def keep(path: Path, digest: str) -> None:
    """Give what has come its name. Raises InputError if it is not what was sent."""
    coming = _coming(path)
    there = Digests(Run(path.parent, ""), remember=False).of_tree(coming).partition(":")[2]
    if there != digest:
        shutil.rmtree(coming) if coming.is_dir() else coming.unlink()
        raise InputError(f"{path}: is not what was sent: {there}, not {digest}; the same again")
    os.replace(coming, path)


def main(words: list[str]) -> int:
    """Run one verb; return an exit code, with what is wrong on stderr."""
    try:
        if words[:1] == ["receive"] and len(words) == 4:
            receive(Path(words[1]), Path(words[2]), words[3])
        elif words[:1] == ["read"] and len(words) == 2:
            json.dump(read(Path(words[1])), sys.stdout)
        elif words[:1] == ["remove"] and len(words) == 2:
            remove(Path(words[1]))
        elif words[:1] == ["have"] and len(words) == 2:
            json.dump(have(Path(words[1])), sys.stdout)
        elif words[:1] == ["append"] and len(words) == 5:
            append(Path(words[1]), words[2], int(words[3]), words[4], sys.stdin.buffer.read())
        elif words[:1] == ["keep"] and len(words) == 3:
            keep(Path(words[1]), words[2])
        else:
            raise InputError(str(__doc__))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
