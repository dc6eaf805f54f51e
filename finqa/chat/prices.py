"""What a teacher costs: the table of prices, what was spent, and the estimate before the first request.

prices.json beside this file has list prices in dollars per million tokens, with a date: check them before a large
run. `--prices FILE` adds models or overrides fields, in the same form:

    {"models": {"my-model": {"input": 0.5, "cached_input": 0.1, "output": 2.0, "batch": 0.5}}}

`cached_input` is `input` where it is left out, and `batch`, the share of the price that a batched request costs, is 1.
A model that is in no table is counted in tokens alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finqa.chat.answer_journal import Answer, AnswerJournal
from finqa.chat.config import ChatConfig
from finqa.runtime.errors import UserError

SHIPPED_PRICES = Path(__file__).with_name("prices.json")
CHARACTERS_A_TOKEN = 3.3
"""Characters in a token of FinQA's pages, too few rather than too many; measured where a journal has answers."""
TOKENS_A_REPLY = 1_000
"""Assumed of a reply, its reasoning included, until a journal has answers to measure it from."""
HIGHEST_PRICE = 1_000_000
"""Dollars per million tokens: a dollar a token."""
_FIELDS = ("input", "cached_input", "output", "batch")
_COUNTED = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
_DATED = re.compile(r"-\d{4}-?\d{2}-?\d{2}$")


@dataclass(frozen=True)
class Price:
    """Prices of one model, in dollars per million tokens."""

    input: float
    cached_input: float
    output: float
    batch: float = 1.0
    """Share of the price that a request in a batch costs."""

    def of(self, answer: Answer) -> float:
        """Dollars for one answer. Reasoning tokens are among the completion tokens, cached among the prompt's."""
        cached = min(answer.cached_tokens, answer.prompt_tokens)
        millionths = (
            (answer.prompt_tokens - cached) * self.input
            + cached * self.cached_input
            + answer.completion_tokens * self.output
        )
        return millionths / 1e6 * (self.batch if answer.batch else 1.0)


def price_of(model: str, extra: Path | None = None) -> Price | None:
    """The price of `model`, also under its dated name (`gpt-5-2025-08-07`); None where no table has it.

    Raises UserError where a table cannot be read.
    """
    shipped, added = _models_in(SHIPPED_PRICES), _models_in(extra) if extra else {}
    for name in (model, _DATED.sub("", model)):
        if name in shipped or name in added:
            fields = {**shipped.get(name, {}), **added.get(name, {})}
            missing = [field for field in ("input", "output") if field not in fields]
            if missing:
                raise UserError(f"{extra}: {name!r} lacks {' and '.join(missing)}, in dollars per million tokens")
            return Price(**{"cached_input": fields["input"], **fields})
    return None


def _models_in(path: Path) -> dict[str, dict[str, float]]:
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        for name, fields in models.items():
            for field, value in fields.items():
                if field not in _FIELDS:
                    raise UserError(
                        f"{path}: {name!r} has an unknown field {field!r}; it may have {', '.join(_FIELDS)}"
                    )
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= HIGHEST_PRICE:
                    raise UserError(f"{path}: {field} of {name!r} must be from 0 to {HIGHEST_PRICE:,}, not {value!r}")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); --prices names a file like {SHIPPED_PRICES.name}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{path} is no table of prices; it must look like {{"models": {{"name": {{"input": 1.0, "output": 2.0}}}}}}'
        ) from None
    return models


