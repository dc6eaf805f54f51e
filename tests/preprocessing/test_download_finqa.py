from __future__ import annotations

import hashlib
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_fixture import Command, the_one_line

from finqa.errors import UserError
from preprocessing import download_finqa
from preprocessing.download_finqa import download_file, git_blob_id

CONTENT = b'[{"id": "made up"}]\n' * 200_000
"""4 MB: several chunks."""
BLOB_ID = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()


class FileServer(ThreadingHTTPServer):
    """Serves `content` under every name, with ranges; can be told to break off or to answer with an error."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = CONTENT
        self.break_off_after: list[int] = []
        """Bytes sent before the connection ends, for the next requests."""
        self.status: int | None = None
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if self.server.status:
            self.send_error(self.server.status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(self.server.content):
            self.send_error(416)
            return
        content = self.server.content[start:]
        self.send_response(206 if wanted else 200)
        if wanted:
            whole = len(self.server.content)
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.break_off_after.pop(0)] if self.server.break_off_after else content)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_finqa, "FIRST_WAIT_S", 0.01)


def test_the_blob_id_is_the_one_git_gives(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    by_git = subprocess.run(["git", "hash-object", file], capture_output=True, text=True, check=True).stdout.strip()
    assert git_blob_id(file) == by_git == BLOB_ID


def test_a_verified_file_gets_its_name_and_nothing_else_is_left(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "FinQA" / "train.json"
    download_file(f"{file_server.url}/train.json", path, BLOB_ID)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_there_and_verifies_is_not_asked_for(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(CONTENT)
    assert "already there" in download_file(f"{file_server.url}/train.json", path, BLOB_ID)
    assert file_server.ranges == []


def test_a_wrong_file_is_not_left_in_place(file_server: FileServer, tmp_path: Path) -> None:
    file_server.content = CONTENT.replace(b"made", b"MADE", 1)
    with pytest.raises(UserError, match="not the official file"):
        download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_that_name_is_set_aside(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"[my own rows]")
    download_file(f"{file_server.url}/train.json", path, BLOB_ID)
    assert path.read_bytes() == CONTENT
    assert (tmp_path / "train.json.unverified").read_bytes() == b"[my own rows]"


def test_a_broken_connection_goes_on_where_it_broke(file_server: FileServer, tmp_path: Path) -> None:
    file_server.break_off_after = [1_000_000, 500_000]
    download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert (tmp_path / "train.json").read_bytes() == CONTENT
    assert file_server.ranges == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_killed_download_is_resumed(file_server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "train.json.part").write_bytes(CONTENT[:123_456])
    download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert (tmp_path / "train.json").read_bytes() == CONTENT
    assert file_server.ranges == ["bytes=123456-"]


@pytest.mark.parametrize("left", [b"of another file", CONTENT, CONTENT + b"longer"], ids=["other", "whole", "longer"])
def test_whatever_part_is_left_the_result_is_the_file(file_server: FileServer, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "train.json.part").write_bytes(left)
    download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert (tmp_path / "train.json").read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (500, 5), (429, 5)])
def test_an_http_error_is_one_line_and_only_a_passing_one_is_tried_again(
    file_server: FileServer, tmp_path: Path, status: int, requests: int
) -> None:
    file_server.status = status
    with pytest.raises(UserError, match=rf"HTTP {status}.*--url-base"):
        download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert len(file_server.ranges) == requests
    assert not (tmp_path / "train.json").exists()


def test_the_command_refuses_a_mirror_with_other_files(
    command: Command, file_server: FileServer, tmp_path: Path
) -> None:
    line = the_one_line(command("download_finqa", "--split", "dev", "--url-base", file_server.url))
    assert "not the official file" in line
    assert list((tmp_path / "FinQA").iterdir()) == []


def test_an_address_that_is_none_is_one_line(command: Command) -> None:
    assert "not an address" in the_one_line(command("download_finqa", "--url-base", "not an address"))
