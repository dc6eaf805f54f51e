"""A chat-completions server on this machine, for the real openai client to talk to.

It answers with the compiled gold program it finds in the prompt, and misbehaves where it is told to. It has the Batch
API too (batch_server).
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
from typing import Any, TypeVar

from batch_server import BatchStore

from finqa.task.program_compiler import to_python
from finqa.task.prompts import QUESTION, page_from_prompt

HINT = "Hint: these steps give the right answer: "

Fault = str | int | None
"""None, an HTTP status, or `html`, `no-json`, `no-choices`, `reset`, `stall`, `torn`, `length`, `filtered`, `refusal`,
`empty`, `no-usage`, `echo-key`."""


class TeacherServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault: Callable[[str, int], Fault] = lambda question, nth: None
        """What goes wrong with the nth request (from 1) for a question."""
        self.program: Callable[[str, str, int], str] = lambda question, gold, turn: gold
        """What is written for a question whose gold program compiles to `gold`, in the turn (from 1) of its talk."""
        self.headers_of_faults: dict[str, str] = {}
        """Sent with a status that is a fault, e.g. Retry-After."""
        self.error_code: str | None = None
        """The code in the body of such a fault."""
        self.error_body: bytes | None = None
        """In place of that body."""
        self.refused_parameter = ""
        """A request that has it gets a 400."""
        self.changed: Callable[[dict[str, Any]], object] = lambda completion: completion
        """Turns the body of a reply into what another server would send."""
        self.delay_s = 0.0
        self.takes_at_a_time = 1_000_000
        """Requests above so many at a time get a 429."""
        self.usage: dict[str, Any] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        self.batches = BatchStore(self)
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        """Replies with a program that were sent whole, by question."""
        self.times: list[float] = []
        self.most_at_a_time = 0
        self.at_a_time = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def completion(self, body: dict[str, Any], fault: Fault) -> dict[str, Any]:
        """The body of the reply to a request that is a success, as far as HTTP goes."""
        page, hint, turn = self.asked_about(body)
        gold = to_python(hint, page.table, page.question) if hint else "ans = 0"
        message = {"role": "assistant", "content": f"```python\n{self.program(page.question, gold, turn)}\n```"}
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
            "usage": None if fault == "no-usage" else self.usage,
        }

    def asked_about(self, body: dict[str, Any]) -> tuple[Any, str, int]:
        """Page, hint, and the turn of the talk (from 1)."""
        users = [message["content"] for message in body["messages"] if message["role"] == "user"]
        turns = 1
        while QUESTION not in users[-turns]:
            turns += 1
        prompt, _, hint = users[-turns].partition(HINT)
        return page_from_prompt(prompt), hint, turns


class _Handler(BaseHTTPRequestHandler):
    server: TeacherServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    """Head and body leave together: apart, the second would wait 40 ms for the client to confirm the first."""

    def do_GET(self) -> None:
        self._send(*self.server.batches.get(self.path.removeprefix("/v1")))

    def do_POST(self) -> None:
        server, path = self.server, self.path.removeprefix("/v1")
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length)
        if len(content) < length:  # The client was killed while it sent.
            self.close_connection = True
            return
        with server.lock:
            server.keys.add(self.headers.get("Authorization"))
        if path != "/chat/completions":
            self._send(*server.batches.post(path, content, self.headers["Content-Type"]))
            return
        body = json.loads(content)
        question = server.asked_about(body)[0].question
        with server.lock:
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.asked[question] += 1
            fault = server.fault(question, server.asked[question])
            server.at_a_time += 1
            server.most_at_a_time = max(server.most_at_a_time, server.at_a_time)
            if server.at_a_time > server.takes_at_a_time:
                fault = 429
            if server.refused_parameter in body:
                fault = 400
        try:
            time.sleep(server.delay_s)
            self._answer(fault, body, question)
        finally:
            with server.lock:
                server.at_a_time -= 1

    def _answer(self, fault: Fault, body: dict[str, Any], question: str) -> None:
        if fault == "reset":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "stall":
            self.close_connection = True
            self.server.closing.wait(30)
        elif fault == "torn":
            self.close_connection = True
            self._send(200, json.dumps(self.server.completion(body, None)).encode(), cut=20)
        elif fault == "html":
            self._send(200, b"<html>maintenance</html>", "text/html")
        elif fault == "no-json":
            self._send(200, b'{"choices": [')
        elif isinstance(fault, int) or fault == "echo-key":
            key = str(self.headers.get("Authorization")).removeprefix("Bearer ") if fault == "echo-key" else "purpose"
            status = fault if isinstance(fault, int) else 400
            message = f"status {status} on {key} {self.server.refused_parameter}"
            error = {"error": {"message": message, "code": self.server.error_code}}
            content = self.server.error_body or json.dumps(error).encode()
            self._send(status, content, headers=self.server.headers_of_faults)
        else:
            self._send(200, json.dumps(self.server.changed(self.server.completion(body, fault))).encode())
            with self.server.lock:
                self.server.answered[question] += 1

    def _send(
        self,
        status: int,
        content: bytes,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
        cut: int = 0,
    ) -> None:
        """Send a response, or but for its last `cut` bytes."""
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) - cut])

    def handle(self) -> None:
        """A client that was killed is no error of the server's."""
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the tests look at what was recorded."""


Server = TypeVar("Server", bound=TeacherServer)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server, answering until the block ends."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
