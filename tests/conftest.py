"""Fixtures that test files share: a place for runs, and a small whole model directory."""

import os
import shutil
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.support")

from scripts.run import modeldir  # noqa: E402
from tests.support.lanes import pytest_xdist_make_scheduler  # noqa: E402, F401  a hook of xdist's
from tests.support.models import write_model  # noqa: E402
from tests.support.runs import ROOT  # noqa: E402

os.environ.pop("PYTHONUNBUFFERED", None)  # as in a user's shell: a stage must not depend on it
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # workers share the cores; comparisons to the last bit want one number of threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """An empty folder of runs, with a space in its path."""
    folder = tmp_path / "my runs"
    monkeypatch.setenv("RUNS", str(folder))
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    """A directory that passes every check of its form, with next to nothing inside."""
    directory = write_model(tmp_path / "model")
    assert modeldir.problems(directory) == [], "the model that tests begin with must be whole"
    return directory


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with kubernetes/ alone, to change."""
    shutil.copytree(ROOT / "kubernetes", tmp_path / "kubernetes")
    return tmp_path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """All runs of a session, under a path with a space and a pattern's characters; the workers of
    pytest -n share it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    path = base / "the line [v1]" / "my runs"
    path.mkdir(parents=True, exist_ok=True)
    os.environ["RUNS"] = str(path)
    return path


def pytest_collection_modifyitems(config, items):
    """Leave the longest tests to make test-nightly, and to whoever asks for one by its name."""
    if os.environ.get("NIGHTLY") or config.option.keyword:
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    items[:] = [item for item in items if item not in nightly]
    config.hook.pytest_deselected(items=nightly)
