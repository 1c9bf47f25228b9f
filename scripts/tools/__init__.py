"""Upstream: the only room that imports torchtitan, torchtune, TRL, lm-eval, vLLM, llm-compressor.

It imports them inside functions, since each costs seconds. Stage scripts and scripts.components
import this room; scripts.download and scripts.upload its hub, the one module with huggingface_hub.
It imports scripts.job and scripts.run.
"""
