"""Direct preference optimisation with torchtune: FROM + preference.jsonl → model/.

python -m scripts.align runs/<run>/align
"""

from scripts import tune
from scripts.stage import run

if __name__ == "__main__":
    run(tune.main, lambda stage: tune.train(stage, "preference.jsonl"))
