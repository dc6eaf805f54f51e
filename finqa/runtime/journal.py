"""What was paid for is kept: an append-only file of everything a teacher was asked, one JSON object a line.

Three kinds of line, each with the key of its request (a hash of everything that shapes the reply):

- an answer: text, finish_reason, model, limit, tokens;
- a failure: what went wrong with one try. The request is asked again by the next run;
- a run: what the program of an answer gave, where that decides whether the teacher is asked again.

So a run that was killed asks only for what is missing, and a changed prompt or model asks anew. Each answer is on the
disk before the next step uses it. A process killed while writing leaves a torn last line: opening the journal cuts it
off, or completes it where only the line break is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from finqa.runtime.errors import UserError
from finqa.sandbox.results import Run


@dataclass(frozen=True)
class Answer:
    """What the server sent back for one request. Everything later steps need is computed from this."""

    text: str
    finish_reason: str
    model: str
    """The model as the server names it, e.g. the dated version behind an alias."""
    prompt_tokens: int = 0
    """Tokens read, the cached ones included."""
    completion_tokens: int = 0
    """Tokens written, the reasoning ones included."""
    limit: int = 0
    """max_completion_tokens of the request."""
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    batch: str = ""
    """Id of the batch that the request was part of; empty for one sent by itself."""
    asked: str = ""
    """The model as it was asked for, by which the price is known."""


@dataclass(frozen=True)
class Failure:
    """Why one try got no answer."""

    kind: str
    """As in the column error_kind: `teacher-...`."""
    message: str


def request_key(request: Mapping[str, object]) -> str:
    """A hash of the request's body (model, messages, parameters) but its limit, which shapes no finished reply.

    The server's address is no part of it: a model is known by its name.
    """
    shaping = {name: value for name, value in request.items() if name != "max_completion_tokens"}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Journal:
    """The answers, failures and runs of one output file, by request key.

        with Journal(path) as journal:
            answer = journal.answer(key)
            journal.add_answer(key, answer)

    One process at a time: opening a journal that another run writes to raises UserError. With `read_only` nothing is
    made, locked or changed, and a missing file is an empty journal. May be used from several threads.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self.damaged_lines = 0
        self.paid: list[Answer] = []
        """Every answer there is, also those that a later one under the same key replaced."""
        self._answers: dict[str, Answer] = {}
        self._failures: dict[str, Failure] = {}
        self._runs: dict[str, Run] = {}
        self._writing = threading.Lock()

    def __enter__(self) -> Journal:
        if self.read_only:
            self._load(self.path.read_bytes() if self.path.exists() else b"")
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        try:
            self._lock()
            self._file.seek(0)
            self._mend(self._load(self._file.read()))
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.read_only:
            self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, key: str) -> Answer | None:
        """The last answer to a request."""
        return self._answers.get(key)

    def failure(self, key: str) -> Failure | None:
        """What went wrong with the last try, where no answer came after it."""
        return self._failures.get(key)

    def run(self, key: str) -> Run | None:
        """What the program of the request's answer gave."""
        return self._runs.get(key)

    def add_answer(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on the disk when this returns. Raises UserError where it cannot be written."""
        self._write({"key": key, **asdict(answer)})
        self._keep(key, answer)

    def add_failure(self, key: str, failure: Failure) -> None:
        self._write({"key": key, "failure": asdict(failure)}, sync=False)
        self._keep(key, failure)

    def add_run(self, key: str, run: Run) -> None:
        self._write({"key": key, "run": asdict(run)}, sync=False)
        self._keep(key, run)

    def _keep(self, key: str, entry: Answer | Failure | Run) -> None:
        if isinstance(entry, Answer):
            self.paid.append(entry)
            self._answers[key] = entry
            self._failures.pop(key, None)
            self._runs.pop(key, None)  # It was of the answer that this one replaces.
        elif isinstance(entry, Failure):
            self._failures[key] = entry
        else:
            self._runs[key] = entry

    def _write(self, line: dict[str, Any], sync: bool = True) -> None:
        data = json.dumps(line, ensure_ascii=True).encode() + b"\n"
        with self._writing:
            size = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(data) != len(data):
                    raise OSError("the disk is full")
                if sync:
                    os.fsync(self._file.fileno())
            except OSError as error:
                os.ftruncate(self._file.fileno(), size)
                raise UserError(
                    f"{self.path} cannot be written ({error.strerror or error}); make room and start the same "
                    "command again: what is in it is kept"
                ) from error

    def _lock(self) -> None:
        import fcntl  # Not on Windows, and only this method needs it.

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {self.path}; wait for it, or end it first") from None

    def _load(self, content: bytes) -> tuple[int, bool]:
        """Read all lines; returns how many bytes are worth keeping, and whether the last line lacks its break."""
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            if not self._read(line):
                self.damaged_lines += 1  # Costs one question asked again; the others are kept.
        complete = whole < len(content) and self._read(content[whole:])
        return len(content) if complete else whole, complete

    def _read(self, line: bytes) -> bool:
        """Take in one line; False where it is damaged."""
        try:
            fields = json.loads(line)
            key = fields.pop("key")
            self._keep(key, _entry(fields))
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        return True

    def _mend(self, kept: tuple[int, bool]) -> None:
        size, lacks_break = kept
        self._file.truncate(size)
        if lacks_break:
            self._file.write(b"\n")


def _entry(fields: dict[str, Any]) -> Answer | Failure | Run:
    if "failure" in fields:
        return Failure(**fields["failure"])
    return Run(**fields["run"]) if "run" in fields else Answer(**fields)


def answers_in(paths: Iterable[Path]) -> list[Answer]:
    """Every answer in some journals, without touching them; a missing one is empty."""
    answers: list[Answer] = []
    for path in paths:
        with Journal(path, read_only=True) as journal:
            answers += journal.paid
    return answers
