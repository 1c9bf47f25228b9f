"""Align by direct preference optimisation with torchtune: FROM + preference/ → model/.

A cluster runs it: python -m scripts.align runs/<run>/align
"""

from scripts.job.main import run
from scripts.tools import torchtune

if __name__ == "__main__":
    run(torchtune.main, lambda rank: torchtune.train(rank, "preference"))
