"""The Hugging Face hub: the only module that imports huggingface_hub for a download or an upload.

The library reads HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and the token of `hf auth login` itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors
from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url, http_get
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import build_hf_headers, get_token
from huggingface_hub.utils.sha import git_hash

from scripts.run.digests import sha256
from scripts.run.errors import DONE, SAVED, WRONG_INPUT, InputError

PATIENCE = 10  # seconds for the hub's first answer
MOST = constants.MAX_HTTP_DOWNLOAD_SIZE  # bytes of one file that it sends over plain http
ENDPOINT = constants.ENDPOINT
LOGIN = "HF_TOKEN=…, or .venv/bin/hf auth login"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


class NotNow(Exception):
    """Say why the hub cannot be used now, and the exit code that this means."""

    def __init__(self, said: str, code: int = SAVED):
        super().__init__(said)
        self.code = code


class HubFile(NamedTuple):
    """Describe one file of a repository, with the hash that the hub has of it."""

    path: str
    size: int
    hash: str  # sha256 of a large one, git's own of a small one
    large: bool

    def hash_of(self, path: Path) -> str:
        """Compute the same hash of a file here."""
        return sha256(path) if self.large else git_hash(path.read_bytes())


@dataclass(frozen=True)
class Snapshot:
    """Hold what the hub says of one commit of a repository: its files; of a model those at its
    top."""

    repository: str
    revision: str
    commit: str
    licence: dict[str, str]  # licence; licence_name and licence_link where it is the model's own
    files: dict[str, HubFile]
    kind: str = "model"  # or "dataset"

    @property
    def name(self) -> str:
        """Return its name on the hub's pages."""
        return page_name(self.repository, self.kind)

    def address(self, name: str) -> str:
        """Return the URL of a file at this commit."""
        return hf_hub_url(self.repository, name, revision=self.commit, repo_type=self.kind)

    def probe(self, name: str) -> None:
        """Ask for a file's size: of a gated repository anybody may list the files, and only their
        own addresses are refused. Raises InputError or NotNow."""
        with told(self.name, self.revision):
            get_hf_file_metadata(self.address(name), timeout=PATIENCE)

    def fetch(self, file: HubFile, out: BinaryIO) -> None:
        """Append to a file what is still missing of it. Raises InputError or NotNow."""
        # Not packed on the way: a byte range must be one of the file itself.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        with told(self.name, self.revision):
            http_get(
                self.address(file.path),
                out,
                resume_size=out.tell(),
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.path,
            )


@contextlib.contextmanager
def told(repository: str, revision: str = "") -> Iterator[None]:
    """Turn what the library raises into one sentence with its mend: InputError or NotNow."""
    page, token = f"{ENDPOINT}/{repository}", get_token()
    try:
        yield
    except errors.GatedRepoError:
        known = "the account of your token has no access" if token else "no token was given"
        mend = "ask for it" if token else f"give one ({LOGIN}) that has accepted its terms"
        raise InputError(f"{repository}: gated, and {known}; {mend} at {page}") from None
    except errors.RepositoryNotFoundError:
        known = "the account of your token may not read" if token else f"needs a token ({LOGIN})"
        raise InputError(
            f"{repository}: no such repository on {ENDPOINT}, or a private one that {known}"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{repository}: has no revision {revision}; {page}/commits/main shows what there is"
        ) from None
    except errors.HFValidationError as error:
        said = str(error).split("\n")[0]
        raise InputError(f"{repository}: no repository's name: {said}") from None
    except errors.OfflineModeIsEnabled:
        raise NotNow(
            f"{repository}: HF_HUB_OFFLINE is set; unset it, or give FROM= a directory that is "
            "there already",
            WRONG_INPUT,
        ) from None
    except errors.HfHubHTTPError as error:
        status, said = error.response.status_code, error.server_message or str(error)
        if status in (408, 429) or status >= 500:
            again = "the same command goes on later"
            raise NotNow(f"{repository}: the hub answers {status}; {again}") from None
        if status == 401:
            mend = f"give a valid one: {LOGIN}"
            raise InputError(f"{ENDPOINT}: does not know your token; {mend}") from None
        raise InputError(
            f"{repository}: the hub refuses with {status}: {said.strip()}"
            + ("; take a token that may do this" if status == 403 else "")
        ) from None
    except (httpx2.HTTPError, ConnectionError) as error:
        kind = type(error).__name__
        mend = "mend the network (or HF_ENDPOINT), then the same command goes on"
        if "xet" in str(error):  # with hf_xet installed the library tries nothing else
            mend = f"if it is a mirror that has no xet, set HF_HUB_DISABLE_XET=1; else {mend}"
        raise NotNow(f"{repository}: {ENDPOINT} cannot be reached ({kind}); {mend}") from None
    except (OSError, RuntimeError, ValueError) as error:
        # The library's own words, for a transfer that ended otherwise than by the network.
        known = ("Consistency check failed", "Error while uploading", "LFS batch API")
        said = " ".join(str(error).split()).rstrip(".")
        if not said.startswith(known):
            raise
        raise NotNow(f"{repository}: {said}; the same command goes on") from None


