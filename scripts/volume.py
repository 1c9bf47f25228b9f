"""What is done beside the volume for a client that does not see it. Pods of kubernetes/ call it:

    python3 -m scripts.volume receive FOLDER DIRECTORY JOB   submission → the stage's directory
    python3 -m scripts.volume read RUN                       small files of a run → JSON on stdout
    python3 -m scripts.volume remove DIRECTORY               a run, or one stage of it

Standard library alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from scripts.run import attempts
from scripts.run.errors import DONE, WRONG_INPUT, InputError
from scripts.run.layout import finished
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
        submission.write(f"kubectl create -k {directory.parent.name}/{directory.name}")
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; the volume's folder must be writable by uid 1000"
        ) from None


def read(run: Path) -> dict[str, dict[str, str]]:
    """Read {stage: {path: text}} of a run's small files: not models, checkpoints and sets, which
    stand in it as empty folders ("model/": "")."""
    found: dict[str, dict[str, str]] = {}
    for stage in sorted(path for path in run.iterdir() if path.is_dir()) if run.is_dir() else ():
        texts = found[stage.name] = {}
        for path in sorted(stage.iterdir()):
            if path.is_dir() and path.name in HEAVY:
                texts[f"{path.name}/"] = ""
                continue
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if _is_small(file):
                    texts[file.relative_to(stage).as_posix()] = _text(file)
        data = stage / "sets/data.json"
        if data.exists():
            texts["sets/data.json"] = _text(data)
    return found


def _is_small(file: Path) -> bool:
    if not file.is_file() or file.is_symlink() or file.name == "api-key":
        return False
    return file.suffix == ".log" or file.stat().st_size <= SMALL


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


def main(words: list[str]) -> int:
    """Run one verb; return an exit code, with what is wrong on stderr."""
    try:
        if words[:1] == ["receive"] and len(words) == 4:
            receive(Path(words[1]), Path(words[2]), words[3])
        elif words[:1] == ["read"] and len(words) == 2:
            json.dump(read(Path(words[1])), sys.stdout)
        elif words[:1] == ["remove"] and len(words) == 2:
            remove(Path(words[1]))
        else:
            raise InputError(str(__doc__))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
