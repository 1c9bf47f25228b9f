"""Direct preference optimisation with torchtune: FROM + preference.jsonl → model/.

python -m scripts.align runs/<run>/align
"""

from scripts.job.stage import run
from scripts.tools import torchtune

if __name__ == "__main__":
    run(torchtune.main, lambda stage: torchtune.train(stage, "preference.jsonl"))
