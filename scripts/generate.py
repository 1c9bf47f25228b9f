"""Answer a file of prompts with vLLM, many at once: a run's model + DATA → OUT, in the same order.

    RUN=mine DATA=prompts.jsonl OUT=answers.jsonl .venv/bin/python -m scripts.generate

DATA has one prompt a line: JSON with "prompt" or "messages", or plain text (.txt). FROM= names any
Hugging Face directory instead of RUN's newest model. ARGS are vLLM's, as for a service. What has
been answered lies in OUT.part; the same command goes on from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts.launcher import options, report
from scripts.run import modeldir, stages
from scripts.run.errors import DONE, WRONG_INPUT, InputError
from scripts.run.layout import finished
from scripts.tools.vllm_batch import Answers, answer, read_prompts


def generate(env: Mapping[str, str]) -> str:
    """Answer DATA's prompts; return what to say of it. Raises InputError."""
    server = stages.maker("service").name
    asked = options.read(server, {**env, "DATA": ""})
    prompts, out = Path(os.path.expanduser(env.get("DATA", ""))), env.get("OUT", "")
    found = [] if env.get("DATA") and out else ["give DATA=prompts.jsonl and OUT=answers.jsonl"]
    if asked.from_:
        model = Path(asked.from_)
    else:
        report.check_exists(asked.run)
        made = [n for n in stages.trained() if finished(asked.run.stage(n))]
        if not made:
            found.append(f"RUN={asked.run.name}: has no finished model; train one, or give FROM=")
        model = asked.run.stage(made[-1] if made else stages.trained()[0]) / "model"
    found = found or modeldir.problems(model)
    if found:
        raise InputError(found)
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
