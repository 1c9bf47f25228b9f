"""Slurm without a Slurm: what would be submitted and started, and every mistake that needs no
cluster to be seen."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from scripts.clusters import slurm_site
from scripts.clusters.interface import Job
from scripts.clusters.slurm_queue import in_queue
from scripts.run import stages
from tests.support.goldens import dry_run
from tests.support.launching import assert_refused, launch
from tests.support.runs import ROOT

APPTAINER = ': "${RELAY_RUNTIME:=apptainer}" "${RELAY_IMAGE:=relay.sif}"\n'


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a login node needs, to edit."""
    folder = tmp_path / "checkout"
    for name in ("scripts", "slurm", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    return folder


def launch_in(checkout, verb="data", path="/usr/bin:/bin", **options):
    """Call the launcher of a checkout with CLUSTER=slurm on an environment of nothing but
    `options`."""
    given = {"PATH": path, "RUNS": str(checkout.parent / "runs")}
    given |= {"CLUSTER": "slurm", "RUN": "x", "MODEL": "debug"}
    return launch(verb, checkout=checkout, environment=given, **options)


def srun(checkout, **env):
    """The line that slurm/run.sh of a checkout starts on each node."""
    env = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **env}
    words = ["bash", "slurm/run.sh", "runs/x/pretrain"]
    result = subprocess.run(
        words, cwd=checkout, env=env, capture_output=True, text=True, check=True
    )
    return (
        result.stdout.strip()
        .replace(str(checkout), "/repo")
        .replace(str(checkout.resolve()), "/repo")
    )


# --- parity ---


@pytest.mark.parametrize("stage", stages.names())
def test_local_and_slurm_run_the_same(stage, model):
    """One command in the job and the same facts; where a service listens is the cluster's
    matter."""
    outputs, module, run = {}, stages.row(stage).module, "x-int8"  # so quantize calls it, too
    for cluster in ("local", "slurm"):  # k8s: tests/test_kubernetes_text.py
        said = dry_run(
            stage,
            {
                "RUN": run,
                "FROM": str(model),
                "DATA": "",
                "FORCE": "1",
                "GPUS": "2" if stages.row(stage).ranks else "1",
                "CLUSTER": cluster,
                "BIND": "127.0.0.1",
            },
        )
        block = said[said.index(f"mkdir -p runs/{run}/{stage}/logs") :]
        files = block[: block.rindex("EOF\n")]
        assert f"cat > runs/{run}/{stage}/stage.env" in files, f"no stage.env is written:\n{files}"
        outputs[cluster] = (
            files,
            re.search(rf"\S*/python -m scripts\.{module} runs/{run}/{stage}", block)[0],
        )
    assert outputs["slurm"] == outputs["local"]


# --- the launch prefix, word by word ---


def test_without_a_container(checkout):
    assert (
        srun(checkout) == "srun --wait=60 --kill-on-bad-exit=0 "
        ".venv/bin/python -m scripts.pretrain runs/x/pretrain"
    )


def test_pyxis(checkout):
    line = srun(
        checkout,
        RELAY_RUNTIME="pyxis",
        RELAY_IMAGE="/shared/relay.sqsh",
        RELAY_MOUNTS="/data:/data",
        NCCL_DEBUG="INFO",
        NCCL_NET="AWS Libfabric",
    )
    assert line == (
        "srun --wait=60 --kill-on-bad-exit=0 "
        "--container-image=/shared/relay.sqsh --container-writable "
        "--container-mounts=/repo:/repo\\,/repo/runs:/repo/runs\\,/data:/data "
        "--container-workdir=/repo "
        "--container-env=NCCL_DEBUG\\,NCCL_NET\\,PET_NNODES\\,PET_NPROC_PER_NODE\\,"
        "PET_RDZV_BACKEND\\,PET_RDZV_ENDPOINT\\,PET_RDZV_ID\\,"
        "RELAY_ADDRESS\\,RELAY_IMAGE\\,RELAY_JOB\\,RELAY_MOUNTS\\,RELAY_RUNTIME\\,RELAY_SRUN_FLAGS "
        "python3 -m scripts.pretrain runs/x/pretrain"
    )


