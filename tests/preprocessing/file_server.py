"""A web server on this machine that serves one file, and misbehaves as it is told."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FileServer(ThreadingHTTPServer):
    """Serves `files` by name, else `content` under every name, with ranges."""

    daemon_threads = True

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.files: dict[str, bytes] = {}
        self.break_off_after: list[int] = []
        """Bytes sent before the connection ends, for the next requests."""
        self.status: int | None = None
        self.ignores_ranges = False
        self.length_off_by = 0
        """Added to the Content-Length."""
        self.chunked = False
        self.encoding: str | None = None
        """A Content-Encoding that nobody asked for."""
        self.range_off_by = 0
        """Added to the start of the range that is sent, and named in Content-Range."""
        self.seconds_a_chunk = 0.0
        self.endless = False
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_GET(self) -> None:
        server = self.server
        self.close_connection = True
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        if server.status:
            self.send_error(server.status)
            return
        whole = server.files.get(PurePosixPath(self.path).name, server.content)
        ranged = wanted is not None and not server.ignores_ranges
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and ranged else 0
        if ranged and start >= len(whole):
            self.send_error(416)
            return
        start = max(0, start + server.range_off_by) if ranged else start
        self.send_headers(whole, start, ranged)
        self.send_body(whole[start:])

    def send_headers(self, whole: bytes, start: int, ranged: bool) -> None:
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        if self.server.encoding:
            self.send_header("Content-Encoding", self.server.encoding)
        if self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not self.server.endless:
            self.send_header("Content-Length", str(len(whole) - start + self.server.length_off_by))
        self.send_header("Connection", "close")
        self.end_headers()

    def send_body(self, content: bytes) -> None:
        server = self.server
        end = server.break_off_after.pop(0) if server.break_off_after else None
        try:
            while True:
                for position in range(0, len(content[:end]), 1 << 18):
                    piece = content[:end][position : position + (1 << 18)]
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if server.chunked else piece)
                    time.sleep(server.seconds_a_chunk)
                if not server.endless:
                    break
            if server.chunked and end is None:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:
            return  # The other side has gone.

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@contextmanager
def running_file_server(content: bytes = b"") -> Iterator[FileServer]:
    with FileServer(content) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
