"""Talk to a served model in the terminal: streams the answer. PROMPT= asks once and leaves.

python3 -m scripts.chat         RUN= names the run; standard library only
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from scripts.launcher import report
from scripts.run import attempts, files, layout
from scripts.run.errors import DONE, WRONG_INPUT, InputError


class Server:
    """A run's served model: its address and key. Raises InputError where nothing serves."""

    def __init__(self, directory: Path):
        run = directory.parent.name
        report.check_exists(run)
        server = files.read_json(directory / "server.json")
        if not server or not attempts.running(directory):
            raise InputError(f"run {run} is not served; make deploy RUN={run}, or wait: make status RUN={run} shows it loading")
        facts = files.read_env(directory / "stage.env")
        key = facts.get("API_KEY_FILE")
        self.url = f"http://{server['host']}:{server['port']}/v1/chat/completions"
        self.name = server["name"]
        self.key = (layout.from_fact(key) if key else directory / "api-key").read_text().strip()


def ask(server: Server, messages: list[dict], max_tokens: int = 128) -> tuple[int, str]:
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
        print(f"error: {error.code}: {error.read().decode(errors='replace')[:500]}", file=sys.stderr)
        return 1, answer
    except OSError as error:
        print(f"error: {server.url}: {error}; make status", file=sys.stderr)
        return 1, answer
    print()
    return DONE, answer


def main() -> int:
    """One question by PROMPT=, or a conversation until end of input."""
    run = os.environ.get("RUN") or os.environ.get("MODEL") or "debug"
    directory = layout.stage_dir(run, "deploy")
    try:
        server = Server(directory)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    if os.environ.get("PROMPT"):
        return ask(server, [{"role": "user", "content": os.environ["PROMPT"]}])[0]
    messages: list[dict] = []
    print(f"{server.name} at {server.url}; Ctrl-D ends")
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
            server = Server(directory)  # a requeued service may be on another node by now
            code, answer = ask(server, messages)
        except (EOFError, KeyboardInterrupt):
            print()
            return DONE
        messages.append({"role": "assistant", "content": answer})
        if code:
            return code


if __name__ == "__main__":
    sys.exit(main())
