"""RUNTIME=docker or podman: the same command inside the image, on this machine.

The process ids and the network are this machine's, so that status, stop and chat work as without;
the repository, the runs and what the facts name lie at the same paths.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping

from scripts.run.digests import sha256
from scripts.run.errors import InputError
from scripts.run.layout import ROOT, relative
from scripts.run.submission import Submission

# What the image has there, a mount would hide.
OURS = re.compile(r"/|/(opt|usr|bin|lib|lib64|etc|tmp|proc|sys|dev)|/(opt/torch-relay|usr)(/.*)?")
ENGINES = ("docker", "podman")
IMAGE_USER = 2000  # of the Dockerfile
# Of 64 MB, an engine's own, NCCL and data loaders die with a bus error. A limit, nothing is taken.
SHM = "--shm-size=16g"
# What a stage is told by its environment; the rest of this shell's is not the image's business.
PASSED = re.compile(r"(PET|RELAY|NCCL|GLOO|FI|OMP|HF|TORCH|VLLM|WANDB)_.*|CUDA_VISIBLE_DEVICES")


def engine(environment: Mapping[str, str]) -> str:
    """Return RUNTIME: docker, podman, or "" for .venv. Raises InputError for any other."""
    name = environment.get("RUNTIME", "").strip()
    if name not in ("", *ENGINES):
        raise InputError(f"RUNTIME={name}: unknown; known: {', '.join(ENGINES)}, or none")
    return name


def image(environment: Mapping[str, str]) -> str:
    """Return IMAGE, or the name that make image gives."""
    default = "cuda" if os.path.exists("/dev/nvidiactl") else "cpu"
    return environment.get("IMAGE", "").strip() or f"torch-relay:{default}"


def problems(environment: Mapping[str, str]) -> list[str]:
    """List what keeps a stage out of its image: no engine, no image. Warns of an image that was
    built from another lock than the repository's. May block for 30 seconds."""
    name, wanted = engine(environment), image(environment)
    form = '{{index .Config.Labels "torch-relay.accelerator"}} {{index .Config.Labels \
"torch-relay.lock"}}'
    try:
        for words in (["info"], ["image", "inspect", "--format", form, wanted]):
            done = subprocess.run([name, *words], capture_output=True, text=True, timeout=30)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["no word"])[-1]
                mend = "start it" if words == ["info"] else "make image, or IMAGE=<name>"
                return [f"RUNTIME={name}: {said}; {mend}"]
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"RUNTIME={name}: {error}; install or start it"]
    accelerator, _, lock = done.stdout.strip().partition(" ")
    path = ROOT / f"requirements/{accelerator}.lock"
    if not path.is_file():
        return [f"IMAGE={wanted}: was not built by make image"]
    if lock != sha256(path):
        print(
            f"warning: {wanted} was built from another {relative(path)} ({lock}) than this"
            f" checkout's ({sha256(path)}); make image builds it anew",
            file=sys.stderr,
        )
    wrong = (given for given in _more_mounts(environment) if not _can_be_mounted(given))
    found = [f"MOUNTS={given}: give a folder that is here, as /data:/data" for given in wrong]
    return found + [
        f"{what}={path}: an engine's mounts take no , and no quote in a path; move it"
        for what, path in (("this checkout", ROOT), ("RUNS", environment.get("RUNS", "")))
        if re.search('[,"]', str(path))
    ]


def _more_mounts(environment: Mapping[str, str]) -> list[str]:
    return [given for given in environment.get("MOUNTS", "").split(",") if given.strip()]


def _can_be_mounted(given: str) -> bool:
    found = re.fullmatch(r"(/[^:]*):(/[^:]+?)/*(:r[ow])?", given.strip())
    return bool(found and os.path.exists(found[1]) and not OURS.fullmatch(found[2]))


def command(
    submission: Submission,
    variables: Mapping[str, str],
    words: list[str],
    environment: Mapping[str, str],
) -> list[str]:
    """Return the command that runs `words` with the variables in the image."""
    name = engine(environment)
    found = [name, "run", "--rm", "--network=host", "--pid=host", SHM]
    found += _user(name)
    if os.path.exists("/dev/nvidiactl"):
        found += ["--gpus=all"] if name == "docker" else ["--device=nvidia.com/gpu=all"]
    found += [f"--workdir={ROOT}", *_mounts(submission)]
    found += [f"--volume={given}" for given in _more_mounts(environment)]
    passed = {k for k, v in environment.items() if v and PASSED.fullmatch(k)} - set(variables)
    found += [f"--env={key}" for key in sorted(passed)]
    found += [f"--env={key}={value}" for key, value in variables.items()]
    return [*found, image(environment), *words]


def _user(name: str) -> list[str]:
    """Return the flags by which the stage is not root in the image, and its files are the caller's
    outside."""
    uid, gid = os.getuid(), os.getgid()
    if name == "docker":
        return [f"--user={uid}:{gid}"]
    label = "--security-opt=label=disable"  # SELinux would refuse the mounts
    if uid:
        return [label, "--userns=keep-id", f"--user={uid}:{gid}"]
    user, rest = IMAGE_USER, IMAGE_USER + 1
    maps = (f"0:1:{user}", f"{user}:0:1", f"{rest}:{rest}:{65536 - rest}")
    flags = [f"--{kind}={m}" for kind in ("uidmap", "gidmap") for m in maps]
    return [label, *flags, f"--user={user}:{user}"]


def _mounts(submission: Submission) -> list[str]:
    """Return the flags that show the stage, each at its own path, the repository and what its facts
    name, to read, and the runs, to write. Facts name by "/" what lies in neither of these."""
    named = [fact for fact in submission.facts.values() if fact.startswith("/")]
    read = [str(ROOT), *dict.fromkeys(path for path in named if os.path.exists(path))]
    runs = submission.run.root.resolve()
    mounts = [*(f"source={p},target={p},readonly" for p in read), f"source={runs},target={runs}"]
    return [f"--mount=type=bind,{mount}" for mount in mounts]
