"""A journal of everything that a model was asked and answered, so that nothing is paid for twice: JSON lines.

Three kinds of line, each with the key of its request (a hash of everything that shapes the reply):

- an answer: text, finish_reason, model, limit, tokens;
- a failure: what went wrong with one try. The request is asked again by the next run;
- a run: what the program of an answer gave, where that decides whether the teacher is asked again.

So a run that was killed asks only for what is missing, and a changed prompt or model asks anew. Each answer is on the
disk before the next step uses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finqa.runtime.journal import Journal
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


MOST_TOKENS = 10**12
"""A larger count is no count, and soon beyond what a float can hold."""


def token_count(value: object) -> int:
    """A number of tokens as a server or a journal says it; 0 where it is none."""
    counts = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST_TOKENS
    return int(value) if counts else 0  # pyright: ignore[reportArgumentType]


def request_key(request: Mapping[str, object]) -> str:
    """A hash of the request's body (model, messages, parameters) but its limit, which shapes no finished reply.

    The server's address is no part of it: a model is known by its name.
    """
    shaping = {name: value for name, value in request.items() if name != "max_completion_tokens"}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class AnswerJournal(Journal):
    """The answers, failures and runs of one output file, by request key.

    with AnswerJournal(path) as journal:
        answer = journal.answer(key)
        journal.add_answer(key, answer)
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.paid: list[Answer] = []
        """Every answer there is, also those that a later one under the same key replaced."""
        self._answers: dict[str, Answer] = {}
        self._failures: dict[str, Failure] = {}
        self._runs: dict[str, Run] = {}

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
        self.append({"key": key, **asdict(answer)}, sync=True)

    def add_failure(self, key: str, failure: Failure) -> None:
        self.append({"key": key, "failure": asdict(failure)})

    def add_run(self, key: str, run: Run) -> None:
        self.append({"key": key, "run": asdict(run)})

    def take(self, record: dict[str, Any]) -> None:
        key, entry = record["key"], _entry({name: value for name, value in record.items() if name != "key"})
        if isinstance(entry, Failure):
            self._failures[key] = entry
        elif isinstance(entry, Run):
            self._runs[key] = entry
        else:
            self._answers[key] = entry
            self.paid.append(entry)
            self._failures.pop(key, None)
            self._runs.pop(key, None)  # It was of the answer that this one replaces.


def _entry(fields: dict[str, Any]) -> Answer | Failure | Run:
    if "failure" in fields:
        return Failure(**fields["failure"])
    if "run" in fields:
        return Run(**fields["run"])
    for name in [name for name in fields if name.endswith("_tokens")]:
        fields[name] = token_count(fields[name])
    return Answer(**fields)
