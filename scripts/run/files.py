"""The small files of a run: JSON and KEY=value lines, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from scripts.run.errors import InputError

SAFE = "/:,=@+-._"  # stays as it is in stage.env, beside letters and digits


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file whole or not at all. Raises OSError; the old content then stands."""
    # Not the pid: in two pods both are process 1, and they share the folder.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(temporary, flags, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def dump_json(value: Any) -> str:
    """Format a value as every JSON file of a run holds it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_atomic(path, dump_json(value))


def read_json(path: Path) -> Any:
    """Parse a JSON file; None if it does not exist. Raises InputError naming a broken file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        mend = "remove it or restore it from a copy"
        raise InputError(f"{path}: not JSON ({error}); {mend}") from None


def format_env(facts: dict[str, str]) -> str:
    """Format stage.env: one KEY=value a line, percent-encoded for shells and YAML alike."""
    return "".join(f"{key}={quote(value, safe=SAFE)}\n" for key, value in facts.items())


def parse_env(text: str) -> dict[str, str]:
    """Parse what format_env wrote. It is never sourced, so it cannot run anything."""
    rows = (line.partition("=") for line in text.splitlines() if line)
    return {key: unquote(value) for key, _, value in rows}


def read_env(path: Path) -> dict[str, str]:
    """Parse a stage.env file. Raises OSError."""
    return parse_env(path.read_text(encoding="utf-8"))
