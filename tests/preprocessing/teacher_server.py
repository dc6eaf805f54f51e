"""A chat-completions server on this machine, for the real openai client to talk to.

It answers with the compiled gold program it finds in the prompt, and misbehaves where it is told to.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finqa.programs import to_python
from finqa.prompts import page_from_prompt

HINT = "Hint: these steps give the right answer: "

Fault = str | int | None
"""None, an HTTP status, or `html`, `no-json`, `no-choices`, `reset`, `length`, `filtered`, `refusal`, `empty`."""


class TeacherServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault: Callable[[str, int], Fault] = lambda question, nth: None
        """What goes wrong with the nth request (from 1) for a question."""
        self.headers_of_faults: dict[str, str] = {}
        """Sent with a status that is a fault, e.g. Retry-After."""
        self.error_code: str | None = None
        """The code in the body of such a fault."""
        self.delay_s = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        self.most_at_a_time = 0
        self.at_a_time = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: TeacherServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        page = page_from_prompt(prompt)
        with server.lock:
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.keys.add(self.headers.get("Authorization"))
            server.asked[page.question] += 1
            fault = server.fault(page.question, server.asked[page.question])
            server.at_a_time += 1
            server.most_at_a_time = max(server.most_at_a_time, server.at_a_time)
        time.sleep(server.delay_s)
        with server.lock:
            server.at_a_time -= 1
        hint = prompt.partition(HINT)[2]
        self._answer(fault, body, to_python(hint, page.table, page.question) if hint else "ans = 0")

    def _answer(self, fault: Fault, body: dict[str, Any], program: str) -> None:
        if fault == "reset":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "html":
            self._send(200, b"<html>maintenance</html>", "text/html")
        elif fault == "no-json":
            self._send(200, b'{"choices": [', "application/json")
        elif isinstance(fault, int):
            error = {"error": {"message": f"status {fault} on purpose", "code": self.server.error_code}}
            self._send(fault, json.dumps(error).encode(), "application/json", self.server.headers_of_faults)
        else:
            self._send(200, json.dumps(_completion(fault, body, program)).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the tests look at what was recorded."""


def _completion(fault: Fault, body: dict[str, Any], program: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"```python\n{program}\n```"}
    if fault == "length":
        message["content"] = message["content"][:12]
    elif fault == "refusal":
        message |= {"content": None, "refusal": "I would rather not."}
    elif fault == "empty":
        message["content"] = ""
    finish_reason = {"length": "length", "filtered": "content_filter"}.get(str(fault), "stop")
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": f"{body['model']}-dated",
        "choices": None if fault == "no-choices" else choices,
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


@contextmanager
def running_teacher_server() -> Iterator[TeacherServer]:
    with TeacherServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
