"""Named models at their full shape, sharded over ranks that are pretended: no GPU, no weights."""

import subprocess
import sys

import pytest

from bench.shapes import SHAPES
from tests.support.runs import ROOT

pytestmark = pytest.mark.slow
# Parameters of a rank, by torchtitan's own arithmetic: a tensor is cut in rows, norms are whole
# under tensor parallelism.
OWN = {
    ("llama3_1_8b", 8): 1_003_782_656,
    ("llama3_1_70b", 64): 1_102_545_920,
    ("llama3_1_405b", 512): 792_755_456,
}


def ask(model, ranks, options):
    words = [sys.executable, "-m", "bench.shapes", model, str(ranks), *options.split()]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("model", "ranks", "options"), SHAPES)
def test_a_rank_has_its_share(model, ranks, options):
    done = ask(model, ranks, options)
    assert done.returncode == 0, done.stderr[-2000:]
    total, own = (int(cell.replace(",", "")) for cell in done.stdout.split("|")[4:6])
    assert total / ranks <= own < 1.02 * total / ranks
    if "tensor_parallel" in options or ranks == 8:
        assert own == OWN[model, ranks]


def test_the_documentation_has_these_shapes():
    text = (ROOT / "docs/models.md").read_text()
    for model, ranks, options in SHAPES:
        assert f"| {model} | {ranks} | {options} | " in text
    for own in OWN.values():
        assert f" {own:,} " in text


def test_degrees_that_do_not_make_the_ranks_are_refused():
    done = ask("llama3_1_8b", 8, "--model.name llama3 --parallelism.tensor_parallel_degree 3")
    assert done.returncode != 0
    assert "3" in done.stderr
    assert "8" in done.stderr
