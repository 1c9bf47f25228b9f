"""Upstream: the only room that imports torchtitan, torchtune, lm-eval and vLLM, inside functions, since each import costs seconds.

Stage scripts and scripts.components import it. It imports scripts.job and scripts.run.
"""
