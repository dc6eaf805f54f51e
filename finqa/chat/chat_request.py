"""One request to a chat-completions server, and what its outcome means.

There are four outcomes: an answer; a fault that may pass, so that the request is sent again; a fault of this request
alone (a 400, a refused content); and a UserError for what every other request would meet as well (a bad key, an
unknown model, an exhausted quota).
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from finqa.chat.answer_journal import Answer, Failure, token_count
from finqa.chat.config import ChatConfig, LimitName
from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    import openai

Request = dict[str, Any]
"""The body of a chat completion request."""

LIMIT_NAMES = get_args(LimitName)
"""Names of a reply's limit; the first is the one that a request has until it is sent."""
PASSING_STATUS = (408, 409, 425, 429)
"""Client errors that asking again can mend; so can any 5xx."""
NO_MONEY = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "access_terminated"}
OF_EVERY_REQUEST = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
"""Codes of a 400 that blame the parameters, which are the same in all requests."""
_ABOUT_ROLES = re.compile(r"\broles?\b|\bsystem (role|message|prompt)|user and assistant", re.IGNORECASE)
"""In the message of a chat template that takes no system turn."""
MALFORMED_TRIES = 2
"""A reply that is no chat completion may have been paid for: it is asked for once more, not --max-retries times."""


_UNSAID = ("", "null", "none", "unknown", "unspecified", "finish-reason-unspecified")
_CUT_OFF = re.compile(r"length|max.*token|token.*limit|truncat")
_NOT_WHOLE = re.compile(
    r"filter|safety|refus|block|recitation|prohibit|spii|toxic|harm|error|fail|abort|cancel|timeout|tool|function|"
    r"language|malformed|pause|incomplete|interrupt|other"
)
LARGER_LIMIT = 2
"""A reply that was cut off is asked for once more with so many times the limit."""


@dataclass(frozen=True)
class Wanted:
    """A request that the journal holds no answer to yet."""

    key: str
    request: Request
    cut: Answer | None = None
    """An answer to it that a smaller limit cut off."""

    @property
    def limit(self) -> int:
        return self.request["max_completion_tokens"]

    @property
    def characters(self) -> int:
        return sum(len(message["content"]) for message in self.request["messages"])


@dataclass(frozen=True)
class Fault:
    """A try that got no answer."""

    failure: Failure
    tries: float = 1
    """Times the request may be sent in all, by this kind of fault: inf where only --max-retries limits it."""
    retry_after_s: float | None = None
    limited: bool = False
    """Whether the server asks to slow down."""
    stops: str = ""
    """What every other request would meet as well, unless one of them was answered."""


async def send(client: openai.AsyncOpenAI, request: Request, timeout_s: float) -> Answer | Fault:
    """Send a request once. Raises UserError for what every other request would meet as well."""
    import openai

    try:
        async with asyncio.timeout(timeout_s):
            response = await client.chat.completions.with_raw_response.create(**request)
    except (openai.APITimeoutError, TimeoutError):
        return Fault(Failure("teacher-timeout", f"no reply within {timeout_s:g} s (--timeout-s)"), tries=math.inf)
    except openai.APIConnectionError as error:
        message = f"{client.base_url}: {one_line(error.__cause__ or error)}"
        return Fault(Failure("teacher-connection", message), tries=math.inf)
    except openai.APIStatusError as error:
        return status_fault(error, request["model"], str(client.base_url))
    except openai.OpenAIError as error:
        return Fault(Failure("teacher-malformed", one_line(error)), tries=MALFORMED_TRIES)
    limit = next(request[name] for name in LIMIT_NAMES if name in request)
    outcome = answer_from(_json(response.text), limit, request["model"])
    return Fault(outcome, tries=MALFORMED_TRIES) if isinstance(outcome, Failure) else outcome


def request_of(config: ChatConfig, messages: Sequence[Mapping[str, str]]) -> Request:
    """The request that puts these messages, of which the first is the system's; without its limit."""
    system, *turns = messages
    if config.system_role == "user":
        first = {**turns[0], "content": f"{system['content']}\n\n{turns[0]['content']}"}
        turns = [first, *turns[1:]]
    else:
        turns = [{**system, "role": config.system_role}, *turns]
    request: Request = {"model": config.model, "messages": turns}
    for name in ("temperature", "reasoning_effort"):
        if getattr(config, name) is not None:
            request[name] = getattr(config, name)
    return request


def shown(request: Request, limit_name: LimitName) -> str:
    """A request as a reader sees it: its messages, then its settings as they are sent."""
    prompt = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in request["messages"])
    others = as_sent(request, limit_name)
    del others["messages"]
    return f"{prompt}\n\n{json.dumps(others)}"


def as_sent(request: Request, limit_name: LimitName) -> Request:
    """The request with its limit under the name that the server takes."""
    return {limit_name if name == LIMIT_NAMES[0] else name: value for name, value in request.items()}


def refuses_limit_name(fault: Answer | Fault) -> bool:
    """Whether a server does not know max_completion_tokens, as some compatible ones do not."""
    if isinstance(fault, Answer) or fault.failure.kind != status_kind(400):
        return False
    return LIMIT_NAMES[0] in fault.failure.message


