"""The demo's text: the documentation inside this Python, which every machine has."""

from __future__ import annotations

import ast
import importlib
import inspect
import pydoc_data.topics
import re
import sys
import sysconfig
import warnings
from pathlib import Path

from scripts.corpus.derive import Corpus, conversation

PYTHON = "python"  # a recipe's word for the documentation inside this Python


def python_documentation() -> Corpus:
    """Read the docstrings of the standard library and its language reference (pydoc_data.topics).

    Pure Python modules are parsed, never imported; only C modules are imported, since their
    docstrings exist nowhere else. The text differs between Python versions: record sys.version
    beside any digest of it.
    """
    corpus = Corpus(name=f"documentation of Python {sys.version.split()[0]}")
    for name, text in sorted(set(_parsed_docstrings()) | set(_compiled_docstrings())):
        text = inspect.cleandoc(text)
        corpus.documents.append(f"{name}\n\n{text}")
        sentence = first_sentence(text)
        if sentence:
            corpus.conversations.append(conversation(f"What does {name} do?", sentence))
    topics = sorted(pydoc_data.topics.topics.items())
    corpus.documents += [f"{topic}\n\n{text.strip()}" for topic, text in topics]
    return corpus


def first_sentence(text: str) -> str:
    """Return a docstring's first sentence on one line; "" if it opens with code, with a list or
    with no whole sentence."""
    lines = text.strip().splitlines()
    signature = re.compile(r"^[\w.]+\(.*\)\s*(->.*)?$")  # a C function's, above its description
    while lines and (not lines[0].strip() or signature.match(lines[0].strip())):
        lines.pop(0)
    paragraph = " ".join("\n".join(lines).split("\n\n")[0].split())
    match = re.match(r"[A-Z][^\n]*?[a-z0-9)'\"`][.!?](?=\s|$)", paragraph)
    sentence = match.group(0) if match else ""
    usable = 4 <= len(sentence.split()) <= 30 and len(sentence) <= 200
    return sentence if usable else ""


def _parsed_docstrings():
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
    skipped |= {"__pycache__", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if skipped & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old sources
                tree = ast.parse(path.read_bytes())
        except SyntaxError:  # some distributions' libraries hold bad sources on purpose
            continue
        module = ".".join(p for p in parts if p != "__init__")
        yield from _walk(tree, module)


def _walk(node: ast.AST, name: str):
    text = ast.get_docstring(node)
    if text and text.strip():
        yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk(child, f"{name}.{child.name}")


def _compiled_docstrings():
    folder = Path(sysconfig.get_paths()["platstdlib"], "lib-dynload")
    dynamic = {p.name.split(".")[0] for p in folder.glob("*.so")}
    for module_name in sorted(set(sys.builtin_module_names) | dynamic):
        if "test" in module_name or module_name.startswith("_tkinter"):
            continue
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        owner = module_name.lstrip("_")
        for name, value in sorted(vars(module).items()):
            if name.startswith("_"):
                continue
            # torch.distributed replaces sys.excepthook: a rank would read another corpus.
            value = vars(module).get(f"__{name}__", value)
            if inspect.isclass(value):
                for member, method in sorted(vars(value).items()):
                    text = getattr(method, "__doc__", None)
                    if not member.startswith("_") and isinstance(text, str) and callable(method):
                        yield f"{owner}.{name}.{member}", text
            text = getattr(value, "__doc__", None)
            if callable(value) and isinstance(text, str) and text.strip():
                yield f"{owner}.{name}", text
