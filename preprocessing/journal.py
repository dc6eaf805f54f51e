"""What was paid for is kept: an append-only file of a teacher's answers, one JSON object a line.

An answer is found again by its request's key, a hash of everything that shapes the reply, so a run that was killed
asks only for what is missing, and a changed prompt or model asks anew. A larger limit asks again only for what the
smaller one cut off. Each answer is in the file before the
next step uses it. A process killed while writing leaves a torn last line: opening the journal cuts it off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from finqa.errors import UserError


@dataclass(frozen=True)
class Answer:
    """What the server sent back for one request. Everything later steps need is computed from this."""

    text: str
    finish_reason: str
    model: str
    """The model as the server names it, e.g. the dated version behind an alias."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    limit: int = 0
    """max_completion_tokens of the request."""

    def was_cut_below(self, limit: int) -> bool:
        """Whether the reply ended at a limit under this one, so that asking again can help."""
        return self.finish_reason == "length" and self.limit < limit


def request_key(request: Mapping[str, object]) -> str:
    """A hash of the request's body (model, messages, parameters) but its limit, which shapes no finished reply.

    The server's address is no part of it: a model is known by its name.
    """
    shaping = {name: value for name, value in request.items() if name != "max_completion_tokens"}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Journal:
    """The answers of one output file, by request key.

        with Journal(path) as journal:
            answer = journal.get(key)
            journal.add(key, answer)

    One process at a time: opening a journal that another run writes to raises UserError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged_lines = 0
        self._answers: dict[str, Answer] = {}

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._load()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def needs(self, key: str, limit: int) -> bool:
        """Whether a request is still to be asked: there is no answer, or one that a smaller limit cut off."""
        answer = self._answers.get(key)
        return answer is None or answer.was_cut_below(limit)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is with the operating system when this returns."""
        line = json.dumps({"key": key, **asdict(answer)}, ensure_ascii=True)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._answers[key] = answer

    def _lock(self) -> None:
        import fcntl  # Not on Windows, and only this method needs it.

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {self.path}; wait for it, or end it first") from None

    def _load(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        for line in content[:whole].splitlines():
            try:
                fields = json.loads(line)
                key = fields.pop("key")
                self._answers[key] = Answer(**fields)
            except (ValueError, TypeError, KeyError, AttributeError):
                self.damaged_lines += 1  # Costs one question asked again; the others are kept.
