"""Supervised finetuning (full or LoRA, as the config says) with torchtune: FROM + sft.jsonl → model/.

python -m scripts.finetune runs/<run>/finetune
"""

from scripts.job.stage import run
from scripts.tools import torchtune

if __name__ == "__main__":
    run(torchtune.main, lambda stage: torchtune.train(stage, "sft.jsonl"))
