"""A Hugging Face Hub on this machine, for the real huggingface_hub client to talk to (HF_ENDPOINT).

It speaks what the client needs to push and fetch a model: accounts, repositories, preupload, the LFS batch with its
uploads, commits, branches, trees, and files by revision with Range. As on the Hub, large files lie on another host
that takes signed addresses and no token, and a gated repository shows its list of files to all and its files to few.

It offers no Xet: an answer here never carries a Xet hash, so downloads go by plain HTTP. For uploads the client asks
nobody; it takes Xet wherever hf_xet is installed unless HF_HUB_DISABLE_XET is set.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_contents import HubContents, Repository, Seen, Stored, is_large, stored

ID = r"(?P<repo>(datasets/)?[^/]+/[^/]+)"
"""A data set's repository is kept by its name behind `datasets/`."""
KEPT = r"/api/(models/(?=[^/]+/)|(?=datasets/))" + ID
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PIECE = 1 << 16


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer(ThreadingHTTPServer, HubContents):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), _Handler)
        HubContents.__init__(self, folder)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def signed(self, sha256: str) -> str:
        """Address of a large file on the host that stores them."""
        return f"http://localhost:{self.server_address[1]}/storage/{sha256}?signature={self.sign()}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


def card_faults(text: str) -> list[str]:
    """What the Hub has against the metadata of a model card."""
    import yaml

    parts = text.split("---\n", 2)
    metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    bases = (metadata or {}).get("base_model", [])
    return [
        f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        for base in ([bases] if isinstance(bases, str) else bases)
        if not MODEL_ID.fullmatch(base)
    ]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    body: bytes

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.account = self.server.accounts.get(token)
        name = self.account.name if self.account else None
        self.server.seen.append(Seen(self.command, split.path, name, self.headers.get("Range")))
        self.fault = self.server.fault_of(self.command, split.path)
        if self.fault and self.command == "PUT" and self.fault.status is None:
            self.rfile.read(self.fault.after_bytes)
            return self._break()
        self.body = b"".join(self._body())
        if self.fault and self.command == "POST" and self.fault.status is None:
            return self._break()
        try:
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, "as the test wants it")
            if token and not self.account:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for method, pattern, answer in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, split.path)):
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return answer(self, **parts)
            raise Refusal(404, f"there is nothing at {split.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._json({"error": refusal.message, **refusal.body}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> Iterator[bytes]:
        """The request's body, whether its length is told or it comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.fault and self.fault.status is None:
            self.wfile.write(body[: self.fault.after_bytes])
            self._break()
        elif self.command != "HEAD":
            self.wfile.write(body)

    def _break(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send_file(self, sha256: str, headers: dict[str, str]) -> None:
        """The file, from where a Range begins, up to where a fault breaks the connection."""
        content = (self.server.folder / sha256).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = self.fault.after_bytes if self.fault else len(content)
        for at in range(start, stop, PIECE):
            self.wfile.write(content[at : min(at + PIECE, stop)])
        if self.fault:
            self._break()

    # Who may do what

    def _readable(self, repo: str) -> Repository:
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and not self._owns(repo)):
            raise Refusal(404 if self.account else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, repo: str) -> Repository:
        repository = self._readable(repo)
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        if not (self.account.writes and self._owns(repo)):
            raise Refusal(403, "you do not have the required permissions for this operation")
        return repository

    def _owns(self, repo: str) -> bool:
        return self.account is not None and repo.removeprefix("datasets/").split("/")[0] == self.account.name

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, Stored]]:
        repository = self._readable(repo)
        commit = repository.commit_of(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # What is asked

    def whoami(self) -> None:
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if self.account.writes else "read"
        self._json({"type": "user", "name": self.account.name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self) -> None:
        asked = json.loads(self.body)
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        owner = asked.get("organization") or self.account.name
        repo = f"{'datasets/' if asked.get('type') == 'dataset' else ''}{owner}/{asked['name']}"
        if not self.account.writes or owner != self.account.name:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if repo in self.server.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.server.url}/{repo}")
        self.server.create(repo, private=asked.get("visibility") == "private")
        self._json({"url": f"{self.server.url}/{repo}", "name": repo, "id": secrets.token_hex(12)})

    def validate_card(self) -> None:
        faults = card_faults(json.loads(self.body)["content"])
        errors = [{"message": fault} for fault in faults]
        self._json({"errors": errors, "warnings": []}, 400 if faults else 200)

    def settings(self, repo: str) -> None:
        self._writable(repo).private = json.loads(self.body).get("visibility") == "private"
        self._json({})

    def info(self, repo: str, revision: str = "main") -> None:
        commit, files = self._commit(repo, revision)
        repository = self.server.repositories[repo]
        siblings = [{"rfilename": path} for path in files]
        gated = "auto" if repository.gated else False
        known = {"id": repo.removeprefix("datasets/"), "modelId": repo, "sha": commit, "private": repository.private}
        self._json(known | {"gated": gated, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        _, files = self._commit(repo, revision)
        self._json(
            [
                {"type": "file", "path": path, "size": file.size, "oid": file.blob_id}
                | ({"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.large else {})
                for path, file in files.items()
            ]
        )

    def preupload(self, repo: str, revision: str) -> None:
        self._writable(repo)
        _, files = self._commit(repo, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if is_large(path) or file["size"] > 10_000_000 else "regular"
            oid = {"oid": files[path].etag} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self._json({"files": answers})

    def batch(self, repo: str) -> None:
        self._writable(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            here = (self.server.folder / wanted["oid"]).exists()
            upload = {"href": self.server.signed(wanted["oid"])}
            verify = {"href": f"{self.server.url}/{repo}.git/info/lfs/objects/verify"}
            objects.append(wanted | ({} if here else {"actions": {"upload": upload, "verify": verify}}))
        self._json({"transfer": "basic", "objects": objects})

    def verify(self, repo: str) -> None:
        self._writable(repo)
        wanted = json.loads(self.body)
        file = self.server.folder / wanted["oid"]
        if not file.exists() or file.stat().st_size != wanted["size"]:
            raise Refusal(404, "the object is not here")
        self._json({})

    def storage(self, sha256: str) -> None:
        """The other host: a signed address is all it asks for, and a token there would be one given away."""
        if self.headers.get("Authorization"):
            raise Refusal(400, "only one auth mechanism is allowed")
        if self.query.get("signature", [""])[0] not in self.server.signatures:
            raise Refusal(403, "no signature")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != sha256:
                raise Refusal(400, "the content is another")
            (self.server.folder / sha256).write_bytes(self.body)
            return self._send(b"", 200, {"ETag": f'"{sha256}"'})
        self._send_file(sha256, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def add_commit(self, repo: str, revision: str) -> None:
        self._writable(repo)
        changed: dict[str, Stored | None] = {}
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                content = base64.b64decode(value["content"])
                if value["path"] == "README.md" and (faults := card_faults(content.decode())):
                    raise Refusal(400, faults[0])
                changed[value["path"]] = self.server.store(content)
            elif key == "lfsFile":
                if not (self.server.folder / value["oid"]).exists():
                    raise Refusal(400, f"LFS pointer of {value['path']} points to nothing")
                changed[value["path"]] = stored(value["oid"], value["size"], True)
            elif key == "deletedFile":
                changed[value["path"]] = None
        with self.server.lock:
            commit = self.server.commit(repo, changed, revision)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{repo}/commit/{commit}"})

    def add_branch(self, repo: str, branch: str) -> None:
        repository = self._writable(repo)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self._commit(repo, start)[0]
        self._json({})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit, files = self._commit(repo, revision)
        if self.server.repositories[repo].gated and not self._owns(repo):
            raise Refusal(403 if self.account else 401, f"Access to model {repo} is restricted", "GatedRepo")
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if not file.large:
            return self._send_file(file.sha256, headers)
        linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
        self._send(b"", 302, headers | linked | {"Location": self.server.signed(file.sha256)})


ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("PUT", f"{KEPT}/settings", _Handler.settings),
    ("GET", f"{KEPT}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", f"{KEPT}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("POST", f"{KEPT}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"{KEPT}/commit/(?P<revision>[^/]+)", _Handler.add_commit),
    ("POST", f"{KEPT}/branch/(?P<branch>[^/]+)", _Handler.add_branch),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/{ID}\.git/info/lfs/objects/verify", _Handler.verify),
    ("PUT", "/storage/(?P<sha256>[0-9a-f]{64})", _Handler.storage),
    ("GET", "/storage/(?P<sha256>[0-9a-f]{64})", _Handler.storage),
    ("GET", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)


@contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    server = HubServer(folder)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
