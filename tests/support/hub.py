"""A local server that speaks as much of the Hugging Face hub's API as download and upload need.
A data set is a repository whose name begins with datasets/.

Token hf_NAME is user NAME, who owns the repositories NAME/…; any other token is none. Content lies
in one folder, each file named by its sha256.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS = (
    ".safetensors",
    ".bin",
    ".gguf",
    ".pt",
    ".pth",
    ".parquet",
)  # the hub takes them as LFS in any size
SMALL = 10 << 20  # bytes; of other files the larger ones


@dataclass
class Repository:
    """Hold one repository: its commits, newest last, {sha: {path: file}}, and who may see it."""

    private: bool = False
    gated: set[str] | None = None  # the users let in
    licence: str = ""
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, dict]] = field(default_factory=dict)

    def commit(self, files: dict[str, dict], revision: str = "main") -> str:
        """Add a commit of these files and return its sha."""
        told = json.dumps([list(self.commits), files], sort_keys=True)
        sha = hashlib.sha1(told.encode()).hexdigest()  # noqa: S324  as git names commits
        self.commits[sha], self.refs[revision] = files, sha
        return sha


class Hub:
    """Run the server; what a test wants to go wrong stands in `cut`, `stall` and `flip`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        self.repositories: dict[str, Repository] = {}
        self.seen: list[tuple[str, str, int, str | None]] = []  # method, path, status, Range
        self.cut: dict[str, int] = {}  # path: break the connection after so many bytes, once
        self.stall: dict[str, int] = {}  # path: send no more after so many bytes, once
        self.flip: dict[str, int] = {}  # path: flip a byte of the next so many transfers
        self.fail = ("", 0)  # answer this status where method and path have this in them
        self.lock = threading.Lock()
        self.port = 0
        self.open()
        self.address = f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Listen, after close() on the same port again."""
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """End the server: its port refuses from now on."""
        self.server.shutdown()
        self.server.server_close()

    def keep(self, data: bytes, lfs: bool) -> dict:
        """Store content and return what a commit says of it."""
        sha256 = hashlib.sha256(data).hexdigest()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324  git's own
        (self.folder / sha256).write_bytes(data)
        return {"oid": sha256, "git": git, "size": len(data), "lfs": lfs}

    def add(self, name: str, files: dict[str, bytes], revision: str = "main", **about) -> str:
        """Commit files to a repository, made with `about` where it is not there. Returns the
        commit's sha."""
        repository = self.repositories.setdefault(name, Repository(**about))
        stored = {path: self.keep(data, is_lfs(path, len(data))) for path, data in files.items()}
        return repository.commit(stored, revision)

    def ranges(self, path: str) -> list[str | None]:
        """List the Range of each transfer of a file, None for a whole one."""
        ends = (f"/{path}", f"?{path}")
        answered = [s for s in self.seen if s[0] == "GET" and s[2] in (200, 206)]
        return [asked for _, where, _, asked in answered if where.endswith(ends)]


def is_lfs(path: str, size: int) -> bool:
    """Tell whether the hub takes a file as LFS."""
    return path.endswith(LFS) or size > SMALL


class Refused(Exception):
    """Carry a refusal: status, X-Error-Code, message."""


