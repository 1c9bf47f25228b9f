"""Where text comes from: the documentation inside this Python, or the user's own .txt and .jsonl.

Every source yields the same three kinds of material (Corpus); splits.py derives what one lacks.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pydoc_data.topics
import re
import sys
import sysconfig
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from scripts.run.errors import InputError

FORMS = (
    '{"text": "…"}, {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", '
    '"content": "…"}]}, {"instruction": "…", "output": "…"} or '
    '{"prompt": "…", "chosen": "…", "rejected": "…"}'
)


PYTHON = "python"  # DATA's word for the documentation inside this Python


@dataclass
class Corpus:
    """Hold the material of one source. A conversation is a list of {"role", "content"} that ends
    with the assistant; a preference is {"chosen": conversation, "rejected": conversation}."""

    name: str
    documents: list[str] = field(default_factory=list)
    conversations: list[list[dict]] = field(default_factory=list)
    preferences: list[dict] = field(default_factory=list)


def conversation(question: str, answer: str) -> list[dict]:
    """Make a conversation of one user turn and one assistant turn."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read_corpus(path: Path | None) -> Corpus:
    """Read the user's file or folder, or this Python's documentation if `path` is None."""
    return python_documentation() if path is None else user_files(path)


# --- the documentation inside this Python


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
            if inspect.isclass(value):
                for member, method in sorted(vars(value).items()):
                    text = getattr(method, "__doc__", None)
                    if not member.startswith("_") and isinstance(text, str) and callable(method):
                        yield f"{owner}.{name}.{member}", text
            text = getattr(value, "__doc__", None)
            if callable(value) and isinstance(text, str) and text.strip():
                yield f"{owner}.{name}", text


# --- the user's own files


def user_files(path: Path) -> Corpus:
    """Read one .txt or .jsonl file, or every such file of a folder.

    Raises InputError naming file and line of every bad line (the first 20).
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
    if not path.exists():
        raise InputError(f"DATA={path}: no such file or folder")
    if not files or files[0].suffix not in (".txt", ".jsonl"):
        raise InputError(f"DATA={path}: give a .txt or .jsonl file, or a folder of them")
    corpus, problems = Corpus(name=path.name), []
    for file in files:
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            where = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
            mend = f"convert it: iconv -f latin1 -t utf-8 '{file.name}'"
            problems.append(f"{file}: line {line}: not UTF-8 ({where}); {mend}")
            continue
        if not text.strip():
            problems.append(f"{file}: empty; give it text or leave it out of DATA")
        elif file.suffix == ".txt":
            corpus.documents += _blocks(text)
        else:
            problems += _read_jsonl(file, text, corpus)
    if problems:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise InputError(problems[:20] + more)
    return corpus


def _blocks(text: str, size: int = 2000) -> list[str]:
    """Cut a long text into documents of about `size` characters: between paragraphs, or between
    lines where a paragraph is much longer."""
    parts = re.split(r"\n\s*\n", text)
    if max(map(len, parts)) > 4 * size:  # a log: no blank lines
        parts = text.splitlines()
    documents, block, length = [], [], 0
    joint = "\n\n" if len(parts) > 1 and "\n" in "".join(parts[:50]) else "\n"
    for part in parts:
        if not part.strip():
            continue
        block.append(part.strip("\n"))
        length += len(part)
        if length >= size:
            documents.append(joint.join(block))
            block, length = [], 0
    return documents + ([joint.join(block)] if block else [])


def _read_jsonl(file: Path, text: str, corpus: Corpus) -> list[str]:
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"not JSON ({error.msg} at column {error.colno})"
            problems.append(f"{file}: line {number}: {what}")
            continue
        problem = _add_row(row, corpus)
        if problem:
            problems.append(f"{file}: line {number}: {problem}")
    return problems


def _add_row(row: object, corpus: Corpus) -> str:
    """Add one .jsonl row to the corpus; return what is wrong with it, or ""."""
    if not isinstance(row, dict):
        return f"not a JSON object; one of {FORMS}"
    if "chosen" in row and "rejected" in row:
        prompt = row.get("prompt")
        sides = {side: _as_conversation(row[side], prompt) for side in ("chosen", "rejected")}
        if isinstance(sides["chosen"], str) or isinstance(sides["rejected"], str):
            return next(value for value in sides.values() if isinstance(value, str))
        if sides["chosen"][:-1] != sides["rejected"][:-1]:
            return "chosen and rejected must share every turn but the last"
        corpus.preferences.append(sides)
    elif "messages" in row or "instruction" in row:
        turns = row.get("messages")
        if turns is None:
            parts = [str(row[key]) for key in ("instruction", "input") if row.get(key)]
            turns = conversation("\n\n".join(parts), row.get("output", ""))
        checked = _as_conversation(turns, None)
        if isinstance(checked, str):
            return checked
        corpus.conversations.append(checked)
    elif isinstance(row.get("text"), str):
        if not row["text"].strip():
            return '"text" is empty'
        corpus.documents.append(row["text"])
    else:
        return f"keys {sorted(row)}; one of {FORMS}"
    return ""


def _as_conversation(turns: object, prompt: object) -> list[dict] | str:
    """Return the checked conversation, or a sentence about what is wrong with it."""
    if isinstance(turns, str):
        if not isinstance(prompt, str):
            return 'chosen and rejected as text need a "prompt"'
        turns = conversation(prompt, turns)
    if not isinstance(turns, list) or len(turns) < 2:
        return "a conversation needs at least a user and an assistant turn"
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            return 'each turn needs a "role" of system, user or assistant'
        if not isinstance(turn.get("content"), str) or not turn["content"].strip():
            return 'each turn needs a non-empty text as "content"'
    if turns[-1]["role"] != "assistant":
        return "the last turn must be the assistant's"
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
