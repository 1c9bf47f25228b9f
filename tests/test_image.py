"""The image, built from Debian's packages: what it holds, that stages run in it as without."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.images import BASE, podman, prepare
from tests.support.launching import assert_refused, call_make, make
from tests.support.runs import ROOT, TRAINED, digest_tree, finished
from tests.support.slurm_lab import Lab, until

pytestmark = pytest.mark.slow  # on one worker (lanes.LANES): the image is built once
TAG = "torch-relay:test"
BUILD = {"ACCELERATOR": "cpu", "BASE_IMAGE": BASE, "TAG": TAG, "RUNTIME": "podman"}
OCI = """\
RunTimeQuery="runc --root={folder}/oci.%n state %n.%u.%j.%s.%t"
RunTimeKill="runc --root={folder}/oci.%n kill -a %n.%u.%j.%s.%t"
RunTimeDelete="runc --root={folder}/oci.%n delete --force %n.%u.%j.%s.%t"
RunTimeRun="runc --root={folder}/oci.%n run %n.%u.%j.%s.%t -b %b"
"""
SMALL = {
    "PRETRAIN_ARGS": "--training.steps 30",
    "FINETUNE_ARGS": "max_steps_per_epoch=4 epochs=1",
    "ALIGN_ARGS": "max_steps_per_epoch=4 epochs=1",
    "FORCE": "1",
}


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The CPU image, from this checkout."""
    prepare(tmp_path_factory.mktemp("containers"))
    print(make("image", **BUILD).stdout[-3000:])
    return TAG


@pytest.fixture(scope="session")
def bare(folder):
    """The stages outside the image, with the sets in "sets"."""
    make("data", RUN="sets")
    make("pipeline", RUN="bare", DATA=str(folder / "sets/data"), **SMALL, PORT="8031")
    make("undeploy", RUN="bare")
    return folder


def layers(image):
    """Return the digests of an image's layers."""
    return json.loads(podman("image", "inspect", "--format", "{{json .RootFS.Layers}}", image))


