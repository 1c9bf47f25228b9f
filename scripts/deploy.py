"""Serve a model with vLLM's OpenAI API: FROM → http://BIND:PORT/v1, until it is stopped.

python -m scripts.deploy runs/<run>/deploy
"""

import threading

from scripts.job.stage import Stage, run
from scripts.launcher import report
from scripts.run import digests, modeldir, preflight
from scripts.run.errors import InputError
from scripts.run.processes import die_with_parent
from scripts.tools import vllm


def main(stage: Stage) -> dict:
    """The gate, the port, the key; then vLLM, with server.json while it answers. Ends by a signal or a fault."""
    model, bind, port = stage.path("FROM"), stage.facts["BIND"], stage.facts["PORT"]
    found = modeldir.problems(model) or preflight.memory_problems(modeldir.weight_bytes(model), "the weights")
    if "FORCE" not in stage.facts and not found:
        found += report.gate_problems(stage.directory.parent / "evaluate", model)
    found += preflight.port_problems(bind, int(port))
    if found:
        raise InputError(found)
    address = stage.directory / "server.json"
    address.unlink(missing_ok=True)
    threading.Thread(target=vllm.announce, args=(stage, address, digests.describe(model)), daemon=True).start()
    try:
        stage.ranks({**vllm.environment(), "VLLM_API_KEY": vllm.api_key(stage)})
    finally:
        address.unlink(missing_ok=True)
    raise RuntimeError(f"vLLM ended by itself; its words: {stage.log}")


if __name__ == "__mp_main__":  # where vLLM spawns its engine: multiprocessing imports this file again there
    die_with_parent()
if __name__ == "__main__":
    run(main, vllm.serve)