def status_fault(error: openai.APIStatusError, model: str, server: str) -> Fault:
    """What a status of 4xx or 5xx means; raises UserError where it stops the run."""
    # A compatible server may have anything there.
    status, codes, message = error.status_code, {str(error.code), str(error.type)}, one_line(error)
    if codes & NO_MONEY or status == 402:
        raise UserError(f"the account has no quota left: {message}") from error
    refused = f"the server refuses the key in OPENAI_API_KEY: {message}"
    if status == 401:
        raise UserError(refused) from error
    if status == 403:  # Some servers say so of one request's content.
        return Fault(Failure("teacher-forbidden", message), stops=refused)
    if status == 404 or "model_not_found" in codes:
        raise UserError(f"no model {model!r} at {server}: {message}") from error
    if codes & OF_EVERY_REQUEST:
        stops = f"the server refuses a parameter of every request: {message}"
        return Fault(Failure("teacher-bad-request", message), stops=stops)
    if status == 400 and _ABOUT_ROLES.search(message):
        message += "; a model without a system role needs --system-role user"
    may_pass = status in PASSING_STATUS or status >= 500
    asked = error.response.headers.get("x-should-retry")
    tries = math.inf if may_pass and asked != "false" else 1
    wait = retry_after_s(error.response.headers)
    return Fault(Failure(status_kind(status), message), tries, wait, limited=status == 429)


def status_kind(status: int) -> str:
    """The error kind of a row whose request ended with this status."""
    if status == 429:
        return "teacher-rate-limit"
    return "teacher-server" if status >= 500 else "teacher-bad-request"


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if 0 <= seconds < math.inf:
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def answer_from(body: object, limit: int, asked: str, batch: str = "") -> Answer | Failure:
    """The answer in the body of a chat completion; a failure where it is none. Nothing about `body` is believed."""
    choices = _field(body, "choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = _field(choice, "message")
    if not isinstance(message, dict):
        return Failure("teacher-malformed", f"the server sent no chat completion: {one_line(body)[:200]!r}")
    usage, refusal = _field(body, "usage"), message.get("refusal")
    read, written = (_field(usage, f"{kind}_tokens_details") for kind in ("prompt", "completion"))
    return Answer(
        text=storable(_content(message.get("content")) or _content(refusal)),
        finish_reason="refusal" if refusal else _text(_field(choice, "finish_reason")),
        model=_text(_field(body, "model")),
        prompt_tokens=token_count(_field(usage, "prompt_tokens")),
        completion_tokens=token_count(_field(usage, "completion_tokens")),
        limit=limit,
        cached_tokens=token_count(_field(read, "cached_tokens")),
        reasoning_tokens=token_count(_field(written, "reasoning_tokens")),
        batch=batch,
        asked=asked,
    )


def next_limit(answer: Answer | None, limit: int) -> int:
    """The limit to ask with next: `limit` at first, a larger one once after it cut the reply off; 0 for no more."""
    if answer is None:
        return limit
    if how_it_ended(answer) != "length":
        return 0
    return next((larger for larger in (limit, limit * LARGER_LIMIT) if answer.limit < larger), 0)


def how_it_ended(answer: Answer) -> str:
    """The finish reason as OpenAI says it: `stop` for a whole reply, whatever a compatible server calls that.

    Others are in lower case with hyphens. A server that gives no reason ended the reply itself, unless the tokens are
    used up.
    """
    reason = re.sub(r"[^a-z0-9]+", "-", answer.finish_reason.lower()).strip("-")
    if _CUT_OFF.search(reason) or (reason in _UNSAID and 0 < answer.limit <= answer.completion_tokens):
        return "length"
    return reason[:40] if _NOT_WHOLE.search(reason) else "stop"


def one_line(error: object) -> str:
    """A server's message in one line of 500 characters at most. Servers quote a key that they refuse, or part of it."""
    text, response = str(error), getattr(error, "response", None)
    if response is not None and " - " not in text:  # the client quotes bodies of OpenAI's own shape alone
        with contextlib.suppress(RuntimeError):  # the body could not be read
            text += f" - {response.text}"
    line = " ".join(storable(text).split())
    return re.sub(r"//[^/\s@]+@", "//[user]@", re.sub(r"\bsk-[\w*.-]{4,}", "[key]", line))[:500]


def storable(text: str) -> str:
    """Text without the key, and without the halves of surrogate pairs that JSON can carry and a file cannot."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if len(key) >= 8:
        text = text.replace(key, "[key]")
    return text.encode(errors="replace").decode()


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _field(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _content(value: object) -> str:
    """The text of a message: a string, or a list of parts, of which reasoning is none."""
    if isinstance(value, list):
        return "".join(map(_content, value))
    if isinstance(value, dict):
        kind = str(value.get("type"))
        parts = [value.get(name) for name in ("text", "value", "content", "refusal")]
        return "" if "think" in kind or "reason" in kind else _content(next(filter(None, parts), None))
    return _text(value)
