"""The logits of one model directory in each tool: shape (tokens, vocabulary), float32, for a list
of token ids."""

from pathlib import Path

import torch

from scripts.run.modeldir import weight_files
from scripts.tools import patches


def transformers_logits(directory: Path, ids: list[int]) -> torch.Tensor:
    """Compute them in transformers, which lm-eval calls; Gemma 2 as it is defined, with caps."""
    from transformers import AutoConfig, AutoModelForCausalLM

    capped = getattr(AutoConfig.from_pretrained(directory), "attn_logit_softcapping", None)
    options = {"attn_implementation": "eager"} if capped else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def torchtitan_logits(directory: Path, ids: list[int], name: str = "decoder") -> torch.Tensor:
    """Compute them in torchtitan: by transformers' model, or by torchtitan's own of that name."""
    patches.torchtitan_on_cpu()
    from safetensors.torch import load_file

    from scripts.tools.torchtitan_model import train_spec

    spec = train_spec(name, "x", directory)
    arguments = spec.model_args["x"]
    with torch.device("meta"):
        model = spec.model_cls(arguments)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(torch.device("cpu"))
    weights = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
    adapter = spec.state_dict_adapter(arguments, None)
    if name == "qwen3" and arguments.enable_weight_tying:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    missing = model.load_state_dict(adapter.from_hf(weights), strict=False).missing_keys
    assert not [key for key in missing if key.endswith("weight")], missing
    with torch.no_grad():
        return model.eval()(torch.tensor([ids]))[0].float()


def torchtune_logits(directory: Path, ids: list[int]) -> torch.Tensor:
    """Compute them in torchtune."""
    from torchtune.training import MODEL_KEY

    from scripts.components import Checkpointer, decoder

    checkpointer = Checkpointer(
        checkpoint_dir=str(directory),
        checkpoint_files=weight_files(directory),
        output_dir=str(directory.parent / "tune"),
    )
    model = decoder(str(directory)).eval()
    model.load_state_dict(checkpointer.load_checkpoint()[MODEL_KEY])
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].float()


def differences(directory: Path, ids: list[int], names: tuple[str, ...] = ()) -> dict[str, float]:
    """Return the largest difference of each tool's logits from transformers'; `names` are models of
    torchtitan's own to try, too."""
    reference = transformers_logits(directory, ids)
    found = {"torchtune": torchtune_logits(directory, ids)}
    for name in ("decoder", *names):
        found[f"torchtitan {name}"] = torchtitan_logits(directory, ids, name)
    return {tool: (logits - reference).abs().max().item() for tool, logits in found.items()}


def assert_same_logits(directory: Path, ids: list[int], bound: float = 1e-4) -> dict[str, float]:
    """Check that all tools agree on every logit; returns the largest differences."""
    found = differences(directory, ids)
    assert max(found.values()) <= bound, (
        f"logits differ from transformers' by more than {bound}: {found}"
    )
    return found
