"""One stage ready to start: where, on how many nodes and GPUs, and the files that say what runs.
Make writes them, and a dry run prints the commands that do."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from scripts.run import files
from scripts.run.errors import InputError
from scripts.run.layout import Run, relative, run_of
from scripts.run.stages import StageRow, row

SERVED = "serve.yaml"  # the objects of a service, in the directory of its stage


def as_key(name: str) -> str:
    """Return a file's name as a key of a flat map that holds a submission: "/" becomes ".."."""
    return name.replace("/", "..")


def from_key(key: str) -> str:
    """Return the file's name that as_key made a key of."""
    return key.replace("..", "/")


@dataclass
class Submission:
    """Hold what a stage is submitted with. `nodes` and `gpus` are 1 for a stage without ranks."""

    directory: Path
    nodes: int = 1
    gpus: int = 1  # ranks on each node
    files: dict[str, str] = field(default_factory=dict)  # text by name in the directory
    origins: dict[str, Path] = field(default_factory=dict)  # of the files that are copies

    @classmethod
    def read(cls, directory: Path) -> Submission:
        """Read what a service was submitted with. Raises InputError if nothing lies there."""
        made = cls(directory)
        for path in directory.glob("*.*"):
            if path.name in ("stage.env", "args.json") or path.stem == "config":
                made.files[path.name] = path.read_text(encoding="utf-8")
        if "stage.env" not in made.files:
            raise InputError(f"{directory}: holds no submission")
        return made

    @property
    def row(self) -> StageRow:
        """Return the stage's row of the stage table."""
        return row(self.directory.name)

    @property
    def run(self) -> Run:
        """Return the run that the stage belongs to."""
        return run_of(self.directory)

    @property
    def facts(self) -> dict[str, str]:
        """Return what stage.env says."""
        return files.parse_env(self.files.get("stage.env", ""))

    def copy(self, path: Path, name: str) -> None:
        """Freeze a file of the repository under a name in the stage's directory."""
        self.files[name], self.origins[name] = path.read_text(encoding="utf-8"), path

    def write(self, submitted: str) -> None:
        """Write the files, and in submitted.txt the line that starts the stage by hand."""
        for name, text in {**self.files, "submitted.txt": submitted + "\n"}.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, text)

    def as_shell(self) -> str:
        """Format the commands that write the files, for a shell in the repository."""
        folders = {
            (self.directory / name).parent for name in ("logs/*", *self.files) if "/" in name
        }
        lines = [f"mkdir -p {shlex.join(sorted(map(relative, folders)))}"]
        for name, text in self.files.items():
            path = shlex.quote(relative(self.directory / name))
            if name in self.origins:
                lines.append(f"cp {shlex.quote(relative(self.origins[name]))} {path}")
            else:
                lines.append(f"cat > {path} << 'EOF'\n{text}EOF")
        return "\n".join(lines)

    def differences(self) -> list[str]:
        """List how the submission that lies there differs from this one; [] if it is the same or
        there is none."""
        if not (self.directory / "stage.env").exists():
            return []
        found = []
        for name, text in self.files.items():
            path = self.directory / name
            if path.exists() and path.read_text(encoding="utf-8") != text:
                found += self._difference(name, path, text)
        given = {name for name in self.files if "/" in name}  # whole folders
        paths = [p for name in {n.split("/")[0] for n in given} for p in self._files_below(name)]
        there = {path.relative_to(self.directory).as_posix() for path in paths}
        found += [f"{name} is new" for name in sorted(given - there)]
        return found + [f"{name} was there, now not" for name in sorted(there - given)]

    def _files_below(self, name: str) -> list[Path]:
        """List the files of a folder; not what Python leaves of its own."""
        found = (self.directory / name).rglob("*")
        return [p for p in found if p.is_file() and p.parent.name != "__pycache__"]

    def _difference(self, name: str, path: Path, text: str) -> list[str]:
        if name == "stage.env":
            old, new = files.read_env(path), files.parse_env(text)
            return [
                f"{key} was {old.get(key, 'not set')}, now {new.get(key, 'not set')}"
                for key in sorted(old.keys() | new.keys())
                if old.get(key, "") != new.get(key, "")
                # What is spread gives the same bytes on any number of nodes.
                and not (key == "NODES" and self.row.spreads)
            ]
        if name == "args.json":
            return [_other_words(files.read_json(path), json.loads(text))]
        return [f"{name} has changed since (the run's copy: {relative(path)})"]


def _other_words(before: list[str], now: list[str]) -> str:
    """Say where two lists of arguments differ: without the words that both begin and end with."""
    first = _alike(before, now)
    if first and before[first - 1].startswith("-"):  # of an option's value its name, too
        first -= 1
    last = _alike(before[first:][::-1], now[first:][::-1])
    same = "… " if first or last else ""
    shown = [f"{same}{shlex.join(words[first : len(words) - last])}" for words in (before, now)]
    return "ARGS were {}, now {}".format(*(words.strip() or "none" for words in shown))


def _alike(one: list[str], other: list[str]) -> int:
    """Count the words at the beginning that two lists share."""
    unlike = (number for number, (a, b) in enumerate(zip(one, other)) if a != b)
    return next(unlike, min(len(one), len(other)))
