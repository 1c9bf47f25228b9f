"""The model card of a run's model, from its records: what it was made from, on which data, with
what, and its scores. All may read it some day, so of paths here it tells the last name alone."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from scripts.corpus.shapes import FOLDERS, NAMES
from scripts.launcher.options import with_recipe
from scripts.run import gate, stages
from scripts.run.files import read_json
from scripts.run.layout import finished, from_fact, run_of

DOWNLOADED = "download.json"  # what make download writes beside a model
SETS = stages.maker("sets").name  # records call a stage's sets so, among its inputs
LICENCE_KEYS = {
    "licence": "license",
    "licence_name": "license_name",
    "licence_link": "license_link",
}


@dataclass(frozen=True)
class Origins:
    """Hold the stages that a model came through, first to last, and what the first began with."""

    steps: list[tuple[Path, dict[str, Any]]]  # directory, record
    base: Optional[Path]  # None: random weights

    @property
    def parent(self) -> dict[str, Any]:
        """Return what make download has written of the base: hub id, commit, licence."""
        return dict(read_json(self.base / DOWNLOADED) or {}) if self.base else {}


def origins(directory: Path) -> Origins:
    """Walk back from a finished stage to the model that the first one began with."""
    steps: list[tuple[Path, dict[str, Any]]] = []
    while True:
        record = finished(directory)
        steps.insert(0, (directory, record))
        if "FROM" not in record["facts"]:
            return Origins(steps, None)
        source = from_fact(record["facts"]["FROM"], run_of(directory).root)
        made = (finished(source.parent) or {}).get("outputs", {})
        if source.name not in made or source.parent in [step for step, _ in steps]:
            return Origins(steps, source)
        directory = source.parent


def card(directory: Path, repository: str) -> str:
    """Write the card (README.md) of the model that a finished stage has made."""
    found = origins(directory)
    model = finished(directory)["outputs"]["model"]
    parts = [
        _front(found.parent),
        f"# {repository.split('/')[-1]}",
        f"{_base(found)} It has {model['parameters']:,} parameters.",
        "## Use",
        f"```bash\nvllm serve {repository}\n```",
        f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{repository}")\n```',
        "## How it was made",
        _table(
            ("stage", "ended", "sets", "steps", "loss", "model", "code"),
            [_step(step, record) for step, record in found.steps],
        ),
        _versions(found.steps),
        "## Data",
        *_data(found.steps),
        "## Scores",
        *_scores(directory, model["digest"]),
        "## Licence",
        _licence(found),
    ]
    return "\n\n".join(parts) + "\n"


def _front(parent: Mapping[str, Any]) -> str:
    """Write what the hub itself reads. A text in JSON is one in YAML."""
    told = {theirs: parent[ours] for ours, theirs in LICENCE_KEYS.items() if parent.get(ours)}
    if parent:
        told["base_model"] = parent["hub"]
    told.update(library_name="transformers", pipeline_tag="text-generation")
    lines = [f"{key}: {json.dumps(value)}" for key, value in told.items()]
    return "\n".join(["---", *lines, "tags:", "- torch-relay", "---"])


def _base(found: Origins) -> str:
    names = ", ".join(step.name for step, _ in found.steps)
    if found.base is None:
        return f"Trained from random weights with Torch Relay: {names}."
    if found.parent:
        hub, commit = found.parent["hub"], found.parent["commit"]
        return (
            f"Made from [{hub}](https://huggingface.co/{hub}) at commit `{commit}` with Torch "
            f"Relay: {names}."
        )
    return f"Made from a directory called `{found.base.name}` with Torch Relay: {names}."


def _step(directory: Path, record: Mapping[str, Any]) -> tuple[str, ...]:
    summary, data = record.get("summary") or {}, record["inputs"].get(SETS, {})
    loss = summary.get("loss")
    return (
        directory.name,
        time.strftime("%Y-%m-%d", time.gmtime(record["ended"])),
        f"`{data['digest'][:19]}…`" if data else "",
        str(summary.get("step", "")),
        f"{loss:.3f}" if isinstance(loss, float) else "",
        f"`{record['outputs']['model']['digest'][:19]}…`",
        f"`{record.get('git_commit', '')[:12]}`",
    )


def _versions(steps: list[tuple[Path, dict[str, Any]]]) -> str:
    told: dict[str, str] = {}
    for _, record in steps:
        told.update(record.get("versions", {}))
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(told.items()))


def _data(steps: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    found = []
    for directory, record in steps:
        if SETS not in record["inputs"]:
            continue
        path = from_fact(record["inputs"][SETS]["path"], run_of(directory).root)
        summary = (finished(path.parent) or {}).get("summary") or read_json(path / "data.json")
        if not summary:
            found.append(f"- {directory.name}: sets that are gone; their digest stands above")
            continue
        recipe = record["facts"].get("RECIPE", "")
        kind = with_recipe(stages.row(directory.name), recipe).trains_on
        rows = summary["rows"].get(FOLDERS[kind], 0) if kind else 0
        corpus = f" (`{summary['corpus'][:19]}…`)" if summary.get("corpus") else ""
        what = f"{rows:,} {NAMES[kind][1]}" if kind else "no rows"
        found.append(f"- {directory.name}: {what} from {summary['source']}{corpus}")
    return ["\n".join(found) or "None is recorded."]


def _scores(directory: Path, digest: str) -> list[str]:
    """Write the verdict's scores, if it is one of exactly this model."""
    judging = directory.parent / stages.maker("verdict").name
    verdict = read_json(judging / gate.VERDICT) if finished(judging) else None
    if not verdict or verdict["model"]["digest"] != digest:
        return ["These weights were not evaluated."]
    before, bounds = verdict.get("before", {}), {row["metric"]: row for row in verdict["floors"]}
    models = {**before, "this model": verdict}
    wanted = [name for name in gate.told_of(verdict) if name in verdict["scores"]]
    rows = []
    for name in wanted:
        cells = [_score(said, name) for said in models.values()]
        bound = bounds.get(name, {})
        needed = [f"{word} {bound[key]:.4g}" for key, word in _BOUNDS if key in bound]
        rows.append((name, *cells, " and ".join(needed)))
    passed = "kept every bound" if verdict["passed"] else "**missed a bound**"
    return [
        _table(("score", *models, "bound"), rows),
        f"On held-out rows of the data above, with lm-eval, ± one standard error. It {passed}.",
    ]


_BOUNDS = (("min", "at least"), ("max", "at most"))


def _score(said: Mapping[str, Any], name: str) -> str:
    value, error = said["scores"].get(name), said.get("errors", {}).get(name)
    if value is None:
        return ""
    return f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"


def _licence(found: Origins) -> str:
    parent = found.parent
    name = parent.get("licence_name") or parent.get("licence")
    if name:
        link = f" ({parent['licence_link']})" if parent.get("licence_link") else ""
        return (
            f"The weights are derived from {parent['hub']}, whose licence is `{name}`{link}; it "
            "holds for them, too. The licence of the training data is not recorded."
        )
    what = "the model that it was made from" if found.base else "the training data"
    return f"Not recorded: neither a licence for these weights, nor that of {what}."


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
