"""The documentation is held against the repository: links, commands, variables, paths, layout."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from scripts.clusters.catalog import CLUSTERS
from scripts.run import stages

ROOT = Path(__file__).resolve().parents[1]
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.splitlines()
FILES = sorted(name for name in set(LISTED) if (ROOT / name).is_file())
DOCS = [name for name in FILES if name.endswith(".md")]
FOLDERS = {name.split("/")[0] for name in FILES if "/" in name}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))
OPTIONS = set(re.findall(r"[A-Z_]{3,}", MAKEFILE.split("\nOPTIONS :=")[1].split("\n#")[0]))
OPTIONS |= {"PYTHON"}
THEIRS = re.compile("(SBATCH|SLURM|NCCL|OMP)_")  # variables of programs that are not ours


class Line(NamedTuple):
    """A line of a Markdown file, and the language of the code block that it stands in."""

    number: int
    text: str
    block: str  # "" outside code blocks


def lines(name):
    """List a file's lines without the fences of its code blocks, which must all be closed."""
    found, block = [], ""
    for number, text in enumerate((ROOT / name).read_text().splitlines(), 1):
        fence = re.match(r" *```(.*)", text)
        if not fence:
            found.append(Line(number, text, block))
        elif block:
            assert fence[1] == "", f"{name}:{number}: a code block begins inside another"
            block = ""
        else:
            assert fence[1], f"{name}:{number}: a code block without a language, as ```console"
            block = fence[1]
    assert block == "", f"{name}: its last code block is not closed"
    return found


def spans(line):
    """List what a line quotes as code: all of it in a code block, else what is in backticks."""
    return [line.text] if line.block else re.findall(r"`([^`]+)`", line.text)


def commands(code):
    """List (targets, variables) of each make command in a piece of code."""
    code = re.sub("\"[^\"]*\"|'[^']*'", "…", code)
    start = r"(?:^|[;&|(] *|^\$ +)(?:[A-Z_]+=\S* +)*make +(?=\S)"
    for found in re.finditer(start, code):
        words = re.split(r"[;&|)#>]", code[found.end() :])[0].split()
        targets, variables = [], []
        for word in words:
            variable = re.match(r"([A-Z_]+)=", word)
            if variable:
                variables.append(variable[1])
            elif re.fullmatch(r"[a-z][a-z-]*", word):
                targets.append(word)
            else:
                break  # a placeholder, or the end of the command
        yield targets, variables


