"""The log-probabilities of small models in vLLM, beside transformers'; a process of its own, since
an engine that fails leaves its process spoilt.

    .venv/bin/python -m tests.support.vllm_logits FOLDER…      prints {folder: largest difference}
"""

import json
import os
import sys
from pathlib import Path

from scripts.tools import patches
from scripts.tools.vllm import environment

IDS = [(7 * i * i + 3) % 500 + 5 for i in range(96)]  # more than the families' windows


def difference(directory: Path) -> float:
    """Return how far vLLM's log-probability of any token is from transformers', in nats."""
    import torch
    from vllm import LLM, SamplingParams

    from tests.support.logits import transformers_logits

    theirs = torch.log_softmax(transformers_logits(directory, IDS).double(), -1)
    engine = LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=1,
        enforce_eager=True,
        distributed_executor_backend="uni",
    )
    how = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = engine.generate([{"prompt_token_ids": IDS}], how, use_tqdm=False)[0].prompt_logprobs
    ours = [one[token].logprob for one, token in zip(found[1:], IDS[1:])]
    return max(abs(value - theirs[i, IDS[i + 1]].item()) for i, value in enumerate(ours))


if __name__ == "__main__":
    os.environ.update(environment())
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    patches.vllm_engine_by_fork()
    print(json.dumps({name: difference(Path(name)) for name in sys.argv[1:]}))
