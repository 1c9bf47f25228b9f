"""Shared by all tests: a place for runs, the launcher as a command, and a small whole model directory."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.run import layout, modeldir

ROOT = layout.ROOT
os.environ.pop("PYTHONUNBUFFERED", None)  # as in a user's shell: a stage must not depend on it


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """An empty folder of runs, with a space in its path."""
    folder = tmp_path / "my runs"
    monkeypatch.setenv("RUNS", str(folder))
    return folder


def launch(verb: str, **options: str) -> subprocess.CompletedProcess:
    """The launcher as make calls it, on an environment of nothing but `options`."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "RUNS", "OMP_NUM_THREADS", "SLURM_CONF") if name in os.environ}
    command = [sys.executable, "-m", "scripts.launch", verb]
    return subprocess.run(command, cwd=ROOT, env={**keep, **options}, capture_output=True, text=True)


def refused(verb: str, *words: str, **options: str) -> str:
    """Launch and expect exit 64 with every one of `words` in what it says; returns the message."""
    result = launch(verb, **options)
    assert result.returncode == 64, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr, f"{word!r} not in {result.stderr!r}"
    return result.stderr


def write_safetensors(path: Path, names: list[str]) -> None:
    """A safetensors file of one float32 zero per name."""
    header = {n: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4 * len(names)))


@pytest.fixture
def model(tmp_path) -> Path:
    """A directory that passes every check of its form, with next to nothing inside."""
    directory = tmp_path / "model"
    directory.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4, "num_hidden_layers": 2}
    files = {
        "config.json": config,
        "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<|end_of_turn|>"}]},
        "tokenizer_config.json": {"eos_token": "b", "bos_token": "a", "chat_template": "{{ messages }}"},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    layers = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    write_safetensors(directory / "model.safetensors", layers)
    assert modeldir.problems(directory) == []
    return directory


# --- the line itself ---


def lacking(what: str):
    """Skip a lane that this machine cannot run; in CI, where lanes are required, fail."""
    (pytest.fail if os.environ.get("LANES") == "required" else pytest.skip)(what)


def make(*targets: str, timeout: int = 1200, **options: str) -> subprocess.CompletedProcess:
    """make as a user calls it; fails the test with its whole output where it fails."""
    words = ["make", "-s", *targets, *(f"{k}={v}" for k, v in options.items())]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{words}\n{result.stdout[-4000:]}\n{result.stderr[-6000:]}"
    return result


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """All runs of this file, under a path with a space."""
    path = tmp_path_factory.mktemp("the line") / "my runs"
    os.environ["RUNS"] = str(path)
    return path
