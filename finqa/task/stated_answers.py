"""What the annotator of a report wrote as the answer, beside the label: are they the same, and what kind is it?

FinQA has both: a stated answer such as `24%` or `$ 4.26 million`, and the label, which is what the gold program gives.
Where they differ by more than their form, one of the two is wrong, and the label is in doubt.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from finqa.task.answers import normalise

AnswerKind = Literal["per cent", "amount", "yes/no"]

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
_ONE_NUMBER = re.compile(
    r"(?P<minus>-?)\s*(?:us)?[$€£]?\s*(?P<number>\d[\d,]*(?:\.\d+)?|\.\d+)\s*(?P<per_cent>%|per ?cent)?"
    r"\s*(?:thousand|million|billion|trillion|mn?|bn?)?\.?",
    re.ASCII,
)
_YES_NO = re.compile(r"\b(?:yes|no)\b")
_PER_CENT = Decimal(100)
_UNITS = tuple(Decimal(10) ** power for power in (3, 6, 9, -3, -6, -9))
"""Thousand, million and billion, given to either of the two."""
_LABEL_DECIMALS = 5
_ASKS_FOR_PER_CENT = re.compile(
    r"percent|per cent|(?:what|which) %|growth rate|rate of return|return on investment|\broi\b|(?<!current )portion of"
)


def label_in(stated: str) -> str:
    """The label that a stated answer comes to, as text: `12.3%` is 0.123; `$ 1,234 million` is 1234, as pages count.

    Empty where it is more than one number, or none, and no yes or no.
    """
    if isinstance(yes_no := normalise(stated), str):
        return yes_no
    found = _ONE_NUMBER.fullmatch(stated.strip().lower())
    if not found:
        return ""
    value = Decimal(found["number"].replace(",", "")) / (_PER_CENT if found["per_cent"] else 1)
    return f"{'-' if found['minus'] else ''}{value:f}"


def label_disputed(stated: str, label: str) -> bool | None:
    """Whether the stated answer contradicts the label; None where it states no number and no yes or no.

    They agree where some number of the stated answer is the label, rounded or cut to the digits it shows, whatever
    the sign: "decreased by 12%" has none. The label may be a fraction of what is stated in per cent, or the other way
    round, and without a sign of per cent either may be in thousands, millions or billions.
    """
    expected = normalise(label)
    said = stated.strip().lower()
    if not said or expected is None:
        return None
    words = set(_YES_NO.findall(said))
    if isinstance(expected, str):
        return words != {expected} if words or _NUMBER.search(said) else None
    if isinstance(normalise(said), str):
        return True
    numbers = _NUMBER.findall(said)
    if not numbers:
        return None
    return not any(_same(number, expected, scale) for number in numbers for scale in _scales(number, "%" in said))


def answer_kind(stated: str, label: str, question: str) -> AnswerKind:
    """Whether a question asks for a share or a change in per cent, an amount, or yes or no.

    The label tells yes/no. Per cent is what the stated answer has a sign for, or gives as a hundred times the label;
    else the words of the question tell. A ratio ("0.82") is an amount.
    """
    expected = normalise(label)
    if isinstance(expected, str):
        return "yes/no"
    if "%" in stated:
        return "per cent"
    number = stated.strip().lstrip("-")
    alone = _NUMBER.fullmatch(number)
    if (
        alone
        and expected is not None
        and _same(number, expected, _PER_CENT)
        and not _same(number, expected, Decimal(1))
    ):
        return "per cent"
    return "per cent" if _ASKS_FOR_PER_CENT.search(question.lower()) else "amount"


def _scales(number: str, per_cent: bool) -> tuple[Decimal, ...]:
    """What the label may be multiplied by.

    A single digit is near almost any number at some scale, so that it must be near the label itself or its per cent.
    """
    if len(_shown(number).as_tuple().digits) < 2:
        return Decimal(1), _PER_CENT
    return (Decimal(1), _PER_CENT, 1 / _PER_CENT, *(() if per_cent else _UNITS))


def _same(number: str, label: float, scale: Decimal) -> bool:
    """Whether the label times `scale` gives `number` when it is rounded, up or down, to the digits shown."""
    shown, exact = _shown(number), abs(Decimal(repr(label)))
    apart = _unit(shown)
    if _unit(exact) <= Decimal(1).scaleb(-_LABEL_DECIMALS):
        apart += scale * Decimal(5).scaleb(-_LABEL_DECIMALS - 1)  # the label itself is rounded
    return abs(shown - exact * scale) < apart


def _shown(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _unit(number: Decimal) -> Decimal:
    """One of the last digit that is shown."""
    exponent = number.as_tuple().exponent
    return Decimal(1).scaleb(exponent if isinstance(exponent, int) else 0)
