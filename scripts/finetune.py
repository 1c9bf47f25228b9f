"""Supervised finetuning (full or LoRA, as the config says) with torchtune: FROM + sft.jsonl → model/.

python -m scripts.finetune runs/<run>/finetune
"""

from scripts import tune
from scripts.stage import run

if __name__ == "__main__":
    run(tune.main, lambda stage: tune.train(stage, "sft.jsonl"))
