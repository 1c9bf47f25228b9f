"""Align by preference optimisation, with torchtune, or by rewards, with TRL: FROM + preference/ or
sft/ → model/.

A cluster runs it: python -m scripts.align runs/<run>/align
"""

from scripts.job.main import run
from scripts.job.rank import Rank
from scripts.tools import torchtune, trl_grpo


def train(rank: Rank) -> None:
    """Do one rank's work with the tool whose config it is."""
    if trl_grpo.is_config(rank.config):
        trl_grpo.train(rank)
    else:
        torchtune.train(rank, "preference")


if __name__ == "__main__":
    run(torchtune.main, train)
