"""What preparing data costs: rate beside the tokenizer library's alone, memory, a kill.

    .venv/bin/python -m bench.data 100 1000 4000     # megabytes; TMPDIR needs three times that

The corpus is made of paragraphs of the Python sources that are installed here, an eighth of their
words replaced: 80 % documents, 20 % conversations. Rates are of all cores together.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from bench.measures import ROOT

PYTHON = str(ROOT / ".venv/bin/python")


def corpus(path: Path, megabytes: int) -> None:
    """Write so many megabytes of rows, the same each time."""
    chance, paragraphs = random.Random(0), []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        paragraphs += [p for p in text.split("\n\n") if 200 < len(p) < 2000]
    words = sorted({word for p in paragraphs for word in re.findall(r"[a-z]{4,}", p)})
    size = 0
    with open(path, "w", encoding="utf-8") as out:
        while size < megabytes * 1e6:
            drawn = [
                re.sub(r"[a-z]{4,}", lambda m: _replaced(m[0], words, chance), p)
                for p in chance.sample(paragraphs, 3)
            ]
            row = {"text": "\n\n".join(drawn)}
            if chance.random() < 0.2:
                turns = zip(("user", "assistant"), (drawn[0][:300], drawn[1][:800]))
                row = {"messages": [{"role": role, "content": text} for role, text in turns]}
            size += out.write(json.dumps(row) + "\n")


def _replaced(word: str, words: list[str], chance: random.Random) -> str:
    return chance.choice(words) if chance.random() < 0.125 else word


def tokenizer_alone(path: Path, tokenizer: Path) -> float:
    """Return MB/s of text that the library encodes on all cores in batches, nothing else done."""
    code = (
        "import json, sys, time; from itertools import islice; from tokenizers import Tokenizer; "
        "t = Tokenizer.from_file(sys.argv[2]); "
        "rows = (json.loads(line) for line in islice(open(sys.argv[1]), 20000)); "
        "texts = [r['text'] for r in rows if 'text' in r]; size = sum(map(len, texts)); "
        "began = time.time(); "
        "[t.encode_batch_fast(texts[n:n + 256]) for n in range(0, len(texts), 256)]; "
        "print(size / 1e6 / (time.time() - began))"
    )
    words = [PYTHON, "-c", code, str(path), str(tokenizer)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def family(root: int) -> set[int]:
    """Return a process and all below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
        except OSError:
            continue
    found, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found


def memory(root: int) -> int:
    """Return the bytes that a process and all below it hold; shared pages count once (Pss)."""
    total = 0
    for pid in family(root):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss:\s+(\d+)", rollup, re.M)[1]) * 1024
        except (OSError, TypeError):
            continue
    return total


def prepare(run: str, source: Path, folder: Path, kill_after: float = 0) -> tuple[float, int]:
    """Call make data; return its seconds and the most memory that it held, in bytes."""
    words = ["make", "-s", "data", f"RUN={run}", f"DATA={source}", f"RUNS={folder}/runs"]
    words += ["ARGS=max_dropped=1"]
    began, peak = time.time(), 0
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        peak = max(peak, memory(child.pid))
        time.sleep(0.5)
        if kill_after and time.time() > began + kill_after:
            for pid in family(child.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert kill_after or child.returncode == 0, "make data failed"
    return time.time() - began, peak


def digest(folder: Path) -> str:
    """Return one digest of all files of a folder."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


def main() -> None:
    """Print a row of the table for each size."""
    print("| MB | s | MB/s | of the tokenizer alone | peak memory, GB | killed, then the same |")
    print("|---|---|---|---|---|---|")
    for megabytes in map(int, sys.argv[1:] or ["100"]):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source = folder / "corpus.jsonl"
            corpus(source, megabytes)
            seconds, peak = prepare("whole", source, folder)
            sets = folder / "runs/whole/data/sets"
            alone = tokenizer_alone(source, sets / "tokenizer/tokenizer.json")
            prepare("killed", source, folder, kill_after=seconds * 0.7)
            rest, _ = prepare("killed", source, folder)
            same = digest(sets) == digest(folder / "runs/killed/data/sets")
            again = f"{'the same bytes' if same else 'OTHER BYTES'}, {rest:.0f} s"
            rate = source.stat().st_size / 1e6 / seconds
            print(
                f"| {megabytes} | {seconds:.0f} | {rate:.2f} | {rate / alone:.0%} of {alone:.2f} "
                f"| {peak / 1e9:.2f} | {again} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