class Spending:
    """Tokens and dollars so far, over all splits of a command, and the most that may be spent.

    What earlier runs paid (`before`: the answers in the journals, each with its model's price) counts against
    `max_cost` too, so a run that is killed and started again keeps to it.
    """

    def __init__(
        self,
        price: Price | None,
        max_cost: float | None = None,
        before: Iterable[tuple[Price | None, Answer]] = (),
    ) -> None:
        self.price = price
        self.max_cost = max_cost
        costs = [(own, own.of(answer)) for own, answer in before if own is not None]
        self.spent_before = sum(cost for _, cost in costs)
        self._alike_before = [cost for own, cost in costs if own == price]
        self.answers = 0
        self.tokens: Counter[str] = Counter()
        """Counts by the names of Answer's fields; prompt tokens include cached ones, completion tokens reasoning."""
        self.dollars = 0.0
        self.assumed_dollars = 0.0
        """Cost of one request, until there are answers to take the mean of."""

    def add(self, answer: Answer) -> None:
        self.answers += 1
        for field in _COUNTED:
            self.tokens[field] += getattr(answer, field)
        self.dollars += self.price.of(answer) if self.price else 0.0

    @property
    def total(self) -> float:
        """Dollars, with what earlier runs paid."""
        return self.spent_before + self.dollars

    def allows(self, under_way: int) -> bool:
        """Whether one more request may be sent while `under_way` are: by the mean cost so far it stays affordable.

        Before the first answer one request is let in wherever there is money left, to see what it costs.
        """
        if self.max_cost is None:
            return True
        known = len(self._alike_before) + self.answers
        if not known and not under_way:
            return self.total < self.max_cost
        mean = (sum(self._alike_before) + self.dollars) / known if known else self.assumed_dollars
        return self.total + (under_way + 1) * mean <= self.max_cost

    def used_up(self, unasked: int, of: int, what: str) -> str:
        """The message where `max_cost` left `unasked` of the items without an answer."""
        earlier = f", ${self.spent_before:.2f} of it by earlier runs" if self.spent_before else ""
        return (
            f"--max-cost {self.max_cost:g} is reached: ${self.total:.2f} spent{earlier}; {unasked} of {of} {what} are "
            "not settled; to go on, give the same command a larger --max-cost"
        )

    def __str__(self) -> str:
        tokens = (
            f"{self.tokens['prompt_tokens']:,} tokens read ({self.tokens['cached_tokens']:,} cached), "
            f"{self.tokens['completion_tokens']:,} written ({self.tokens['reasoning_tokens']:,} reasoning)"
        )
        return f"{tokens}, ${self.dollars:.2f}" if self.price else tokens

    def facts(self) -> Mapping[str, object]:
        """The figures as a manifest has them."""
        return {field: self.tokens[field] for field in _COUNTED} | {"dollars": self.dollars if self.price else None}


def spending_of(config: ChatConfig, journals: Iterable[Path]) -> Spending:
    """What the journals' answers cost so far, under `max_cost`.

    Raises UserError where `max_cost` is set and the model's price is unknown.
    """
    price = price_of(config.model, config.prices)
    if config.max_cost is not None and price is None:
        raise UserError(
            f"--max-cost needs a price and {config.model!r} has none; give it with --prices FILE "
            "(finqa/chat/prices.json shows the form)"
        )
    prices: dict[str, Price | None] = {"": price}  # Journals of the first form do not name the model.
    paid = [answer for path in journals for answer in AnswerJournal(path).read().paid]
    prices |= {name: price_of(name, config.prices) for name in {answer.asked for answer in paid} if name}
    return Spending(price, config.max_cost, [(prices[answer.asked], answer) for answer in paid])


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked, and what it is going to cost."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int
    """If every reply used its whole limit."""
    measured: int
    """Number of answers that the tokens of a reply are the mean of; 0 where they are assumed."""
    price: Price | None
    batch: bool = False

    @property
    def dollars(self) -> float | None:
        return self._cost(self.completion_tokens)

    def _cost(self, completion_tokens: int) -> float | None:
        if self.price is None:
            return None
        return self.price.of(
            Answer("", "", "", self.prompt_tokens, completion_tokens, batch="yes" if self.batch else "")
        )

    def __str__(self) -> str:
        each = round(self.completion_tokens / self.requests) if self.requests else 0
        source = f"the mean of {self.measured:,} so far" if self.measured else "assumed"
        tokens = (
            f"{self.requests:,} requests, about {self.prompt_tokens:,} tokens to read and "
            f"{self.completion_tokens:,} to write ({each:,} a reply, {source})"
        )
        if self.price is None:
            return f"{tokens}; no price is known for the model (--prices)"
        most = self._cost(self.most_completion_tokens)
        day = json.loads(SHIPPED_PRICES.read_text())["date"]
        return (
            f"{tokens}, about ${self.dollars:.2f}; at most ${most:.2f} if every reply used its whole limit; list prices"
            f" of {day}, to be checked"
        )


def estimate(
    prompts: Iterable[tuple[int, int]],
    answered: Iterable[tuple[int, Answer]],
    price: Price | None,
    batch: bool = False,
) -> Estimate:
    """What requests will cost.

    Args:
        prompts: Characters and limit of each request that is to be sent.
        answered: Characters of requests like them, with their answers, to measure from.
        price: None counts tokens alone.
        batch: Whether they are sent as a batch.
    """
    sizes = list(prompts)
    known = [(characters, answer) for characters, answer in answered if answer.prompt_tokens]
    read = sum(answer.prompt_tokens for _, answer in known)
    ratio = sum(characters for characters, _ in known) / read if read else CHARACTERS_A_TOKEN
    written = sum(answer.completion_tokens for _, answer in known) / len(known) if known else TOKENS_A_REPLY
    limits = [limit for _, limit in sizes]
    return Estimate(
        requests=len(sizes),
        prompt_tokens=round(sum(characters for characters, _ in sizes) / ratio),
        completion_tokens=round(sum(min(written, limit) for limit in limits)),
        most_completion_tokens=sum(limits),
        measured=len(known),
        price=price,
        batch=batch,
    )
