"""Make a model smaller with llm-compressor: FROM + some rows of sft/ → model/, in 8 or 4 bits.

A cluster runs it: python -m scripts.quantize runs/<run>/quantize
"""

from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.run import modeldir
from scripts.run.errors import InputError
from scripts.tools import compressor


def main(stage: Parent) -> dict:
    """Check what can be seen without llm-compressor, run it in one process, hand the model over."""
    source, data = stage.path("FROM"), stage.path("DATA")
    found = modeldir.problems(source) or modeldir.untrainable(source / "config.json")
    found = found or compressor.problems(stage, source, data)
    if found:
        raise InputError(found)
    export = stage.scratch(compressor.EXPORT)
    stage.ranks({"TQDM_DISABLE": "1"})  # bars, a new one each layer, would hide which layer it is
    stage.phase("hands the model over")
    model = modeldir.hand_over(export, source, stage.directory / "model", stage.digests)
    # Scales beside the weights, and eight weights in one number, are no other parameters.
    model["parameters"] = modeldir.parameter_count(source)
    describe, sizes = stage.digests.describe, (stage.directory / "model", source)
    now, before = (modeldir.weight_bytes(folder) / 1e6 for folder in sizes)
    return {
        "inputs": {
            "model": describe(source),
            **({"data": describe(data)} if compressor.reads_rows(stage) else {}),
        },
        "outputs": {"model": model},
        "summary": {
            "result": f"{stage.facts['RECIPE']}, {now:,.1f} MB of {before:,.1f}",
            "tool": compressor.version(),
        },
    }


if __name__ == "__main__":
    run(main, compressor.quantize)