def test_apptainer_and_hyperpod(checkout):
    line = srun(
        checkout,
        RELAY_RUNTIME="apptainer",
        RELAY_IMAGE="relay.sif",
        RELAY_SRUN_FLAGS="--auto-resume=1 --mpi=pmix",
    )
    assert line == (
        "srun --wait=60 --kill-on-bad-exit=0 --auto-resume=1 --mpi=pmix "
        "apptainer exec --nv --bind /repo:/repo\\,/repo/runs:/repo/runs --pwd /repo relay.sif "
        "python3 -m scripts.pretrain runs/x/pretrain"
    )
    told = 'trap "env >&2" EXIT; . slurm/run.sh runs/x/pretrain'
    env = {
        "PATH": os.environ["PATH"],
        "DRY_RUN": "1",
        "RELAY_RUNTIME": "apptainer",
        "NCCL_NET": "AWS Libfabric",
        "HOME": "/h",
    }
    result = subprocess.run(
        ["bash", "-c", told], cwd=checkout, env=env, capture_output=True, text=True, check=True
    )
    over = {line for line in result.stderr.splitlines() if line.startswith("APPTAINERENV_")}
    assert {"APPTAINERENV_NCCL_NET=AWS Libfabric", "APPTAINERENV_PET_NNODES=1"} <= over, (
        "else the image's own would win"
    )
    assert "APPTAINERENV_HOME=/h" not in over, "the user's home must not be handed over"


