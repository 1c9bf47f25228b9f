"""The logits of one model directory in each tool: shape (tokens, vocabulary), float32, for a list
of token ids."""

from pathlib import Path

import torch

from scripts.tools import patches


def transformers_logits(directory: Path, ids: list[int]) -> torch.Tensor:
    """Compute them in transformers, which lm-eval calls."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def torchtitan_logits(directory: Path, ids: list[int]) -> torch.Tensor:
    """Compute them in torchtitan."""
    patches.torchtitan_on_cpu()
    from safetensors.torch import load_file
    from torchtitan.models.llama3.model.model import Transformer
    from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

    from scripts.tools.architecture import torchtitan_model_args

    arguments = torchtitan_model_args(directory / "config.json")
    model = Transformer(arguments).eval()
    weights = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
    model.load_state_dict(Llama3StateDictAdapter(arguments, None).from_hf(weights), strict=False)
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].float()


def torchtune_logits(directory: Path, ids: list[int]) -> torch.Tensor:
    """Compute them in torchtune."""
    from torchtune.training import MODEL_KEY, FullModelHFCheckpointer

    from scripts.run.modeldir import weight_files
    from scripts.tools.architecture import torchtune_model

    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(directory),
        checkpoint_files=weight_files(directory),
        model_type="LLAMA3",
        output_dir=str(directory.parent / "tune"),
    )
    model = torchtune_model(str(directory)).eval()
    model.load_state_dict(checkpointer.load_checkpoint()[MODEL_KEY])
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].float()


def assert_same_logits(directory: Path, ids: list[int], bound: float = 1e-4) -> dict[str, float]:
    """Check that all three tools agree on every logit; returns the largest differences."""
    reference = transformers_logits(directory, ids)
    differences = {
        "torchtitan": (torchtitan_logits(directory, ids) - reference).abs().max().item(),
        "torchtune": (torchtune_logits(directory, ids) - reference).abs().max().item(),
    }
    assert max(differences.values()) <= bound, (
        f"logits differ from transformers' by more than {bound}: {differences}"
    )
    return differences
