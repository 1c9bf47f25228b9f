"""Where what we run and pass on comes from: workflows that nobody can change from outside, and
licences that are known."""

import re
import subprocess
import sys

import pytest
import yaml

from requirements import licences
from tests.support.runs import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CPU = licences.pins(ROOT / "requirements/cpu.lock")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_actions_are_pinned_by_commit(path):
    """A tag can be moved to other code, which then runs with the workflow's rights."""
    used = re.findall(r"^[ -]*uses: *(.*)", path.read_text(), re.M)
    assert used, "no action found: does the pattern still fit?"
    loose = [u for u in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", u)]
    assert loose == [], "write owner/name@<40 digits> # v<version>"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_have_few_rights(path):
    flow = yaml.safe_load(path.read_text())
    assert "permissions" in flow, "without it a workflow gets what the repository's settings say"
    rights = [flow["permissions"], *(job.get("permissions", {}) for job in flow["jobs"].values())]
    assert all(isinstance(right, dict) for right in rights), "name each right; no write-all"
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    for step in steps:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False, "its token would stay in .git"


def test_every_locked_package_has_its_licence():
    rows = re.findall(r"^\| (\S+) \| (.+) \| (.+) \|$", licences.PAGE.read_text(), re.M)
    told = {name: (versions.split(" | "), licence) for name, versions, licence in rows[2:]}
    locks = [lock for lock in licences.LOCKS if lock.exists()]
    for column, lock in enumerate(locks):
        for name, versions in licences.pins(lock).items():
            said = told.get(name, ([""] * len(locks), ""))[0][column]
            assert said == ", ".join(versions), f"{lock.name}: {name}: run make sbom"
    assert [name for name, (_, licence) in told.items() if licence == "unknown"] == []
    assert set(told) == {name for lock in locks for name in licences.pins(lock)}


def test_copyleft_and_proprietary_packages_are_named():
    text = licences.PAGE.read_text().split("## All packages")[0]
    for name in ("certifi", "chardet", "pycountry", "tqdm", "nvidia-cudnn-cu13"):
        assert re.search(rf"^(- .*|  .*)\b{name}\b", text, re.M), f"{name} is not in a list"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("License-Expression: MIT OR Apache-2.0\nLicense: BSD", "MIT OR Apache-2.0"),
        ("License: Apache License, Version 2.0", "Apache-2.0"),
        ("License: MPL-2.0 AND MIT", "MPL-2.0 AND MIT"),
        ("Classifier: License :: OSI Approved :: MIT License", "MIT"),
        ("License: BSD", "unknown"),
        ("Summary: says nothing", "unknown"),
    ],
)
def test_a_licence_is_read_from_metadata(metadata, expected, tmp_path, monkeypatch):
    folder = tmp_path / "relay_example-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: relay-example\n{metadata}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert licences.licence("relay-example") == expected
    assert licences.licence("relay-missing") is None


@pytest.mark.slow
def test_sbom_lists_what_is_installed(tmp_path):
    sbom = tmp_path / "sbom.json"
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-file", str(sbom)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    listed = {c["name"]: c["version"] for c in yaml.safe_load(sbom.read_text())["components"]}
    assert listed["torch"] in CPU["torch"]
