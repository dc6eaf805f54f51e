"""What the Hub of the tests (hub_server.py) holds: accounts, repositories, files by their content, planned faults."""

from __future__ import annotations

import fnmatch
import hashlib
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LARGE = ("*.safetensors", "*.bin", "*.pt", "*.model")


class Account(NamedTuple):
    name: str
    writes: bool = True
    """Whether its token may write."""


class Stored(NamedTuple):
    sha256: str
    size: int
    large: bool
    blob_id: str
    """What git names it by."""

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    """Files by path, by commit."""
    branches: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    @property
    def files(self) -> dict[str, Stored]:
        return self.commits[self.branches["main"]]


class Seen(NamedTuple):
    """A request that came in."""

    method: str
    path: str
    account: str | None
    range: str | None


@dataclass
class Fault:
    """What goes wrong with a request: a status, or a connection that breaks after so many bytes of the file."""

    method: str
    path: str
    """What the path looks like, wildcards allowed."""
    status: int | None = None
    after_bytes: int = 0
    times: int | None = 1
    """None: always."""


class HubContents:
    """Files lie in `folder` by their sha256; who may do what, and what was asked, is open to the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.accounts: dict[str, Account] = {}
        """By token."""
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.signatures: set[str] = set()
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, repo: str, private: bool = False, gated: bool = False) -> Repository:
        """A repository with the Hub's first commit."""
        repository = self.repositories[repo] = Repository(private, gated)
        rules = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE)
        self.commit(repo, {".gitattributes": self.store(rules.encode())})
        return repository

    def put(self, repo: str, path: str, content: bytes, branch: str = "main") -> str:
        """Commit one file; the commit."""
        return self.commit(repo, {path: self.store(content, is_large(path))}, branch)

    def put_folder(self, repo: str, folder: Path) -> str:
        """Commit the files of a folder; the commit."""
        files = {file.name: self.store(file.read_bytes(), is_large(file.name)) for file in sorted(folder.iterdir())}
        return self.commit(repo, {**files})

    def commit(self, repo: str, changed: dict[str, Stored | None], branch: str = "main") -> str:
        """A commit on a branch (made from main where it is new); None deletes a file."""
        repository = self.repositories[repo]
        before = repository.branches.get(branch) or repository.branches.get("main")
        files = {**(repository.commits[before] if before else {}), **changed}
        commit = hashlib.sha1(f"{before} {sorted(files.items())}".encode()).hexdigest()
        repository.commits[commit] = {path: stored for path, stored in files.items() if stored is not None}
        repository.branches[branch] = commit
        return commit

    def store(self, content: bytes, large: bool = False) -> Stored:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / sha256).write_bytes(content)
        return stored(sha256, len(content), large, content)

    def read(self, repo: str, path: str) -> bytes:
        return (self.folder / self.repositories[repo].files[path].sha256).read_bytes()

    def sign(self) -> str:
        """A signature for the address of a large file."""
        signature = secrets.token_hex(8)
        self.signatures.add(signature)
        return signature

    def fault_of(self, method: str, path: str) -> Fault | None:
        """The fault that meets this request, counted down."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fnmatch.fnmatch(path, fault.path) and fault.times != 0:
                    fault.times = fault.times and fault.times - 1
                    return fault
        return None

    def asked(self, method: str, path: str) -> int:
        """How many such requests came in."""
        return sum(seen.method == method and fnmatch.fnmatch(seen.path, path) for seen in self.seen)


def stored(sha256: str, size: int, large: bool, content: bytes = b"") -> Stored:
    """An entry of a commit; git holds a pointer in place of a large file."""
    if large:
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return Stored(sha256, size, large, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def is_large(path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in LARGE)
