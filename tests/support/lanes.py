"""How slow tests are shared out among the workers of pytest -n, and what a machine may lack.

xdist's own groups (--dist loadgroup) do nothing under pytest 9.2: xdist 3.8 writes them into an
attribute that pytest no longer reads. This module's scheduler goes when xdist has mended that.
"""

import os

import pytest

# One demo, one cluster of each kind, one image: on one worker each. And what two workers would
# make twice, for half a minute each.
LANES = (
    "tests/test_line.py::",
    "tests/test_slurm.py::",
    "tests/test_kubernetes.py::",
    "tests/test_image.py::",
    "tests/test_derive.py::",
    "tests/test_torchtitan.py::test_every_layout_has_the_gradients_of_one_rank",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Give a worker a lane as a whole, the lanes first, and every other test by itself."""
    from xdist.scheduler import LoadScopeScheduling

    class ByLane(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((lane for lane in LANES if nodeid.startswith(lane)), nodeid)

    return ByLane(config, log)


def lacking(what: str) -> None:
    """Skip a lane that this machine cannot run; in CI, where lanes are required, fail."""
    (pytest.fail if os.environ.get("LANES") == "required" else pytest.skip)(what)
