"""A model behind an OpenAI-compatible server as the teacher.

Questions are sent as chat messages (finqa.prompts.teacher_messages), many at once. What comes back goes to the
journal first; the program is then taken out of the text. The key is read from OPENAI_API_KEY and kept nowhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.errors import UserError
from finqa.prompts import extract_code, teacher_messages
from finqa.records import Question
from finqa.worked_examples import WorkedExample
from preprocessing.journal import Answer, Journal, request_key
from preprocessing.progress import Progress
from preprocessing.teachers import Reply

if TYPE_CHECKING:
    from openai import AsyncOpenAI

REFUSED_IN_A_ROW = 20
"""So many failures before the first answer mean that the set-up is wrong, not the questions."""

Request = dict[str, Any]
"""The body of a chat completion request."""


@dataclass(frozen=True)
class OpenAITeacherConfig:
    """How to ask. `model`, `hint`, `max_completion_tokens` and `temperature` shape the reply; the rest does not."""

    model: str = "gpt-5"
    hint: bool = True
    """Whether the prompt ends with the question's gold program."""
    max_completion_tokens: int = 16_000
    """Limit on what the model writes, its reasoning included: thousands of tokens in a reasoning model."""
    temperature: float | None = None
    """Sent only where it is set: reasoning models refuse it."""
    base_url: str | None = None
    """Address of a compatible server, e.g. http://localhost:8000/v1; OpenAI's own where it is None."""
    max_concurrent: int = 32
    """Requests under way at a time."""
    max_retries: int = 8
    """Times the client asks again after 408, 409, 429, 5xx or a broken connection, waiting longer each time."""
    timeout_s: float = 600.0
    """Time for one reply."""

    def __post_init__(self) -> None:
        for name in ("max_completion_tokens", "max_concurrent"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_retries < 0:
            raise UserError(f"max_retries must be 0 or more, not {self.max_retries}")
        if self.timeout_s <= 0:
            raise UserError(f"timeout_s must be above 0, not {self.timeout_s}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise UserError(f"temperature must be from 0 to 2, not {self.temperature}")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url must start with http:// or https://, not {self.base_url!r}")


@dataclass(frozen=True)
class RowError:
    """Why a request got no answer. It is not in the journal, so the next run asks again."""

    kind: str
    message: str


class OpenAITeacher:
    """Asks the model for what the journal does not hold yet.

    Args:
        config: How to ask.
        examples: Worked examples, shown before each question.
        journal_path: Where answers are kept (see preprocessing.journal).
    """

    def __init__(self, config: OpenAITeacherConfig, examples: tuple[WorkedExample, ...], journal_path: Path) -> None:
        self.config = config
        self.examples = examples
        self.journal_path = journal_path
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.asked = 0
        self.from_journal = 0

    @property
    def settings(self) -> dict[str, object]:
        return {"teacher": "openai", **asdict(self.config)}

    def usage(self) -> str:
        return (
            f"{self.asked} asked, {self.from_journal} from the journal, "
            f"{self.prompt_tokens:,} tokens read, {self.completion_tokens:,} written"
        )

    def request(self, question: Question) -> Request:
        """Everything that shapes the reply to `question`, as it is sent."""
        body: Request = {
            "model": self.config.model,
            "messages": teacher_messages(question, self.examples, hint=self.config.hint),
            "max_completion_tokens": self.config.max_completion_tokens,
        }
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        return body

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        requests = {request_key(request): request for request in map(self.request, questions)}
        with Journal(self.journal_path) as journal:
            if journal.damaged_lines:
                print(f"{journal.path}: {journal.damaged_lines} damaged lines left out", flush=True)
            limit = self.config.max_completion_tokens
            missing = {key: request for key, request in requests.items() if journal.needs(key, limit)}
            self.from_journal += len(requests) - len(missing)
            errors = asyncio.run(self._ask_all(missing, journal)) if missing else {}
            return [self._reply(request_key(self.request(q)), journal, errors) for q in questions]

    def _reply(self, key: str, journal: Journal, errors: dict[str, RowError]) -> Reply:
        answer = journal.get(key)
        if answer is None or key in errors:
            return Reply(error_kind=errors[key].kind, error_message=errors[key].message)
        return reply_from(answer)

    async def _ask_all(self, requests: dict[str, Request], journal: Journal) -> dict[str, RowError]:
        """Fill the journal, `max_concurrent` requests at a time; returns what failed, by key."""
        errors: dict[str, RowError] = {}
        progress = Progress("teacher", len(requests))
        queue = iter(requests.items())

        async def worker(client: AsyncOpenAI) -> None:
            for key, request in queue:
                result = await ask(client, request)
                if isinstance(result, RowError):
                    errors[key] = result
                    if len(errors) == progress.done + 1 >= REFUSED_IN_A_ROW:
                        raise UserError(f"the first {len(errors)} requests all failed: {result.message}")
                else:
                    journal.add(key, result)
                    self.asked += 1
                    self.prompt_tokens += result.prompt_tokens
                    self.completion_tokens += result.completion_tokens
                progress.advance(note=f"{self.completion_tokens:,} tokens written, {len(errors)} failed")

        try:
            async with self._client() as client:
                await run_together([lambda: worker(client)] * min(self.config.max_concurrent, len(requests)))
        finally:
            progress.close()
        return errors

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key:
            raise UserError(
                "OPENAI_API_KEY is not set; export it (any value does for a server of your own), "
                "or compile the gold programs with --teacher program"
            )
        return AsyncOpenAI(
            api_key=key,
            base_url=self.config.base_url,
            max_retries=self.config.max_retries,
            timeout=self.config.timeout_s,
        )


async def run_together(workers: Sequence[Callable[[], Any]]) -> None:
    """Run all until they are done; the first exception ends the others and is raised itself, not as a group."""
    tasks = [asyncio.ensure_future(worker()) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ask(client: AsyncOpenAI, request: Request) -> Answer | RowError:
    """One request, asked again by the client where that helps.

    Raises UserError for what every other request would meet as well.
    """
    import openai
    from openai.types.chat import ChatCompletion

    try:
        completion = await client.chat.completions.create(**request)
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise UserError(f"the server refuses the key in OPENAI_API_KEY: {one_line(error)}") from error
    except openai.NotFoundError as error:
        raise UserError(f"no model {request['model']!r} at {client.base_url}: {one_line(error)}") from error
    except openai.RateLimitError as error:
        if error.code == "insufficient_quota":
            raise UserError(f"the account has no quota left: {one_line(error)}") from error
        return RowError("teacher_rate_limit", one_line(error))
    except openai.APITimeoutError as error:
        return RowError("teacher_timeout", one_line(error))
    except openai.APIConnectionError as error:
        return RowError("teacher_connection", f"{client.base_url}: {one_line(error.__cause__ or error)}")
    except openai.APIStatusError as error:
        return RowError("teacher_refused" if error.status_code < 500 else "teacher_server", one_line(error))
    except (openai.OpenAIError, ValueError) as error:  # ValueError: the body is not JSON.
        return RowError("teacher_malformed", one_line(error))

    # The client does not check what a server sends: a page of HTML arrives as text, a missing field as None.
    if not isinstance(completion, ChatCompletion) or not completion.choices or not completion.choices[0].message:
        return RowError("teacher_malformed", f"the server sent no chat completion: {str(completion)[:200]!r}")
    choice, usage = completion.choices[0], completion.usage
    return Answer(
        text=storable(choice.message.content or choice.message.refusal or ""),
        finish_reason="refusal" if choice.message.refusal else str(choice.finish_reason or ""),
        model=str(completion.model or request["model"]),
        prompt_tokens=(usage.prompt_tokens or 0) if usage else 0,
        completion_tokens=(usage.completion_tokens or 0) if usage else 0,
        limit=request["max_completion_tokens"],
    )


def reply_from(answer: Answer) -> Reply:
    """The program in an answer. A reply that was cut off or refused has none, whatever its text looks like."""
    if answer.finish_reason != "stop":
        reason = answer.finish_reason or "none"
        return Reply(
            finish_reason=answer.finish_reason,
            error_kind=f"teacher_{reason}",
            error_message=f"finish_reason is {reason}: {one_line(answer.text)[-200:]}",
        )
    code = extract_code(answer.text)
    if not code.strip():
        return Reply(finish_reason="stop", error_kind="teacher_empty", error_message="the reply holds no program")
    return Reply(code=code, finish_reason="stop")


def one_line(error: object) -> str:
    return " ".join(storable(str(error)).split())[:500]


def storable(text: str) -> str:
    """Text without the halves of surrogate pairs that JSON can carry and a file cannot."""
    return text.encode(errors="replace").decode()
