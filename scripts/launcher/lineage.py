"""From a run's newest model back to its corpus, by the digests of the files that are there now."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from scripts.launcher.options import Options
from scripts.launcher.report import check_exists
from scripts.run import stages
from scripts.run.digests import Digests
from scripts.run.errors import DONE, InputError
from scripts.run.files import read_json
from scripts.run.layout import finished, from_fact, relative
from scripts.run.stages import row


def lineage(options: Options) -> int:
    """Print the walk. Returns 1 if a file is not what a stage has read or made, else 0."""
    run = options.run
    check_exists(run)
    for cluster in options.clusters.values():
        told = cluster.beside(run, options.verb)
        if told is not None:
            print(told[1], end="")
            return told[0]
    last_first = [run.stage(name) for name in reversed(stages.names())]
    begin = next((d for d in last_first if _inputs(d)), None)
    if begin is None:
        raise InputError(f"run {run.name}: nothing to trace yet; make status RUN={run.name}")
    walk = _Walk(Digests(run))
    walk.visit(begin, 0)
    for problem in walk.problems:
        print(f"error: {problem}")
    return 1 if walk.problems else DONE


def _inputs(directory: Path) -> dict[str, Any]:
    """Return what a stage has read; a service that runs says it in server.json."""
    if row(directory.name).serves:
        server = read_json(directory / "server.json")
        return {"model": server["model"]} if server else {}
    return dict((finished(directory) or {}).get("inputs", {}))


class _Walk:
    """Print a stage, its inputs and the stages that made those, each once; collect in `problems`
    what has changed since it was recorded."""

    def __init__(self, digests: Digests):
        self.digests = digests
        self.seen: set[Path] = set()
        self.compared: set[Path] = set()
        self.problems: list[str] = []

    def visit(self, directory: Path, depth: int) -> None:
        record = finished(directory) or {}
        ended = time.localtime(record["ended"]) if record else None
        when = time.strftime("%Y-%m-%d %H:%M", ended) if ended else "now"
        commit, name = (
            record.get("git_commit", "")[:12],
            f"{directory.parent.name}/{directory.name}",
        )
        print(f"{'  ' * depth}{name}  {when}" + (f"  commit {commit}" if commit else ""))
        self.seen.add(directory)
        for key, item in sorted(_inputs(directory).items()):
            print(f"{'  ' * depth}  {key} {item['digest'][:23]}…  {item['path']}")
            path = from_fact(item["path"], self.digests.run.root)
            self._compare(f"{relative(directory)} used", path, item["digest"])
            maker = path.parent
            made = (finished(maker) or {}).get("outputs", {})
            if path.name in made and maker not in self.seen:
                self.visit(maker, depth + 2)
        for item in record.get("outputs", {}).values():
            if "digest" in item:
                path = from_fact(item["path"], self.digests.run.root)
                self._compare(f"{relative(directory)} made", path, item["digest"])
        if record and row(directory.name).makes == "sets":
            summary = record["summary"]
            digest = f"{summary['corpus'][:23]}…  " if summary["corpus"] else ""
            print(f"{'  ' * depth}  corpus {digest}{summary['source']}")

    def _compare(self, who: str, path: Path, digest: str) -> None:
        """Compare a file or folder with its recorded digest, once; add a problem if it differs."""
        if path in self.compared or not path.exists():
            return  # what was removed since is named by its digest alone
        self.compared.add(path)
        now = self.digests.of_tree(path)
        if now != digest:
            changed = f"{who} {digest[:23]}…, it now is {now[:23]}…"
            self.problems.append(f"{relative(path)} has changed since: {changed}")
