"""Data: sources, splits and the tokenizer of a model born here.

scripts.data imports it. It imports scripts.run.
"""