def test_an_admin_adapts_one_file(checkout):
    """Other partition, account, mounts, interface and runtime: through site.env alone; what a user
    exports wins over it."""
    site = checkout / "slurm/site.env"
    lines = {
        "SBATCH_PARTITION": "h100",
        "SBATCH_ACCOUNT": "team",
        "NCCL_SOCKET_IFNAME": "en",
        "RELAY_RUNTIME": "apptainer",
    }
    lines |= {"RELAY_IMAGE": "/img/relay.sif", "RELAY_MOUNTS": "/scratch:/scratch"}
    text = site.read_text()
    for name, value in lines.items():
        text, count = re.subn(
            rf'^(# )?: "\$\{{{name}:=.*?\}}"', f': "${{{name}:={value}}}"', text, flags=re.M
        )
        assert count >= 1, name
    site.write_text(text + "echo a banner of this site\n")
    own = {"SBATCH_ACCOUNT": "mine", "HF_TOKEN": "hf_abc"}
    shown = launch_in(checkout, "pretrain", DRY_RUN="1", **own).stdout
    assert (
        "# with NCCL_SOCKET_IFNAME=en RELAY_IMAGE=/img/relay.sif RELAY_MOUNTS=/scratch:/scratch "
        "RELAY_RUNTIME=apptainer " in shown
    )
    assert "SBATCH_ACCOUNT=mine SBATCH_PARTITION=h100\n" in shown
    assert "hf_abc" not in shown, "a secret must not be shown"
    assert srun(checkout).startswith("srun "), (
        "what site.env prints is no part of a line to paste or of a job's id"
    )
    for word in ("/scratch:/scratch", "relay.sif"):
        assert word in srun(checkout), f"site.env's {word} does not reach the job"
    shown = subprocess.run(
        ["bash", "-c", "set -a; . slurm/site.env; env"],
        cwd=checkout,
        env={"SBATCH_ACCOUNT": "mine"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {"SBATCH_PARTITION=h100", "SBATCH_ACCOUNT=mine", "NCCL_SOCKET_IFNAME=en"} <= set(
        shown.splitlines()
    )


# --- mistakes ---


@pytest.mark.parametrize(
    ("dry", "line", "words"),
    [
        (True, None, ["slurm/site.env", "No such file", "git checkout"]),
        (True, "SBATCH_PARTITION=(", ["slurm/site.env: line 1", "unexpected EOF"]),
        (True, ": ${NO_SUCH?}", ["slurm/site.env", "NO_SUCH"]),
        (
            True,
            ': "${RELAY_RUNTIME:=docker}"',
            ["RELAY_RUNTIME=docker", "known: none, pyxis, apptainer, oci"],
        ),
        (True, ': "${RELAY_RUNTIME:=pyxis}"', ["needs RELAY_IMAGE"]),
        (
            False,
            ': "${RELAY_RUNTIME:=pyxis}" "${RELAY_IMAGE:=/no/relay.sqsh}"',
            ["RELAY_IMAGE=/no/relay.sqsh", "no such file"],
        ),
        (False, "HF_TOKEN_PATH={secret}", ["HF_TOKEN_PATH=", "readable by others", "chmod 600"]),
        (True, "SBATCH_TIMELIMIT=2", ["--time=2 ", "120 s", "SBATCH_TIMELIMIT", "SBATCH_SIGNAL"]),
        (True, "SBATCH_TIMELIMIT=soon", ["--time=soon", "man sbatch"]),
        (False, "", ["sbatch: not on PATH", "login node"]),
    ],
)
def test_a_mistake_is_named_before_submission(checkout, tmp_path, dry, line, words):
    """By a dry run, too, where the cluster need not be there to see it."""
    secret = tmp_path / "token"
    secret.write_text("hf_abc")
    secret.chmod(0o644)
    site = checkout / "slurm/site.env"
    if line is None:
        site.unlink()
    else:
        site.write_text(line.replace("{secret}", str(secret)) + "\n" + site.read_text())
    tools = tmp_path / "tools"  # a PATH without Slurm
    tools.mkdir()
    for name in ("bash", "env"):
        (tools / name).symlink_to(shutil.which(name))
    result = launch_in(checkout, path=str(tools))
    assert_refused(result, *words)
    shown = launch_in(checkout, path=str(tools), DRY_RUN="1")
    wanted = (64, result.stderr) if dry else (0, "")
    assert (shown.returncode, shown.stderr) == wanted, (
        "a dry run must see what needs no cluster, and no more"
    )
    assert "hf_abc" not in result.stderr, "a secret must not be shown"
    assert not (checkout.parent / "runs").exists(), "a refusal must leave nothing"


def test_secrets_stay_out_of_the_submission(checkout, model):
    given = {"FROM": str(model), "FORCE": "1", "HF_TOKEN": "hf_abc"}
    said = launch_in(checkout, "deploy", DRY_RUN="1", **given).stdout
    assert "hf_abc" not in said, "a secret must not be shown"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("02:00:00", 7200),
        ("1-0", 86400),
        ("1-12:30", 131400),
        ("2-00:00:00", 172800),
        ("UNLIMITED", float("inf")),
        ("0", float("inf")),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit, seconds):
    assert slurm_site.limit_seconds(limit) == seconds


@pytest.mark.parametrize(
    "limit", ["", "-5", "x-1", "1:2:3:4", "1-1:2:3:4", "1:", "+5", "1.5", "1-"]
)
def test_what_sbatch_would_not_take_is_no_time_limit(limit):
    with pytest.raises(ValueError, match=r"^$|\d"):
        slurm_site.limit_seconds(limit)


@pytest.mark.parametrize(
    ("reason", "after", "words"),
    [
        ("Resources", "", "job 7 waits for 4 nodes"),
        ("Dependency", "pretrain", "job 7 waits for pretrain"),
        ("Resources", "pretrain", "job 7 waits for pretrain"),
        ("DependencyNeverSatisfied", "pretrain", "job 7 never starts: a stage before it failed"),
        ("BeginTime", "", "job 7 starts again at 2026-01-01 10:00:00"),
        ("QOSMaxJobsPerUserLimit", "", "job 7 waits: QOSMaxJobsPerUserLimit"),
        (
            "launch failed requeued held",
            "",
            "job 7 held: its node could not start it; scontrol release 7",
        ),
    ],
)
def test_a_queue_is_said_in_words(reason, after, words):
    row = {
        "id": "7",
        "state": "PENDING",
        "reason": reason,
        "nodes": "4",
        "start": "2026-01-01T10:00:00",
        "after": after,
        "where": "",
    }
    assert in_queue("7", row) == Job("slurm", "7", "queued", words)


# --- the files that admins read ---


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text, []),
        (
            lambda text: text.replace("#SBATCH --requeue", "# SBATCH --requeue"),
            ["is a comment", "no #SBATCH --requeue"],
        ),
        (lambda text: text + "#SBATCH --mem=1G\n", ["after the first command"]),
        (lambda text: text.replace("#SBATCH --time=", "#SBATCH --tim"), ["no #SBATCH --time"]),
        (lambda text: text + "if true; then\n", ["syntax error"]),
        (lambda text: text + "true\n" * 9, ["more than 15 lines"]),
    ],
)
def test_lint_sees_what_sbatch_passes_over(checkout, edit, words):
    file = checkout / "slurm/align.sbatch"
    file.write_text(edit(file.read_text()))
    env = {**os.environ, "SLURM_CONF": "/dev/null"}  # no cluster
    result = subprocess.run(
        ["bash", "slurm/lint.sh"], cwd=checkout, env=env, capture_output=True, text=True
    )
    verdict = "must" if words else "must not"
    assert (result.returncode != 0) == bool(words), f"lint {verdict} refuse this:\n{result.stderr}"
    for word in words:
        assert word in result.stderr, f"lint does not say {word!r}:\n{result.stderr}"


def test_the_tree_is_as_thin_as_it_says():
    assert len((ROOT / "slurm/run.sh").read_text().splitlines()) <= 72
    assert {p.stem for p in (ROOT / "slurm").glob("*.sbatch")} == set(stages.names())
    for stage in stages.names():
        assert len((ROOT / f"slurm/{stage}.sbatch").read_text().splitlines()) <= 15
        assert ("gpus" in "".join(slurm_site.header(stage))) == (
            stage in ("quantize", "evaluate", "deploy")
        )  # trained stages: GPUS=
    edits = [line for line in (ROOT / "slurm/run.sh").read_text().splitlines() if "EDIT" in line]
    assert edits == [], "what a site changes is in site.env"
