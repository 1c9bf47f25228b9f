"""Talk to a served model in the terminal. PROMPT= asks once and leaves."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from scripts.clusters.interface import Cluster
from scripts.launcher.options import Options
from scripts.launcher.report import check_exists
from scripts.run import stages
from scripts.run.errors import DONE, InputError
from scripts.run.files import read_env, read_json
from scripts.run.layout import Run, from_fact

POLL_SECONDS = 1.0


class Server:
    """Hold a run's served model: its address and key. Waits for one that loads. Raises InputError
    where nothing serves."""

    def __init__(self, run: Run, cluster: Cluster):
        serving = stages.maker("service").name
        directory = run.stage(serving)
        check_exists(run)
        waits = False
        while not (url := cluster.reach(directory)):
            if cluster.service_state(directory) != "loading":
                raise InputError(f"run {run.name} is not served; make {serving} RUN={run.name}")
            if not waits:
                print(f"run {run.name} is loading; Ctrl-C ends the wait", file=sys.stderr)
            waits = True
            time.sleep(POLL_SECONDS)
        self.url = f"{url}/v1/chat/completions"
        self.name = run.name
        self.key = cluster.key(directory)


def ask(server: Server, messages: list[dict[str, str]], max_tokens: int = 128) -> tuple[int, str]:
    """Send a conversation and print the answer as it comes. Returns (exit code, answer)."""
    body = {"model": server.name, "messages": messages, "stream": True, "max_tokens": max_tokens}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    request = urllib.request.Request(server.url, json.dumps(body).encode(), headers)
    answer = ""
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                piece = json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                answer += piece
                print(piece, end="", flush=True)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:500]
        print(f"error: {error.code}: {said}", file=sys.stderr)
        return 1, answer
    except OSError as error:
        print(f"error: {server.url}: {error}; make status", file=sys.stderr)
        return 1, answer
    print()
    return DONE, answer


def chat(options: Options) -> int:
    """Ask PROMPT once, or hold a conversation until the end of input. Returns an exit code."""
    here = _serving(options)
    server = Server(options.run, here)
    if options.prompt:
        return ask(server, [{"role": "user", "content": options.prompt}])[0]
    messages: list[dict[str, str]] = []
    print(f"{server.name} at {server.url}; Ctrl-D ends")
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
            server = Server(options.run, here)  # a requeued service may have moved
            code, answer = ask(server, messages)
        except (EOFError, KeyboardInterrupt):
            print()
            return DONE
        messages.append({"role": "assistant", "content": answer})
        if code:
            return code


def _serving(options: Options) -> Cluster:
    """Return the cluster that serves the run: CLUSTER, or else where it was deployed."""
    directory = options.run.stage(stages.maker("service").name)
    known = (options.here, *options.clusters.values())
    return next((c for c in known if c.service_state(directory)), options.here)


def sample(run: Run, cluster: Cluster) -> int:
    """Ask the served model the sample question of its data, if it has one, and print the answer.
    Returns an exit code."""
    facts = read_env(run.stage(stages.maker("verdict").name) / "stage.env")
    data: Path = from_fact(facts["DATA"], run.root)
    question = read_json(data / "data.json")["sample"]
    if not question:
        return DONE
    print(f"\nasked    {question}\nanswered ", end="")
    return ask(Server(run, cluster), [{"role": "user", "content": question}])[0]
