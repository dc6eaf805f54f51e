"""How the OpenAI teacher is asked, and the flags that say so."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from finqa.runtime.errors import UserError

SystemRole = Literal["system", "developer", "user"]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


@dataclass(frozen=True)
class OpenAITeacherConfig:
    """How to ask. The fields down to `system_role` shape the replies; the rest does not."""

    model: str = "gpt-5"
    hint: bool = True
    """Whether the prompt ends with the question's gold program."""
    attempts: int = 1
    """Times a question is put to the teacher, with what its last program gave, until the program gives the label.

    Once by default, as in the published run: with the hint most programs that miss the label meet a doubtful label,
    and without it more attempts cost more and keep programs that came out right by luck (see Conversation)."""
    max_completion_tokens: int = 16_000
    """Limit on what the model writes, its reasoning included: thousands of tokens in a reasoning model. A reply that
    it cuts off is asked for once more with twice the limit."""
    temperature: float | None = None
    """Sent only where it is set: reasoning models refuse it."""
    reasoning_effort: ReasoningEffort | None = None
    """Sent only where it is set: it decides how much a reasoning model writes, and costs."""
    system_role: SystemRole = "system"
    """Who gives the instruction; `user` puts it before the first question, for models without a system role."""
    base_url: str | None = None
    """Address of a compatible server, e.g. http://localhost:8000/v1; OpenAI's own where it is None."""
    max_concurrent: int = 32
    """Requests under way at a time, at most; fewer where the server asks to slow down."""
    max_retries: int = 10
    """Times a request is sent again after 408, 409, 429, 5xx, a broken connection or a time-out: over four minutes."""
    timeout_s: float = 600.0
    """Time for one reply."""
    max_cost: float | None = None
    """Dollars after which no request is sent, what earlier runs paid for the same output included."""
    prices: Path | None = None
    """A table of prices beside the shipped one (preprocessing.teacher.prices)."""

    def __post_init__(self) -> None:
        for name in ("attempts", "max_completion_tokens", "max_concurrent"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_retries < 0:
            raise UserError(f"max_retries must be 0 or more, not {self.max_retries}")
        if not 0 < self.timeout_s < math.inf:
            raise UserError(f"timeout_s must be above 0, not {self.timeout_s}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise UserError(f"temperature must be from 0 to 2, not {self.temperature}")
        if self.max_cost is not None and not 0 < self.max_cost < math.inf:
            raise UserError(f"max_cost must be above 0, not {self.max_cost}")
        if self.base_url is not None:
            _check_address(self.base_url)


def _check_address(url: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise UserError(f"base_url must start with http:// or https://, not {url!r}")
    parts = urlsplit(url)
    if parts.username is not None or parts.query:
        raise UserError(
            f"base_url must hold no user, password or query, since it is written to the manifest (server "
            f"{parts.hostname}); a key comes from OPENAI_API_KEY alone"
        )


def api_key() -> str:
    """The key, from OPENAI_API_KEY. Raises UserError where there is none."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(
            "OPENAI_API_KEY is not set; export it (any value does for a server of your own), "
            "or compile the gold programs with --teacher program"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError("OPENAI_API_KEY holds a space or a character that no key has; export it again")
    return key


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of OpenAITeacherConfig."""
    default = OpenAITeacherConfig()
    group = parser.add_argument_group("the OpenAI teacher")
    group.add_argument("--model", default=default.model, help="(default: %(default)s)")
    group.add_argument(
        "--base-url",
        default=os.environ.get("OPENAI_BASE_URL") or None,
        help="address of a compatible server, e.g. http://localhost:8000/v1 (default: OPENAI_BASE_URL, or OpenAI)",
    )
    group.add_argument(
        "--hint",
        action=argparse.BooleanOptionalAction,
        default=default.hint,
        help="put the gold program into the prompt (default: yes)",
    )
    group.add_argument(
        "--attempts",
        type=int,
        default=default.attempts,
        help="ask again where the program fails or misses the label, up to N times in all (default: %(default)s)",
    )
    group.add_argument(
        "--max-completion-tokens",
        type=int,
        default=default.max_completion_tokens,
        help="limit of a reply, its reasoning included; once doubled where it cuts a reply off (default: %(default)s)",
    )
    group.add_argument("--temperature", type=float, help="sent only if given: reasoning models refuse it")
    group.add_argument("--reasoning-effort", choices=get_args(ReasoningEffort), help="sent only if given")
    group.add_argument(
        "--system-role",
        choices=get_args(SystemRole),
        default=default.system_role,
        help="who gives the instruction; user for models without a system role (default: %(default)s)",
    )
    group.add_argument(
        "--max-concurrent",
        type=int,
        default=default.max_concurrent,
        help="requests at a time, at most (default: %(default)s)",
    )
    group.add_argument(
        "--max-retries", type=int, default=default.max_retries, help="of one request (default: %(default)s)"
    )
    group.add_argument(
        "--timeout-s", type=float, default=default.timeout_s, help="seconds for one reply (default: %(default)s)"
    )
    group.add_argument(
        "--max-cost", type=float, metavar="DOLLARS", help="stop before more is spent, earlier runs included"
    )
    group.add_argument(
        "--prices", type=Path, metavar="FILE", help="prices beside those of preprocessing/teacher/prices.json"
    )


def config_from(args: argparse.Namespace) -> OpenAITeacherConfig:
    """The configuration that the flags give; raises UserError for a value out of range."""
    return OpenAITeacherConfig(**{field.name: getattr(args, field.name) for field in fields(OpenAITeacherConfig)})
