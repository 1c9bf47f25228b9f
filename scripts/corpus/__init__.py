"""The corpus: where text comes from, how it is split into sets, the tokenizer trained on it.

scripts.data imports this room, and scripts.tools.torchtune_tokenizer its template_from. It imports
scripts.run, the standard library, tokenizers and jinja2.
"""
