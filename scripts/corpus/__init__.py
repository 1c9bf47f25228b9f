"""The corpus: what is read, recognised, held out and written as sets (sets.py is its order).

scripts.data imports this room; of scripts.tools chat.py and tokens.py may be imported, and of
scripts.launcher preview.py and shapes.py, which need the standard library alone. The room imports
scripts.run, and beside the standard library numpy, pyarrow, tokenizers, jinja2 and yaml; for the
hub alone datasets.
"""
