"""Serve a model with vLLM's OpenAI API: FROM → http://BIND:PORT/v1, until it is stopped.

A cluster runs it: python -m scripts.deploy runs/<run>/deploy
"""

import tempfile
import threading
from pathlib import Path

from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.run import gate, modeldir, preflight
from scripts.run.errors import InputError
from scripts.run.processes import die_with_parent
from scripts.run.stages import maker
from scripts.tools import vllm


def main(stage: Parent) -> dict:
    """Check the gate and the port, then run vLLM, with server.json while it answers. Ends by a
    signal or a fault, never by itself."""
    model, bind, port = stage.path("FROM"), stage.facts["BIND"], int(stage.facts["PORT"])
    found = modeldir.problems(model)
    if not found:
        found = preflight.memory_problems(modeldir.weight_bytes(model), "the weights")
        found += preflight.kernel_problems((model / "config.json").read_text(), Path("/dev"))
    if not found and "FORCE" not in stage.facts:
        evaluation = stage.run.stage(maker("verdict").name)
        found += gate.problems(evaluation, model, stage.digests)
    found += preflight.port_problems(bind, port)
    if found:
        raise InputError(found)
    address = stage.directory / "server.json"
    address.unlink(missing_ok=True)
    waiting = (stage, address, stage.digests.describe(model))
    threading.Thread(target=vllm.write_address, args=waiting, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="relay-") as folder:
        # vLLM leaves sockets and files where TMPDIR says.
        more = {"VLLM_API_KEY": vllm.api_key(stage), "TMPDIR": folder}
        try:
            stage.ranks({**vllm.environment(), **more})
        finally:
            address.unlink(missing_ok=True)
    raise RuntimeError(f"vLLM ended by itself; its words: {stage.log}")


if __name__ == "__mp_main__":  # where vLLM spawns its engine, multiprocessing imports this file
    die_with_parent()
if __name__ == "__main__":
    run(main, vllm.serve)
