"""The Hub's refusals, answered by a real HTTP server to the real client in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TOKEN = "hf_averysecrettoken"


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with the server's one status."""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"error": "no"}).encode()
        self.send_response(self.server.status)  # pyright: ignore[reportAttributeAccessIssue]
        for name, value in self.server.headers_sent.items():  # pyright: ignore[reportAttributeAccessIssue]
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.status, server.headers_sent = 404, {}  # pyright: ignore[reportAttributeAccessIssue]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def ask(endpoint: str, call: str, tmp_path: Path, token: str | None = TOKEN) -> str:
    """What a process says that makes the call against the Hub at `endpoint`."""
    script = (
        "from pathlib import Path\nfrom finqa.errors import UserError\nfrom finqa import hub\n"
        f"try: print('gave', {call})\nexcept UserError as error: print('refused', error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout


def at(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_push_says_to_accept_the_terms_and_log_in(hub: ThreadingHTTPServer, tmp_path: Path, status: int):
    hub.status = status  # pyright: ignore[reportAttributeAccessIssue]
    said = ask(at(hub), f"hub.push_folder(Path({str(tmp_path)!r}), 'me/model', None)", tmp_path)
    assert "refused" in said and "accept the model's terms" in said and "hf auth login" in said


def test_a_gated_model_says_to_accept_the_terms(hub: ThreadingHTTPServer, tmp_path: Path):
    hub.status = 403  # pyright: ignore[reportAttributeAccessIssue]
    hub.headers_sent = {"X-Error-Code": "GatedRepo"}  # pyright: ignore[reportAttributeAccessIssue]
    assert "accept the model's terms" in ask(at(hub), "hub.fetch_folder('big/model')", tmp_path)


def test_a_repository_that_is_not_there_is_none_so_that_the_caller_can_say_what_makes_it(
    hub: ThreadingHTTPServer, tmp_path: Path
):
    hub.headers_sent = {"X-Error-Code": "RepoNotFound"}  # pyright: ignore[reportAttributeAccessIssue]
    assert ask(at(hub), "hub.fetch_folder('nobody/nothing')", tmp_path) == "gave None\n"


def test_without_a_token_the_push_is_skipped_in_one_line_and_an_error_where_it_was_asked_for(tmp_path: Path):
    nobody = "http://127.0.0.1:9"
    call = f"hub.push_folder(Path({str(tmp_path)!r}), 'me/model', PUSH)"
    assert "not pushed to the Hub: no Hub token is here" in ask(nobody, call.replace("PUSH", "None"), tmp_path, None)
    assert "refused cannot push" in ask(nobody, call.replace("PUSH", "True"), tmp_path, None)
    assert ask(nobody, call.replace("PUSH", "False"), tmp_path, None) == "gave None\n"


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path):
    said = ask("http://127.0.0.1:9", f"hub.push_folder(Path({str(tmp_path)!r}), 'me/model', True)", tmp_path)
    assert "refused the connection to the Hub broke" in said
