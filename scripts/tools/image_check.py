"""What an image holds, seen from inside it, on one page: make image-check IMAGE=….

image/check.sh runs it in the image, with ACCELERATOR and EFA as the image was built, and LINE=0
where the five stages are to be left out. It exits 1 if a line says FAULT.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from scripts.run.files import read_env
from scripts.run.layout import ROOT

IMPORTS = ("torch", "torchtitan", "torchtune", "torchao", "lm_eval", "vllm", "transformers")
HELPS = (
    ("torchrun", "--help"),
    ("tune", "--help"),
    ("lm_eval", "--help"),
    (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--help"),
)
OFI_PLUGIN = "libnccl-net-ofi.so"
OFI_FOLDERS = ("/opt/amazon/ofi-nccl/lib", "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu")


class Fault(Exception):
    """Carry what is wrong with the image."""


def normal(name: str) -> str:
    """Return a package's name as PyPI compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(text: str) -> dict[str, str]:
    """Return {package: version} of a lock file's text, for the Python and machine this runs on."""
    from packaging.requirements import Requirement

    found = {}
    for line in re.findall(r"^[A-Za-z0-9].*==.*$", text, re.M):
        wanted = Requirement(line.rstrip("\\ "))
        if wanted.marker is None or wanted.marker.evaluate():
            found[normal(wanted.name)] = str(wanted.specifier).removeprefix("==")
    return found


def versions(accelerator: str) -> str:
    """Compare what is installed with the image's own lock."""
    lock = locked((ROOT / f"requirements/{accelerator}.lock").read_text(encoding="utf-8"))
    there = {normal(d.name): d.version for d in metadata.distributions()}
    other = [
        f"{name} {there.get(name, 'missing')}, locked {version}"
        for name, version in lock.items()
        if there.get(name, "").partition("+")[0] != version.partition("+")[0]
    ]
    if other:
        raise Fault("; ".join(other[:10]))
    return f"{len(lock)} packages as {accelerator}.lock has them"


def imports(accelerator: str) -> str:
    """Import every tool, and on a CPU vLLM's kernels: without libnuma they are missing, and only
    the start of a model says so. On a GPU they need its driver."""
    found = []
    if accelerator == "cpu":
        importlib.import_module("vllm._C")
    for name in IMPORTS:
        module = importlib.import_module(name)
        found.append(f"{name} {getattr(module, '__version__', '')}".strip())
    return ", ".join(found)


def helps() -> str:
    """Ask each tool's command line for its help."""
    for words in HELPS:
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise Fault(f"{' '.join(words)}: exit {done.returncode}: {last}")
    return ", ".join(Path(words[-2]).name for words in HELPS)


def nccl() -> str:
    """Say which NCCL torch loads: only the one of its own wheel is tested with it."""
    import torch

    if not torch.backends.cuda.is_built():
        return "none: torch's CPU build"
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = sorted(name for name in names if "libnccl.so" in name)
    if len(found) != 1 or "site-packages/nvidia/nccl" not in found[0]:
        raise Fault(f"torch has loaded {found}, not the one of its wheel")
    version = ctypes.c_int()
    ctypes.CDLL(found[0]).ncclGetVersion(ctypes.byref(version))
    major, rest = divmod(version.value, 10000)  # NCCL_VERSION of nccl.h
    return f"{major}.{rest // 100}.{rest % 100} of {found[0]}"


def efa(asked: str) -> str:
    """Compare whether EFA's plugin for NCCL is there with what was asked for."""
    there = [folder for folder in OFI_FOLDERS if Path(folder, OFI_PLUGIN).exists()]
    if asked == "none":
        if there:
            raise Fault(f"{there[0]}/{OFI_PLUGIN} is there, though EFA=none was asked for")
        return "no plugin, as asked (EFA=none)"
    if not there:
        raise Fault(f"{OFI_PLUGIN} is missing, though EFA={asked} was asked for")
    ctypes.CDLL(f"{there[0]}/{OFI_PLUGIN}")
    return f"{there[0]}/{OFI_PLUGIN}, installer {asked}"


def driver(accelerator: str, path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Compare the host's driver with what CUDA needs."""
    if not path.exists():
        return "none: no GPU here"
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", path.read_text(encoding="ascii"))
    version = found[1] if found else "unknown"
    least = read_env(ROOT / "versions.env")["CUDA_DRIVER_MINIMUM"]
    if accelerator == "cuda" and int(version.partition(".")[0]) < int(least):
        raise Fault(f"{version} is older than {least}, which CUDA 13 needs; renew the host's")
    return version


def user() -> str:
    """Check that the image's user is not root and has a home to write to."""
    if os.getuid() == 0:
        raise Fault("runs as root")
    with tempfile.NamedTemporaryFile(dir=Path.home()):
        pass
    return f"uid {os.getuid()}, {Path.home()} can be written to"


def line() -> str:
    """Run the five stages with the debug model, to an answer; return the table's last column."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as runs:
        given = {**os.environ, "RUN": "check", "RUNS": runs, "PORT": str(port)}
        words = [sys.executable, "-m", "scripts.launch"]
        done = subprocess.run([*words, "pipeline"], cwd=ROOT, env=given, capture_output=True)
        subprocess.run([*words, "undeploy"], cwd=ROOT, env=given, capture_output=True)
        said = (done.stdout + done.stderr).decode(errors="replace")
        if done.returncode:
            raise Fault(f"exit {done.returncode}: {said[-2000:]}")
        table = re.findall(r"^(?:pretrain|finetune|align|evaluate) .*$", said, re.M)
        return "".join(f"\n    {row}" for row in table)


def page(accelerator: str, asked: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Return the checks of the page, each with its name."""
    yield "user", user
    yield "driver", lambda: driver(accelerator)
    yield "versions", lambda: versions(accelerator)
    yield "imports", lambda: imports(accelerator)
    yield "--help", helps
    yield "NCCL", nccl
    yield "EFA", lambda: efa(asked)
    if os.environ.get("LINE", "1") != "0":
        yield "the line", line


def main() -> int:
    """Print the page; return 1 if anything is wrong, else 0."""
    faults = 0
    print(f"{'Python':9} {sys.version.split()[0]}")
    for name, check in page(os.environ["ACCELERATOR"], os.environ.get("EFA", "none")):
        try:
            said = check()
        except Exception as problem:  # whatever an import or a tool raises is what the page says
            said, faults = f"FAULT: {problem}", faults + 1
        print(f"{name:9} {said}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
