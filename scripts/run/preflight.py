"""What a stage will need of the machine, before it starts to work. Lower bounds, from the
architecture alone: activations and caches come on top. The launcher asks about .venv, the disk and
the port, the job about its own memory and GPUs."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from scripts.run.layout import ROOT

GB = 1e9
LEAST_PINNED = 1 << 30  # bytes; NCCL's buffers of a node with eight GPUs


def parameters(config: Mapping[str, Any]) -> int:
    """Count the parameters of a Llama from its config.json: embeddings and output; in each layer
    four attention projections, three of the feed-forward and two norms; a last norm. Of another
    dense decoder it is an estimate.

    Raises KeyError for a config without these sizes.
    """
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or dim // heads
    attention = 2 * dim * head * (heads + (config.get("num_key_value_heads") or heads))
    layer = attention + 3 * dim * config["intermediate_size"] + 2 * dim
    embeddings = config["vocab_size"] * dim * (1 if config.get("tie_word_embeddings") else 2)
    return int(embeddings + config["num_hidden_layers"] * layer + dim)


def venv_problems() -> list[str]:
    """List what keeps this user from running the repository's own Python."""
    usable = os.access(ROOT / ".venv/bin/python", os.X_OK)
    return [] if usable else [".venv: missing, or its Python is not yours to run; make setup"]


def disk_problems(directory: Path, need: float, what: str) -> list[str]:
    """Return a problem if `need` bytes do not fit on the disk where a stage's directory is or will
    be; `what` names them. Checkpoints saved there already are part of the `need`."""
    files = (directory / "checkpoints").rglob("*")
    need -= sum(file.stat().st_size for file in files if file.is_file())
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if need <= free:
        return []
    sizes = f"{what} will need {need / GB:.2f} GB, {free / GB:.2f} are free"
    return [f"{directory}: {sizes}; free some, or choose another place with RUNS="]


def memory_problems(need: float, what: str, free: Optional[float] = None) -> list[str]:
    """Tell whether `need` bytes fit into `free`: where it is None, into this process's memory, the
    machine's or its control group's if that is less."""
    free = free_memory() if free is None else free
    if need <= free:
        return []
    sizes = f"{need / GB:.2f} GB of memory, {free / GB:.2f} are free"
    return [f"{what} will need at least {sizes}; take a larger machine or a smaller model"]


def device_problems(processes: int, environment: Mapping[str, str], devices: Path) -> list[str]:
    """Tell what a stage with so many processes lacks of the devices of this machine (/dev)."""
    found = gpu_problems(processes, environment, devices)
    return found + pinned_memory_problems(environment, devices)


def gpu_problems(processes: int, environment: Mapping[str, str], devices: Path) -> list[str]:
    """Tell whether there are fewer GPUs than processes that each take one: those that
    CUDA_VISIBLE_DEVICES names, or all nvidia0, nvidia1, … in `devices` (/dev). None at all: the
    processes use the CPU."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = len([path for path in devices.glob("nvidia*") if path.name[6:].isdecimal()])
    else:
        gpus = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if not gpus or processes <= gpus:
        return []
    mend = f"GPUS={gpus}, or CUDA_VISIBLE_DEVICES= for processes on the CPU"
    return [f"GPUS={processes}: this machine has {gpus} (nvidia-smi -L); {mend}"]


def kernel_problems(said: str, devices: Path) -> list[str]:
    """Tell whether a model, by what its config.json or its recipe says, has weights of 4 bits, and
    the machine no GPU in `devices` (/dev): vLLM's build for CPUs has no kernel for them."""
    if not re.search(r"\bW4A|FP4\b|num_bits\W+4\b", said) or any(devices.glob("nvidia[0-9]*")):
        return []
    return [
        "weights of 4 bits: vLLM serves them on a GPU alone, and here is none; take int8 or fp8"
    ]


def pinned_memory_problems(environment: Mapping[str, str], devices: Path) -> list[str]:
    """Tell whether EFA or InfiniBand, where NCCL_NET asks for one, may pin too little memory:
    libfabric then says -12 and names nothing."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    wanted = environment.get("NCCL_NET") in ("AWS Libfabric", "IB")
    enough = limit == resource.RLIM_INFINITY or limit >= LEAST_PINNED
    if not wanted or enough or not any(devices.glob("nvidia[0-9]*")):
        return []
    return [
        f"{environment['NCCL_NET']}: this process may pin {limit >> 10:,} KiB of memory (ulimit -l)"
        "; the node's matter: LimitMEMLOCK=infinity for containerd, or for slurmd with"
        " PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
    ]


def port_problems(bind: str, port: int, patience: float = 5) -> list[str]:
    """List why this address cannot be taken; [] if it is free within `patience` seconds: a service
    that was just killed takes a moment to let it go."""
    deadline = time.monotonic() + patience
    while True:
        with socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((bind, port))
                return []
            except OSError as error:
                if time.monotonic() > deadline:
                    mend = f"choose another, for example PORT={port + 1}"
                    return [f"BIND={bind} PORT={port}: {error.strerror}; {mend}"]
        time.sleep(0.2)


def free_memory() -> int:
    """Return the bytes of main memory that this process may still take (proc(5) MemAvailable,
    cgroup v2 memory.max)."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    free = int(found[1]) * 1024 if found else 0
    own = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("::")[2].strip()
    group = Path("/sys/fs/cgroup", own.lstrip("/"))
    for folder in (group, *group.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            free = min(free, int(text) - int(used.read_text()))
        if folder == Path("/sys/fs/cgroup"):
            break
    return free
