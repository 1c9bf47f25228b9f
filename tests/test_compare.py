"""make compare: scores of runs side by side."""

import json

import pytest

from tests.support.launching import assert_refused, launch


@pytest.fixture
def judged(runs):
    """Write a finished evaluation of a run: {score: (value, standard error)}."""

    def write(name, scores, data="sha256:1"):
        folder = runs / name / "evaluate"
        folder.mkdir(parents=True)
        record = {"status": "done", "inputs": {"data": {"path": "x", "digest": data}}}
        (folder / "stage.json").write_text(json.dumps(record))
        verdict = {
            "scores": {key: value for key, (value, _) in scores.items()},
            "errors": {key: error for key, (_, error) in scores.items() if error},
        }
        (folder / "verdict.json").write_text(json.dumps(verdict))

    return write


def test_scores_stand_side_by_side(judged):
    judged("a", {"t/acc": (0.5, 0.01), "t/loss": (2.0, 0.1), "only/a": (1.0, 0.0)})
    judged("b", {"t/acc": (0.6, 0.01), "t/loss": (2.1, 0.1)})
    judged("c", {"t/acc": (0.5, 0.01), "t/loss": (2.0, 0.1)}, data="sha256:2")
    result = launch("compare", RUN="a,b")
    assert result.returncode == 0, result.stderr
    assert [line.split("  ")[0] for line in result.stdout.splitlines()][:3] == [
        "score",
        "t/acc",
        "t/loss",
    ]
    assert "0.500 ± 0.010  0.600 ± 0.010*" in result.stdout
    assert "2.000 ± 0.100  2.100 ± 0.100\n" in result.stdout
    assert "data differ" not in result.stdout
    assert "data differ" in launch("compare", RUN="a, b, c").stdout


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("a", ["give two runs", "RUN=a,b"]),
        ("a,nobody", ["RUN=nobody: no such run"]),
        ("a,empty", ["RUN=empty: has no scores yet", "make evaluate RUN=empty"]),
        ("a,other", ["no score in common"]),
        ("a,B", ["RUN='B'", "a-z"]),
    ],
)
def test_what_cannot_be_compared_is_named(judged, runs, names, words):
    judged("a", {"t/acc": (0.5, 0.01)})
    judged("other", {"u/acc": (0.5, 0.01)})
    (runs / "empty").mkdir()
    assert_refused(launch("compare", RUN=names), *words)