class Handler(BaseHTTPRequestHandler):
    """Answer one connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def route(self):
        path = urlsplit(self.path).path
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = token.removeprefix("hf_")
        try:
            if token and not token.startswith("hf_"):
                raise Refused(401, "", "Invalid credentials in Authorization header")
            part, status = self.hub.fail
            if part and part in f"{self.command} {path}":
                raise Refused(status, "", "as the test asked for")
            for methods, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods:
                    return action(self, *map(unquote, match.groups()))
            raise Refused(404, "", f"no such route: {self.command} {path}")
        except Refused as refusal:
            self.close_connection = self.command in ("POST", "PUT")  # their body was not read
            status, code, message = refusal.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.send(status, {"error": message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def head(self, status, headers):
        self.hub.seen.append((self.command, self.path, status, self.headers.get("Range")))
        self.send_response(status)
        for key, value in headers.items():
            if value != "":
                self.send_header(key, str(value))
        self.end_headers()

    def send(self, status, payload="", headers=None):
        data = json.dumps(payload).encode() if payload != "" else b""
        told = {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}
        self.head(status, told)
        if self.command != "HEAD":
            self.wfile.write(data)

    def repository(self, name, write=False, files=False) -> Repository:
        """Return a repository as this user may see it; refuse as the hub does."""
        found, own = self.hub.repositories.get(name), self.user == name.split("/")[0]
        if found is None or (found.private and not own):
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if files and found.gated is not None and not own and self.user not in found.gated:
            status = 403 if self.user else 401
            raise Refused(status, "GatedRepo", f"Access to model {name} is restricted.")
        if write and not own:
            raise Refused(403, "", "You don't have the rights to write to this repository")
        return found

    def commit(self, repository, revision):
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    # --- reading

    def info(self, name, revision="main"):
        repository = self.repository(name)
        sha, files = self.commit(repository, revision)
        about = {"id": name, "modelId": name, "sha": sha, "private": repository.private}
        about["gated"] = "manual" if repository.gated is not None else False
        about["cardData"] = {"license": repository.licence} if repository.licence else {}
        about["siblings"] = [{"rfilename": path} for path in sorted(files)]
        self.send(200, {**about, "disabled": False, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, name, revision):
        rows, whole = [], "recursive=true" in urlsplit(self.path).query.lower()
        files = self.commit(self.repository(name), revision)[1]
        if not whole:
            folders = dict.fromkeys(path.split("/")[0] for path in files if "/" in path)
            rows += [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        for path, file in sorted(files.items()):
            if "/" in path and not whole:
                continue
            row = {"type": "file", "path": path, "oid": file["git"], "size": file["size"]}
            if file["lfs"]:
                row["lfs"] = {"oid": file["oid"], "size": file["size"], "pointerSize": 134}
            rows.append(row)
        self.send(200, rows)

    def resolve(self, name, revision, path):
        sha, files = self.commit(self.repository(name, files=True), revision)
        headers, file = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}, files.get(path)
        if not file:
            told = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send(404, {"error": ""}, {**headers, **told})
        if not file["lfs"]:
            return self.blob(file["oid"], path, {**headers, "ETag": f'"{file["git"]}"'})
        # On another host, as the hub's own store is: the client follows a redirect to its own
        # host before it reads these headers.
        there = f"http://localhost:{self.hub.port}/lfs/{file['oid']}?{path}"
        told = {"X-Linked-Etag": f'"{file["oid"]}"', "X-Linked-Size": file["size"]}
        return self.send(302, "", {**headers, **told, "Location": there})

    def blob(self, oid, path=None, headers=None):
        path = path or unquote(urlsplit(self.path).query)
        content = self.hub.folder / oid
        size = content.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        end = min(int(asked[2] or size - 1) + 1, size) if asked else size
        if asked and start >= size:
            raise Refused(416, "", "Range Not Satisfiable")
        told = {"Content-Length": end - start, "Accept-Ranges": "bytes", "ETag": f'"{oid}"'}
        told.update(headers or {})
        if asked:
            told["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.head(206 if asked else 200, told)
        if self.command != "HEAD":
            self.transfer(path, content, start, end)

    def transfer(self, path, content, start, end):
        hub, left = self.hub, end - start
        cut, stall = hub.cut.pop(path, None), hub.stall.pop(path, None)
        with hub.lock:
            flip = hub.flip.get(path, 0)
            hub.flip[path] = max(0, flip - 1)
        for bound in (cut, stall):
            left = left if bound is None else min(left, bound)
        # A client that was killed has closed its end.
        with content.open("rb") as source, contextlib.suppress(ConnectionError):
            source.seek(start)
            while left > 0:
                data = bytearray(source.read(min(1 << 20, left)))
                if flip:
                    data[-1], flip = data[-1] ^ 1, 0
                self.wfile.write(data)
                left -= len(data)
        if stall is not None:
            self.wfile.flush()
            self.connection.recv(1)  # until the client is gone
        self.close_connection = cut is not None or stall is not None

    # --- writing

    def whoami(self):
        if not self.user:
            raise Refused(401, "", "Invalid username or password.")
        token = {"accessToken": {"role": "write"}}
        self.send(200, {"type": "user", "name": self.user, "orgs": [], "auth": token})

    def create(self):
        asked = json.loads(self.body())
        if not self.user:
            raise Refused(401, "", "Invalid username or password.")
        owner = asked.get("organization") or self.user
        if owner != self.user:
            raise Refused(403, "", f"You don't have the rights to create a model under {owner}")
        name = f"{owner}/{asked['name']}"
        exists = name in self.hub.repositories
        if not exists:
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            rules = {".gitattributes": self.hub.keep(b"*.safetensors filter=lfs\n", False)}
            self.hub.repositories[name] = Repository(private=private)
            self.hub.repositories[name].commit(rules)
        url = f"{self.hub.address}/{name}"
        self.send(409 if exists else 200, {"url": url, "name": name, "id": name})

    def settings(self, name):
        asked = json.loads(self.body())
        self.repository(name, write=True).private = asked["visibility"] == "private"
        self.send(200, {})

    def validate(self):
        self.body()
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, name, revision):
        old = self.commit(self.repository(name, write=True), revision)[1]
        rows = []
        for file in json.loads(self.body())["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in old:
                row["oid"] = old[path]["oid" if mode == "lfs" else "git"]
            rows.append(row)
        self.send(200, {"files": rows})

    def batch(self, name):
        self.repository(name, write=True)
        rows = []
        for asked in json.loads(self.body())["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.folder / asked["oid"]).exists():
                href = f"{self.hub.address}/lfs/{asked['oid']}"
                row["actions"] = {"upload": {"href": href}}
            rows.append(row)
        self.send(200, {"transfer": "basic", "objects": rows})

    def store(self, oid):
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(422, "", "content is not what its sha256 says")
        partial = self.hub.folder / f"{oid}.{threading.get_ident()}"
        partial.write_bytes(data)
        os.replace(partial, self.hub.folder / oid)
        self.send(200)

    def add_commit(self, name, revision):
        repository = self.repository(name, write=True)
        with self.hub.lock:
            files = dict(self.commit(repository, revision)[1])
            for item in map(json.loads, self.body().splitlines()):
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]), False)
                elif item["key"] == "lfsFile":
                    about = {"oid": value["oid"], "git": value["oid"], "size": value["size"]}
                    files[value["path"]] = {**about, "lfs": True}
                elif item["key"] == "deletedFile":
                    files.pop(value["path"], None)
            sha = repository.commit(files, revision)
        url = f"{self.hub.address}/{name}/commit/{sha}"
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


NAME, DATA, H = r"([\w.-]+/[\w.-]+)", r"(datasets/[\w.-]+/[\w.-]+)", Handler
ROUTES = [
    ("GET", "/api/whoami-v2", H.whoami),
    ("POST", "/api/repos/create", H.create),
    ("POST", "/api/validate-yaml", H.validate),
    ("GET", f"/api/models/{NAME}", H.info),
    ("GET", f"/api/{DATA}", H.info),
    ("GET", f"/api/{DATA}/revision/([^/]+)", H.info),
    ("GET", f"/api/{DATA}/tree/([^/]+)", H.tree),
    ("GET HEAD", f"/{DATA}/resolve/([^/]+)/(.+)", H.resolve),
    ("PUT", f"/api/models/{NAME}/settings", H.settings),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", H.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", H.tree),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", H.preupload),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", H.add_commit),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", H.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", H.store),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", H.resolve),
    ("GET HEAD", "/lfs/([0-9a-f]{64})", H.blob),
]
