"""Answer a file of prompts with vLLM, many at once: a run's model + DATA → OUT, in the same order.

    RUN=mine DATA=prompts.jsonl OUT=answers.jsonl .venv/bin/python -m scripts.generate

DATA has one prompt a line: JSON with "prompt" or "messages", or plain text (.txt). FROM= names any
Hugging Face directory instead of the newest model of RUN (or of its STAGE=). ARGS are vLLM's, as
for a service. What has been answered lies in OUT.part; the same command goes on from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts.launcher import options, report
from scripts.run import modeldir, stages
from scripts.run.errors import DONE, WRONG_INPUT, InputError
from scripts.tools.vllm_batch import Answers, answer, read_prompts


def generate(env: Mapping[str, str]) -> str:
    """Answer DATA's prompts; return what to say of it. Raises InputError."""
    server = stages.maker("service").name
    asked = options.read(server, {**env, "DATA": ""})
    if asked.dry_run:
        raise InputError("DRY_RUN=1: generate has no dry run; it writes OUT alone")
    data, out = env.get("DATA", ""), env.get("OUT", "")
    if not data or not out:
        raise InputError("give the prompts and where the answers go: DATA=prompts.jsonl OUT=…")
    given = asked.from_ or ("" if asked.run.directory.is_dir() else asked.downloaded)
    model = Path(given) if given else report.made_model(asked.run, asked.stage) / "model"
    found = modeldir.problems(model)
    if found:
        raise InputError(found)
    prompts = Path(os.path.expanduser(data))
    answers = Answers(Path(os.path.expanduser(out)), read_prompts(prompts))
    if answers.left:
        answer(model, answers, [*options.settings(asked.model, server), *asked.args[server]])
    return answers.hand_over()


if __name__ == "__main__":
    try:
        print(generate({**os.environ, "DEPLOY_ARGS": os.environ.get("ARGS", "")}))
    except InputError as error:
        for said in error.problems:
            print(f"error: {said}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    sys.exit(DONE)