def anchors(name):
    """List the anchors that GitHub gives a file's headings."""
    titles = [line.text for line in lines(name) if not line.block and line.text.startswith("#")]
    plain = (re.sub(r"[^\w\- ]", "", title.lstrip("#").strip().lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


@pytest.mark.parametrize("name", DOCS)
def test_links_and_images_resolve(name):
    for line in lines(name):
        if line.block:
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", line.text):
            if re.match("[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), f"{name}:{line.number}: {target} is not there"
            if anchor:
                there = anchors(str(file.resolve().relative_to(ROOT)))
                assert anchor in there, f"{name}:{line.number}: {target}: no such heading"


@pytest.mark.parametrize("name", DOCS)
def test_make_commands_exist(name):
    for line in lines(name):
        for targets, variables in (found for code in spans(line) for found in commands(code)):
            unknown = set(targets) - TARGETS
            assert not unknown, f"{name}:{line.number}: make has no target {unknown}"
            unknown = set(variables) - OPTIONS
            assert not unknown, f"{name}:{line.number}: make has no variable {unknown}"


@pytest.mark.parametrize("name", DOCS)
def test_variables_exist(name):
    code = "\n".join((ROOT / f).read_text() for f in FILES if is_code(f))
    for line in lines(name):
        for variable in (v for span in spans(line) for v in re.findall(r"\b([A-Z][A-Z_]+)=", span)):
            known = THEIRS.match(variable) or re.search(rf"\b{variable}\b", code)
            assert known, f"{name}:{line.number}: nothing reads {variable}"


def is_code(name):
    """Tell whether a file may read a variable that documentation names."""
    return name.endswith((".py", ".sh", ".sbatch", ".env", "Makefile")) or name == ".ci/run"


@pytest.mark.parametrize("name", [doc for doc in DOCS if doc != "CHANGELOG.md"])
def test_paths_and_modules_exist(name):
    start = "|".join(map(re.escape, sorted(FOLDERS)))
    for line in lines(name):
        for code in spans(line):
            for path in re.findall(rf"(?<![\w./-])((?:{start})/[\w./<>*-]*)", code):
                pattern = re.sub("<[^>]*>", "*", path.rstrip("."))
                assert any(ROOT.glob(pattern)), f"{name}:{line.number}: {path} is not there"
            for module in re.findall(r"-m ((?:scripts|tests|bench)\.[\w.<>]+)", code):
                pattern = re.sub("<[^>]*>", "*", module.replace(".", "/")) + ".py"
                assert any(ROOT.glob(pattern)), f"{name}:{line.number}: no module {module}"


@pytest.mark.parametrize("name", DOCS)
def test_lines_fit_and_code_is_fenced(name):
    before = ""
    for line in lines(name):
        free = line.text.startswith("|") or "://" in line.text
        limit = 110 if line.block == "text" else 100  # what a command has printed is not folded
        assert free or len(line.text) <= limit, f"{name}:{line.number}: {len(line.text)} columns"
        indented = not line.block and not before.strip() and re.match(r"(    |\t)\S", line.text)
        assert not indented, f"{name}:{line.number}: indented code; use a fenced block"
        before = line.text


def test_scripts_and_settings_fit():
    """Ruff looks at Python's code alone; comments elsewhere grow past a screen unseen."""
    written = (".env", ".in", ".sbatch", ".sh", ".toml", ".txt", ".yaml", ".yml")
    for name in FILES:
        if name.startswith("tests/golden/"):
            continue
        if name.endswith(written) or name in (".ci/run", "Makefile"):
            for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
                assert len(line) <= 100, f"{name}:{number}: {len(line)} columns"


def test_the_table_of_stages_is_true():
    """README has a row for each stage of the stage table, and a column for each cluster."""
    rows = [line.text for line in lines("README.md") if re.match(r"\| `make ", line.text)]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    shown = {re.search(r"make ([\w-]+)", row[0])[1]: row for row in cells}
    assert list(shown) == stages.names()
    for stage, (_, size, local, slurm, kubernetes) in shown.items():
        row = stages.row(stage)
        assert ("NODES" in size) == (row.ranks or row.spreads), f"README: {stage}: {size}"
        said = {"local": local, "slurm": slurm, "k8s": kubernetes}
        for cluster, word in said.items():
            assert (word == "yes") == (cluster in CLUSTERS), f"README: {stage} on {cluster}: {word}"


def test_quoted_lines_of_help_are_true():
    text = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    known = set(text.splitlines())
    for name in DOCS:
        for line in lines(name):
            quoted = re.match(r"  ([a-z-]+) {2,}[A-Z]", line.text) if line.block else None
            if quoted and quoted[1] in TARGETS:
                assert line.text in known, f"{name}:{line.number}: make help does not say so"


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".svg")])
def test_pictures_stand_alone(name):
    """A picture that loads a font or an image from elsewhere is broken on most pages."""
    for element in ElementTree.parse(ROOT / name).iter():  # noqa: S314  our own files
        for key, value in element.attrib.items():
            if key.endswith("href"):
                assert value.startswith("#"), f"{name} loads {value}"
        assert "@import" not in (element.text or ""), f"{name} loads a style sheet"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("make data RUN=x  # a comment", (["data"], ["RUN"])),
        ('$ DRY_RUN=1 make align ARGS="a b" RUN=y', (["align"], ["ARGS", "RUN"])),
        (
            "cd x && make pretrain finetune GPUS=2; make status",
            (["pretrain", "finetune"], ["GPUS"]),
        ),
        ("the same make pipeline goes on", None),
        ("make: *** [Makefile:39: data] Error 64", None),
    ],
)
def test_commands_are_recognised(code, found):
    assert next(commands(code), None) == found
