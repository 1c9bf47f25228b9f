"""Finetune on conversations with torchtune, full or LoRA: FROM + sft/ → model/.

A cluster runs it: python -m scripts.finetune runs/<run>/finetune
"""

from scripts.job.main import run
from scripts.tools import torchtune

if __name__ == "__main__":
    run(torchtune.main, lambda rank: torchtune.train(rank, "sft"))