def test_nothing_is_built_twice(image, tmp_path):
    before = layers(image)
    assert "Using cache" in make("image", **BUILD).stdout
    assert layers(image) == before
    for name in ("Dockerfile", ".dockerignore", "Makefile", "versions.env"):
        shutil.copy2(ROOT / name, tmp_path / name)
    for name in ("image", "configs", "requirements", "scripts", "slurm", "kubernetes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    with open(tmp_path / "scripts/components.py", "a") as script:
        script.write("\n")
    given = [f"{k}={v}" for k, v in {**BUILD, "TAG": f"{TAG}-edited"}.items()]
    subprocess.run(["make", "-C", tmp_path, "image", *given], check=True)
    edited = layers(f"{TAG}-edited")
    same = [a == b for a, b in zip(before, edited)]
    assert same.index(False) >= len(before) - 3, "only the last layers may change"


def test_the_page_finds_nothing_wrong(image):
    page = make("image-check", IMAGE=image, RUNTIME="podman", LINE="0").stdout
    print(page)
    assert "FAULT" not in page
    assert "uid 2000, /home/relay can be written to" in page
    assert re.search(r"versions +\d{3} packages as cpu.lock has them", page)


def test_nothing_secret_and_no_cache_is_in_any_layer(image):
    """Layer by layer: what a later one removes is still there for whoever pulls it."""
    driver = json.loads(podman("image", "inspect", "--format", "{{json .GraphDriver.Data}}", image))
    folders = [*driver.get("LowerDir", "").split(":"), driver["UpperDir"]]
    found = []
    for folder in filter(None, folders):
        for path in Path(folder).rglob("*"):
            name = path.relative_to(folder).as_posix()
            cached = re.match(
                r"(root|home/relay)/\.cache/|var/(lib/apt/lists|cache/apt)/.+\.(deb|bin)|tmp/.+",
                name,
            )
            if cached or name.startswith("run/secrets/"):
                found.append(name)
            text = path.suffix not in (".py", ".so", ".pyc", ".h", ".a", ".md", ".json", ".txt")
            small = text and path.is_file() and not path.is_symlink()
            if small and path.stat().st_size < 100_000 and "/site-packages/" not in name:
                content = path.read_bytes()
                if re.search(rb"PRIVATE KEY-----|\bhf_[A-Za-z0-9]{30}|\bAKIA[0-9A-Z]{16}", content):
                    found.append(name)
    assert found == []
    history = podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert not re.search(r"://[^/\s]*:[^/\s]*@", history), "an address with a password"


def test_stages_run_in_it_as_without(image, bare):
    """The same sets, settings and threads: the same bytes in every model; and the caller's."""
    given = {**SMALL, "PORT": "8031", "RUNTIME": "podman", "IMAGE": image}
    out = make("pipeline", RUN="inside", DATA=str(bare / "sets/data"), **given).stdout
    assert "answered" in out
    make("undeploy", RUN="inside", RUNTIME="podman")
    for stage in TRAINED:
        models = [digest_tree(bare / run / stage / "model") for run in ("bare", "inside")]
        assert models[0] == models[1], f"{stage}: other weights in the image"
        versions = finished(bare / "inside" / stage)["versions"]
        assert versions["torch"] == finished(bare / "bare" / stage)["versions"]["torch"]
    foreign = [p for p in (bare / "inside").rglob("*") if p.stat().st_uid != os.getuid()]
    assert foreign == [], "the run belongs to the caller"


@pytest.fixture
def bundle(image, bare, tmp_path):
    """The image as Slurm's own --container takes it: its files, what is mounted, no namespace but
    the mounts'."""
    folder = tmp_path / "bundle"
    (folder / "rootfs").mkdir(parents=True)
    subprocess.run(["runc", "spec", "--bundle", folder], check=True)
    spec = json.loads((folder / "config.json").read_text())
    spec["process"]["cwd"] = str(ROOT)
    spec["linux"] = {"namespaces": [{"type": "mount"}]}
    del spec["hostname"]  # would need a namespace
    mounts = [m for m in spec["mounts"] if m["type"] in ("proc", "tmpfs")]  # proc, dev, dev/shm
    mounts.append({"destination": tempfile.gettempdir(), "type": "tmpfs", "source": "tmpfs"})
    for path in (str(ROOT), str(bare)):
        mounts.append({"destination": path, "type": "bind", "source": path, "options": ["rbind"]})
    (folder / "config.json").write_text(json.dumps({**spec, "mounts": mounts}))
    container = podman("create", image, "true")
    subprocess.run(["mount", "--bind", podman("mount", container), folder / "rootfs"], check=True)
    yield folder
    subprocess.run(["umount", folder / "rootfs"], check=True)
    podman("rm", "--force", container)


def test_slurm_runs_a_stage_in_it(bare, bundle, tmp_path_factory, monkeypatch):
    """By Slurm's own --container and runc, the same bytes again; more nodes are refused, since each
    would take itself for the first."""
    lab = Lab(tmp_path_factory.mktemp("slurm"))
    lab.folder.joinpath("oci.conf").write_text(OCI.format(folder=lab.folder))
    lab.up()  # its nodes see the mounts that are there before
    try:
        monkeypatch.setenv("PATH", f"/opt/torch-relay/.venv/bin:{os.environ['PATH']}")
        own = {**lab.environment, "RELAY_RUNTIME": "oci", "RELAY_IMAGE": str(bundle)}
        given = {**own, "CLUSTER": "slurm", "DATA": str(bare / "sets/data")}
        make("pretrain", RUN="oci", ARGS=SMALL["PRETRAIN_ARGS"], **given)
        make("pretrain", RUN="oci-two", NODES="2", **given)
        until(lambda: (bare / "oci/pretrain/stage.json").exists(), seconds=180)
        until(lambda: "NODES=1" in call_make("status", RUN="oci-two", **given).stdout)
    finally:
        lab.down()
    model = digest_tree(bare / "oci/pretrain/model")
    assert model == digest_tree(bare / "bare/pretrain/model")
    versions = [finished(bare / run / "pretrain")["versions"] for run in ("oci", "inside")]
    assert versions[0] == versions[1], "not the image's"


def test_it_starts_from_a_squashfs(image, tmp_path):
    make("squashfs", IMAGE=image, RUNTIME="podman", OUT=str(tmp_path / "relay.sqsh"))
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-o", "ro,loop", tmp_path / "relay.sqsh", mounted], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mounted / "tmp"], check=True)
    try:
        environment = (mounted / "etc/environment").read_text()
        path = re.search(r"^PATH=(.+)$", environment, re.M)[1]
        words = ["chroot", mounted, "env", f"PATH={path}", "python3", "-c"]
        code = "import torch; print(torch.__version__)"
        done = subprocess.run([*words, code], capture_output=True, text=True)
        assert done.stdout.startswith("2.13.0"), done.stderr
    finally:
        subprocess.run(["umount", "--recursive", mounted], check=True)


def test_an_image_of_another_lock_is_told(image, tmp_path):
    file = tmp_path / "Containerfile"
    file.write_text(f"FROM {image}\nLABEL torch-relay.lock=0123\n")
    podman("build", "--tag", f"{TAG}-other", "--file", str(file), str(tmp_path))
    said = call_make("image-check", IMAGE=f"{TAG}-other", RUNTIME="podman", LINE="0").stderr
    assert "was built from another cpu.lock (0123) than this checkout's (" in said


def test_what_cannot_be_built_is_named(image, tmp_path):
    file = tmp_path / "Containerfile"
    file.write_text(f"FROM {BASE}\nRUN rm /usr/bin/apt-get\n")
    podman("build", "--tag", "localhost/no-apt", "--file", str(file), str(tmp_path))
    bare = call_make("image", **{**BUILD, "BASE_IMAGE": "localhost/no-apt", "TAG": "x"})
    assert "BASE_IMAGE has no apt-get; give one of Debian or Ubuntu" in bare.stdout + bare.stderr
    assert bare.returncode
    there = call_make("pretrain", RUNTIME="podman", IMAGE="no-such-image", RUN="none")
    assert_refused(there, "no-such-image", "make image")
    other = call_make("pretrain", RUNTIME="podman", IMAGE=BASE, RUN="none")
    assert_refused(other, "was not built by make image")
