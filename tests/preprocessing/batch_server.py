"""The Batch API of the teacher's server: files and batches, kept in memory.

A batch has the status that the test gives it, and its output is made when it is asked for.
"""

from __future__ import annotations

import email
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from teacher_server import TeacherServer

DONE = ("completed", "expired", "cancelled")


class BatchStore:
    def __init__(self, server: TeacherServer) -> None:
        self.server = server
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.status = "completed"
        """Of every batch that is asked about."""
        self.unanswered: set[str] = set()
        """Words of questions that an expired or cancelled batch did not come to."""
        self.errors: list[dict[str, Any]] | None = None
        """Of a failed batch."""
        self.create_fault = ""
        """`lost`: a batch is made, and the connection broken before its id is sent; `refused`: a 400."""

    def post(self, path: str, content: bytes, kind: str) -> tuple[int, bytes]:
        if path == "/files":
            return 200, self._upload(content, kind)
        if path == "/batches":
            if self.create_fault == "refused":
                return 400, json.dumps({"error": {"message": "no batches on purpose"}}).encode()
            batch = self._create(json.loads(content))
            if self.create_fault == "lost":
                return 500, json.dumps({"error": {"message": "lost on purpose"}}).encode()
            return 200, json.dumps(batch).encode()
        return 404, b'{"error": {"message": "no such path"}}'

    def get(self, path: str) -> tuple[int, bytes]:
        parts = urlsplit(path)
        if parts.path == "/batches":
            after = parse_qs(parts.query).get("after", [""])[0]
            ids = list(self.batches)
            page = ids[ids.index(after) + 1 if after else 0 :][:2]
            data = [self._as_it_is(name) for name in page]
            more = bool(ids and page and page[-1] != ids[-1])
            return 200, json.dumps({"object": "list", "data": data, "has_more": more}).encode()
        if parts.path.startswith("/batches/"):
            name = parts.path.split("/")[2]
            if name not in self.batches:
                return 404, b'{"error": {"message": "no such batch"}}'
            return 200, json.dumps(self._as_it_is(name)).encode()
        name = parts.path.split("/")[2]
        return (200, self.files[name]) if name in self.files else (404, b'{"error": {"message": "no such file"}}')

    def lines(self) -> list[dict[str, Any]]:
        """Every request of every batch that was made."""
        return [line for batch in self.batches.values() for line in self._lines_of(batch)]

    def _upload(self, content: bytes, kind: str) -> bytes:
        message = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + content)
        parts: dict[str, Any] = {
            str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)
            for part in message.get_payload()  # pyright: ignore[reportAttributeAccessIssue]
        }
        assert parts["purpose"] == b"batch"
        name = f"file-{len(self.files)}"
        self.files[name] = parts["file"]
        return json.dumps(
            {
                "id": name,
                "object": "file",
                "bytes": len(parts["file"]),
                "created_at": 1,
                "filename": "x.jsonl",
                "purpose": "batch",
                "status": "processed",
            }
        ).encode()

    def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["endpoint"] == "/v1/chat/completions" and body["completion_window"] == "24h"
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "endpoint": body["endpoint"],
            "completion_window": "24h",
            "created_at": 1,
            "input_file_id": body["input_file_id"],
            "metadata": body.get("metadata"),
            "status": "validating",
        }
        return self.batches[name]

    def _lines_of(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]

    def _as_it_is(self, name: str) -> dict[str, Any]:
        batch, status = self.batches[name], self.batches[name].setdefault("fixed_status", self.status)
        if status not in (*DONE, "failed"):
            del batch["fixed_status"]
        lines = self._lines_of(batch)
        shown = {k: v for k, v in batch.items() if k != "fixed_status"} | {"status": status}
        shown["request_counts"] = {"total": len(lines), "completed": 0, "failed": 0}
        if status == "failed":
            shown["errors"] = {"object": "list", "data": self.errors}
        if status in DONE and "output_file_id" not in batch:
            outputs = [self._output(line, status) for line in lines]
            for which, good in (("output_file_id", True), ("error_file_id", False)):
                chosen = [json.dumps(output) for output, fine in outputs if fine == good]
                if chosen:
                    self.files[f"{which}-of-{name}"] = "\n".join(chosen).encode() + b"\n"
                batch[which] = f"{which}-of-{name}" if chosen else None
        return shown | {k: batch[k] for k in ("output_file_id", "error_file_id") if k in batch}

    def _output(self, line: dict[str, Any], status: str) -> tuple[dict[str, Any], bool]:
        body, server = line["body"], self.server
        question = server.asked_about(body)[0].question
        server.asked[question] += 1
        fault = server.fault(question, server.asked[question])
        output: dict[str, Any] = {"id": "batch_req_1", "custom_id": line["custom_id"], "response": None, "error": None}
        if status != "completed" and any(word in question for word in self.unanswered):
            error = {"code": f"batch_{status}", "message": f"this request could not be executed before it was {status}"}
            return output | {"error": error}, False
        if isinstance(fault, int):
            error = {"error": {"message": f"status {fault} on purpose", "code": server.error_code}}
            return output | {"response": {"status_code": fault, "request_id": "1", "body": error}}, False
        completion = server.completion(body, fault)
        return output | {"response": {"status_code": 200, "request_id": "1", "body": completion}}, True
