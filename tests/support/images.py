"""A container engine on this machine, for tests: podman with runc, and a base image from Debian's
packages alone. Needs Debian's podman, runc, mmdebstrap, squashfs-tools and iptables; root."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.support.lanes import lacking
from tests.support.runs import ROOT

NEEDED = ("podman", "runc", "mmdebstrap", "mksquashfs")
BASE = "localhost/torch-relay-base:bookworm"
# crun and systemd's cgroups do not work in every machine that tests run on; the network is the
# machine's, since a build asks its package index.
CONF = """\
[containers]
netns = "host"
default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def prepare(folder: Path) -> None:
    """Make podman usable in this process's environment, and the base image. Skips where something
    is missing, but in CI."""
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing or os.geteuid():
        lacking(f"no image is built here: {', '.join(missing) or 'not root'}")
    (folder / "containers.conf").write_text(CONF)
    os.environ["CONTAINERS_CONF"] = str(folder / "containers.conf")
    if subprocess.run(["podman", "image", "exists", BASE]).returncode:
        tar = folder / "base.tar"
        words = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates"]
        subprocess.run([*words, "bookworm", str(tar)], check=True)
        subprocess.run(["podman", "import", "--quiet", str(tar), BASE], check=True)
        tar.unlink()


def podman(*words: str) -> str:
    """Call podman; return what it printed."""
    done = subprocess.run(["podman", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"podman {words}: {done.stderr[-3000:]}"
    return done.stdout.strip()
