"""Serve a model with vLLM's OpenAI API: FROM → http://BIND:PORT/v1, until it is stopped.

python -m scripts.deploy runs/<run>/deploy
"""

import os
import sys
import threading

from scripts import modeldir, report, rundir, service
from scripts.errors import InputError
from scripts.stage import Stage, run


def main(stage: Stage) -> dict:
    """The gate, the port, the key; then vLLM, with server.json while it answers. Ends by a signal or a fault."""
    model, bind, port = stage.path("FROM"), stage.facts["BIND"], stage.facts["PORT"]
    found = modeldir.problems(model)
    if "FORCE" not in stage.facts and not found:
        found += report.gate_problems(stage.directory.parent / "evaluate", model)
    found += service.port_problems(bind, port)
    if found:
        raise InputError(found)
    address = stage.directory / "server.json"
    address.unlink(missing_ok=True)
    env = {**os.environ, **service.environment(), "VLLM_API_KEY": service.api_key(stage)}
    threading.Thread(target=service.announce, args=(stage, address, rundir.describe(model)), daemon=True).start()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--config", str(stage.config)]
    command += ["--model", str(model), "--served-model-name", stage.run, "--host", bind, "--port", port]
    command += ["--middleware", "scripts.guard.Guard", *stage.arguments]
    try:
        stage.command(command, env)
    finally:
        address.unlink(missing_ok=True)
    raise RuntimeError(f"vLLM ended by itself; its words: {stage.log}")


if __name__ == "__main__":
    run(main)
