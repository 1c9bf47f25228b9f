"""The small files of a run: written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from scripts.run.errors import InputError

SAFE = "/:,=@+-._"  # besides letters and digits; everything else is percent-encoded in stage.env


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def dump_json(value: Any) -> str:
    """JSON as every file of a run holds it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file; None if it does not exist. Raises InputError naming the file if it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); remove it or restore it from a copy") from None


def format_env(facts: dict[str, str]) -> str:
    """stage.env: one KEY=value a line, values percent-encoded so that no shell and no YAML can misread them."""
    return "".join(f"{key}={quote(value, safe=SAFE)}\n" for key, value in facts.items())


def read_env(path: Path) -> dict[str, str]:
    """Parse stage.env. It is never sourced, so it cannot run anything."""
    rows = (line.partition("=") for line in path.read_text(encoding="utf-8").splitlines() if line)
    return {key: unquote(value) for key, _, value in rows}
