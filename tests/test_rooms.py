"""The rooms of scripts/: arrows run down only, nothing installed is needed before the job, and
stages and the environment have one home each."""

import ast
import re
import sys
from pathlib import Path

import pytest

from scripts.run import stages

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "scripts").rglob("*.py"))
}
ROOMS = {  # what each may import, beside itself
    "run": set(),
    "clusters": {"run"},
    "launcher": {"clusters", "corpus", "run"},
    "launch": {"launcher", "clusters", "run"},
    "job": {"run"},
    "tools": {"corpus", "job", "run"},
    "corpus": {"run"},
    "stage script": {"corpus", "tools", "job", "run"},
    "components": {"tools"},
    "volume": {"run"},
    "conductor": {"run"},
    "rollout": {"conductor", "job", "run"},
    "serve": {"tools", "job", "run"},
    "download": {"tools", "run"},
    "upload": {"launcher", "tools", "run"},
    "generate": {"launcher", "tools", "run"},
    "demo": {"run"},
}
LAUNCHER_SIDE = ("run", "clusters", "launcher", "launch", "volume", "conductor")
UPSTREAM = {"torchtitan", "torchtune", "trl", "lm_eval", "vllm", "llmcompressor"}


def room(module):
    """Name the room of a module: its folder, or what a file at the top of scripts/ is."""
    name = module.split(".")[1] if "." in module else ""
    return "stage script" if name in {row.module for row in stages.TABLE} else name


def imports(module):
    """List (imported module, whether inside a function) of a file, names of modules resolved."""
    tree = ast.parse(FILES[module].read_text())
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in whole]
        else:
            continue
        yield from ((name, id(node) in inside) for name in names)


def strings(module):
    """List the strings of a file that are no docstrings."""
    tree = ast.parse(FILES[module].read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in documentation:
            yield from [node.value] if isinstance(node.value, str) else []


@pytest.mark.parametrize("module", FILES)
def test_arrows_run_down(module):
    if module == "scripts":
        return
    own = room(module)
    assert own in ROOMS, f"{module} stands in no room that the design names"
    for name, _ in imports(module):
        if name.startswith("scripts."):
            other = room(name)
            assert other in {*ROOMS[own], own} - {"stage script"}, f"{module} imports {name}"


def test_no_circle_between_files():
    edges = {m: {n for n, _ in imports(m) if n in FILES and n != m} for m in FILES}
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' → '.join([*path, module])}"
        if module not in done:
            path.append(module)
            for other in sorted(edges[module]):
                visit(other)
            path.pop()
            done.add(module)

    for module in FILES:
        visit(module)


@pytest.mark.parametrize("module", FILES)
def test_imports_stand_at_the_top(module):
    """Upstream imports cost seconds each, so tools/ has them where they are needed. An import
    inside a function anywhere else hides a circle. datatrove is an extra, and may be missing."""
    if room(module) not in ("tools", "components") and module != "scripts.corpus.filters":
        hidden = [name for name, inside in imports(module) if inside]
        assert hidden == [], f"{module} imports {hidden} inside a function"


@pytest.mark.parametrize("module", FILES)
def test_who_may_import_what_is_installed(module):
    foreign = {name.split(".")[0] for name, _ in imports(module)}
    foreign -= {*sys.stdlib_module_names, "scripts"}
    if room(module) in (*LAUNCHER_SIDE, "job", "stage script"):
        assert foreign == set(), f"{module} imports {foreign}, which may not be installed there"
    if room(module) != "tools":
        assert not foreign & UPSTREAM, f"{module}: only tools/ imports {foreign & UPSTREAM}"


def test_the_launcher_reaches_nothing_that_is_installed():
    """Of corpus it may import what looks at first rows; nothing below may need a library."""
    seen, left = set(), {m for m in FILES if room(m) in LAUNCHER_SIDE}
    while left:
        module = left.pop()
        seen.add(module)
        names = {name for name, _ in imports(module)}
        foreign = {n.split(".")[0] for n in names} - {*sys.stdlib_module_names, "scripts"}
        assert not foreign, f"{module} needs {foreign}, and the launcher imports it"
        left |= {name for name in names if name in FILES} - seen


@pytest.mark.parametrize("folder", ["run", "clusters", "launcher", "job", "tools", "corpus"])
def test_every_room_says_who_may_import_it(folder):
    text = ast.get_docstring(ast.parse((ROOT / f"scripts/{folder}/__init__.py").read_text())) or ""
    assert "import" in text, f"scripts/{folder}/__init__.py does not say who may import the room"


@pytest.mark.parametrize("module", [m for m in FILES if room(m) in ("launcher", "clusters")])
def test_no_stage_is_named(module):
    """The stage table is asked instead, so that a new stage touches no module here."""
    distinct = "|".join(name for name in stages.names() if name != "data")  # a word of English
    for text in strings(module):
        assert text not in stages.names(), f"{module} names the stage {text!r}"
        assert not re.search(rf"\b({distinct})\b", text), f"{module} names a stage in {text!r}"


@pytest.mark.parametrize("module", [m for m in FILES if room(m) in ("run", "clusters", "launcher")])
def test_the_users_environment_is_read_in_one_place(module):
    """launch.py hands it to launcher/options.py, which parses it, once."""
    text = FILES[module].read_text()
    assert not re.search(r"environ\b(?!ment)|getenv", text.replace("/environ", "")), module
