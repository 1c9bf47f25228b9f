"""make models: what configs/models knows, as a table that docs/models.md holds, too."""

from __future__ import annotations

from scripts.launcher.options import MODELS, folder_names
from scripts.run.files import read_json

# Bytes of weights, gradients and Adam's moments for each parameter: all in float32 (torchtitan), in
# bfloat16 (torchtune on a GPU); under LoRA the weights alone, in bfloat16.
BYTES = (16, 8, 2)
HEAD = (
    "| MODEL | parameters | context | licence | hub | GB: float32, bfloat16, LoRA |",
    "|---|---:|---:|---|---|---|",
)


def table() -> list[str]:
    """Format one line for each named model, smallest first; memory is that of the states alone,
    over all GPUs, in units of 10⁹ bytes."""
    facts = {name: read_json(MODELS / name / "model.json") for name in folder_names(MODELS)}
    known = {name: said for name, said in facts.items() if said}
    lines = list(HEAD)
    for name in sorted(known, key=lambda n: (known[n]["parameters"], n)):
        said = known[name]
        gigabytes = (said["parameters"] * size / 1e9 for size in BYTES)
        cells = [
            name,
            f"{said['parameters']:,}",
            f"{said['context']:,}",
            said["licence"] + (", gated" if said["gated"] else ""),
            said["hub"],
            ", ".join(f"{number:,.1f}" for number in gigabytes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
