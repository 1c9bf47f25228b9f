"""Serve a model as one of the pods of a service, from a run directory that it only reads.

    python3 -m scripts.serve /runs/<run>/deploy

The Deployment of kubernetes/base/serve starts it, and sets VLLM_API_KEY, the key that the API asks
for, and JUDGED_MODEL, the digest of the model that was judged.
"""

import os
import sys
from pathlib import Path

from scripts.job.environment import JobEnvironment
from scripts.job.rank import Rank
from scripts.run.digests import Digests
from scripts.run.errors import WRONG_INPUT, InputError
from scripts.run.processes import die_with_parent
from scripts.tools import vllm


def main(directory: Path) -> None:
    """Serve until SIGTERM. Raises InputError if the model is not the one that was judged."""
    stage = Rank(directory, JobEnvironment(rank=0))
    model, judged = stage.path("FROM"), os.environ.get("JUDGED_MODEL", "")
    there = Digests(stage.run, remember=False).describe(model)["digest"]
    if judged and there != judged:
        again = f"make evaluate and make deploy with RUN={stage.run.name}"
        raise InputError(f"{model}: is not the model that was judged ({judged}); {again}")
    os.environ.update(vllm.environment())
    vllm.serve(stage)


if __name__ == "__mp_main__":  # where vLLM spawns its engine, multiprocessing imports this file
    die_with_parent()
if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
