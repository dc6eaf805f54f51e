"""How a model is asked, and the flags that say so."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from finqa.runtime.command_line import check_bounds, flag, given
from finqa.runtime.errors import UserError

SystemRole = Literal["system", "developer", "user"]
LimitName = Literal["max_completion_tokens", "max_tokens"]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
LONGEST_TIMEOUT_S = 86_400.0


@dataclass(frozen=True)
class ChatConfig:
    """How to ask. The fields down to `system_role` shape the replies; the rest does not."""

    model: str = flag("gpt-5", metavar="NAME")
    """The model that is asked."""
    max_completion_tokens: int = flag(16_000, metavar="TOKENS", least=1)
    """Limit on what the model writes, its reasoning included: thousands of tokens in a reasoning model. A reply that
    it cuts off is asked for once more with twice the limit."""
    limit_name: LimitName = flag("max_completion_tokens")
    """How the server calls that limit; `max_tokens` is tried by itself where a server refuses the other name."""
    temperature: float | None = flag(None, least=0, most=2)
    """Sent only where it is set: reasoning models refuse it."""
    reasoning_effort: ReasoningEffort | None = flag(None)
    """Sent only where it is set: it decides how much a reasoning model writes, and costs."""
    system_role: SystemRole = flag("system")
    """Who gives the instruction; `user` puts it before the first question, for models without a system role."""
    base_url: str | None = flag(None, metavar="URL", shown="OPENAI_BASE_URL, or OpenAI")
    """Address of a compatible server, e.g. http://localhost:8000/v1; OpenAI's own where it is None."""
    max_concurrent: int = flag(32, metavar="REQUESTS", least=1)
    """Requests under way at a time, at most; fewer where the server asks to slow down."""
    max_retries: int = flag(10, least=0)
    """Times a request is sent again after 408, 409, 429, 5xx, a broken connection or a time-out: over four minutes."""
    timeout_s: float = flag(600.0, metavar="SECONDS", above=0, most=LONGEST_TIMEOUT_S)
    """Time for one reply."""
    max_cost: float | None = flag(None, metavar="DOLLARS", above=0)
    """Dollars after which no request is sent, what earlier runs paid for the same output included."""
    prices: Path | None = flag(None)
    """A table of prices beside the shipped one (finqa/chat/prices.json)."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.base_url is not None:
            check_address("base_url", self.base_url, "; a key comes from OPENAI_API_KEY alone")
            if not re.match(r"https?://[^/]", self.base_url, re.IGNORECASE):
                raise UserError(f"base_url must start with http:// or https:// and a server, not {self.base_url!r}")


def check_address(name: str, url: str, remedy: str = "") -> None:
    """Raises UserError, which does not repeat it, for an address that holds a user, a password, a query or a fragment.

    Addresses are written to manifests, journals and messages.
    """
    if any(sign in url for sign in "@?#") or not url.isprintable():
        raise UserError(f"{name} must hold no user, password, query or fragment, since it is written down{remedy}")


def api_key(otherwise: str = "") -> str:
    """The key, from OPENAI_API_KEY. Raises UserError where there is none; `otherwise` is what to do without one."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(f"OPENAI_API_KEY is not set; export it (any value does for a server of your own){otherwise}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError("OPENAI_API_KEY holds a space or a character that no key has; export it again")
    return key


Chat = TypeVar("Chat", bound=ChatConfig)


def config_from(args: argparse.Namespace, kind: type[Chat]) -> Chat:
    """The configuration of this kind that the flags give; raises UserError for a value out of range."""
    server: dict[str, Any] = {"base_url": os.environ.get("OPENAI_BASE_URL") or None}
    return kind(**server | given(kind, args))
