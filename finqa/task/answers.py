"""When is an answer right? One function, three named rules.

- `strict` filters the teacher's programs and is the headline figure. It accepts what FinQA's official rule
  (round(result, 5) equals the label) accepts, and the float noise that a rewritten program brings.
- `relaxed` forgives per cent for a fraction and a fraction for per cent, and a rounded result: a relative error of at
  most 1e-3 for the result, a hundredth or a hundred times of it. A label of zero has no relative error.
- `reported` is the loose rule behind published figures of this set-up; it is there to compare with them alone.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from numbers import Real
from typing import Literal

Rule = Literal["strict", "relaxed", "reported"]
RULES: tuple[Rule, ...] = ("strict", "relaxed", "reported")

_NUMBER = re.compile(r"[+-]?(\d[\d,]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
_YES_NO = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}
_REPORTED_SCALES = (1.0, 1e-2, 1e-3, 1e-6, 1e-9)


def match(actual: object, expected: object, rule: Rule = "strict") -> bool:
    """Whether `actual`, a program's result, is the label `expected` under `rule`.

    Both may be numbers (numpy scalars, Decimal and Fraction included), numbers as strings (from a CSV), bools or
    yes/no. A bool or yes/no matches only yes/no; None, containers, NaN and infinities match nothing.

    Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown answer rule {rule!r}; one of {', '.join(RULES)}")
    a, e = normalise(actual), normalise(expected)
    if a is None or e is None:
        return False
    if isinstance(a, str) or isinstance(e, str):
        return a == e
    if rule == "reported":
        return any(abs(e - a * scale) < 1e-3 for scale in _REPORTED_SCALES)
    if abs(a - e) <= max(5.01e-6, 1e-6 * abs(e)):
        return True
    if rule == "strict" or e == 0:
        return False
    return any(abs(value - e) <= 1e-3 * abs(e) for value in (a, a / 100, a * 100))


def normalise(answer: object) -> float | Literal["yes", "no"] | None:
    """A finite float, "yes", "no", or None for anything that is no answer."""
    if hasattr(answer, "item") and getattr(answer, "shape", None) == ():
        answer = answer.item()  # a numpy scalar  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    if isinstance(answer, str):
        text = answer.strip().lower()
        if text in _YES_NO:
            return _YES_NO[text]  # pyright: ignore[reportReturnType]
        if not _NUMBER.fullmatch(text):
            return None
        answer = text.replace(",", "")
    elif not isinstance(answer, Real | Decimal):  # int, float, Fraction, and what numpy has no Python number for
        return None
    try:
        value = float(answer)
    except (OverflowError, ValueError):
        return None  # an int beyond the range of a float
    return value if math.isfinite(value) else None