def page_name(repository: str, kind: str) -> str:
    """Return a repository's name as it stands in the address of its page."""
    return f"datasets/{repository}" if kind == "dataset" else repository


def look(repository: str, revision: str, kind: str = "model") -> Snapshot:
    """Ask the hub what a revision is and holds. Raises InputError or NotNow."""
    api, whole = HfApi(), kind == "dataset"  # whose files lie in folders
    with told(page_name(repository, kind), revision):
        info = api.repo_info(repository, revision=revision, repo_type=kind, timeout=PATIENCE)
        commit = info.sha or ""
        tree = list(
            api.list_repo_tree(repository, revision=commit, repo_type=kind, recursive=whole)
        )
    card = info.card_data.to_dict() if info.card_data else {}
    words = {"license": "licence", "license_name": "licence_name", "license_link": "licence_link"}
    licence = {ours: str(card[theirs]) for theirs, ours in words.items() if card.get(theirs)}
    files = {}
    for item in tree:
        if isinstance(item, RepoFile) and (whole or "/" not in item.path):
            known = item.lfs.sha256 if item.lfs else item.blob_id
            files[item.path] = HubFile(item.path, item.size, known, bool(item.lfs))
    return Snapshot(repository, revision, commit, licence, files, kind)


def about(api: HfApi, repository: str) -> ModelInfo | None:
    """Return what the hub says of a repository, None if there is none that this token may see."""
    try:
        return api.model_info(repository, timeout=PATIENCE)
    except errors.RepositoryNotFoundError:
        return None


def put(
    repository: str,
    files: Mapping[str, Path | bytes],
    message: str,
    public: bool = False,
    force: bool = False,
) -> tuple[str, str]:
    """Upload files as one commit, to a repository made for them. Returns its URL and the
    commit.

    One that holds files is written over with `force` alone; weights that it had and that are none
    of these go, since loaders would read both. Raises InputError or NotNow.
    """
    if not get_token():
        raise InputError(f"{repository}: to upload needs a token that may write; give {LOGIN}")
    api = HfApi()
    with told(repository):
        # Asked first, not created and refused: who may write to it may not be allowed to create.
        there = about(api, repository)
        names = [f.rfilename for f in there.siblings or []] if there else []
        old = [name for name in names if name != ".gitattributes"]  # the hub's own
        if old and not force:
            what = f"{ENDPOINT}/{repository} exists, with {len(old)} files"
            mend = "give another REPO=, or FORCE=1 to write over it"
            raise InputError(f"REPO={repository}: {what}; {mend}")
        if there and not there.private and not public:
            mend = "PUBLIC=1 if all may read the model, or another REPO="
            raise InputError(f"REPO={repository}: is public already; give {mend}")
        if not there:
            api.create_repo(repository, private=not public)
        gone = [name for name in old if name.endswith(WEIGHTS) and name not in files]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=message,
        )
        if public and there and there.private:
            api.update_repo_settings(repository, private=False)
    return f"{ENDPOINT}/{repository}", commit.oid


def command(work: Callable[[Mapping[str, str]], str]) -> int:
    """Do a command's work and say what came of it; return its exit code."""
    try:
        print(work(os.environ))
        return DONE
    except KeyboardInterrupt:
        return 130
    except NotNow as reason:
        print(f"error: {reason}", file=sys.stderr)
        return reason.code
    except InputError as error:
        found = error.problems
    except OSError as error:  # no permission, a read-only disk, a file in the way
        if error.errno == errno.ENOSPC:
            print("error: the disk is full; free some, the same command goes on", file=sys.stderr)
            return SAVED
        if error.filename is None:
            raise
        found = [f"{error.filename}: {error.strerror}; choose another place"]
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return WRONG_INPUT
