"""The invented metrics: nonword names of equal token length, drawn at random for formulas over three operands.

The operands are three cells of a page's table: `a`, a row in the later of two years; `b`, the same row in the earlier
one; `c`, another row in the later one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from random import Random
from typing import Literal

from finqa.runtime.errors import UserError
from finqa.task.program_compiler import literal

Kind = Literal["A", "B", "known", "defined"]
SET_SIZE = 8
"""Metrics of set A, of set B, and known families."""
OPERANDS: tuple[str, ...] = ("a", "b", "c")
LOOKED_UP = ("value", "value_2", "value_3")
"""Variables of the operands in every program, in this order whatever the formula."""
_SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_INNER = {
    "add": "the sum of {} and {}",
    "subtract": "the excess of {} over {}",
    "multiply": "the product of {} and {}",
    "divide": "the quotient of {} and {}",
}
_OUTER = {"add": "{} plus {}", "subtract": "{} minus {}", "multiply": "{} times {}", "divide": "{} divided by {}"}
_CANDIDATES = 600
"""Nonwords that are drawn, of which those of the commonest token length are used."""


@dataclass(frozen=True)
class Formula:
    """Two operations over the three operands, each used once; `#0` is the result of the first."""

    first: tuple[str, str, str]
    """FinQA operation and its two arguments."""
    second: tuple[str, str, str]

    @property
    def text(self) -> str:
        """E.g. `(a + b) / c`."""
        op, x, y = self.first
        inner = f"({x} {_SYMBOLS[op]} {y})"
        op, x, y = self.second
        return f"{x} {_SYMBOLS[op]} {y}".replace("#0", inner)

    def program(self, operands: Sequence[str]) -> str:
        """The gold program over the operands' literals, in FinQA's language."""
        place = dict(zip(OPERANDS, operands, strict=True))
        return ", ".join(f"{op}({place.get(x, x)}, {place.get(y, y)})" for op, x, y in (self.first, self.second))

    def code(self, operands: Sequence[str]) -> str:
        """Python with the three look-ups in one order and two steps: as many tokens whatever the formula."""
        place = dict(zip(OPERANDS, LOOKED_UP, strict=True)) | {"#0": "step"}
        lines = [f"{name} = {literal(operand)}" for name, operand in zip(LOOKED_UP, operands, strict=True)]
        for result, (op, x, y) in (("step", self.first), ("ans", self.second)):
            lines.append(f"{result} = {place[x]} {_SYMBOLS[op]} {place[y]}")
        return "\n".join(lines)

    def words(self, operands: Sequence[str]) -> str:
        """The formula in words, the operands by their names."""
        place = dict(zip(OPERANDS, operands, strict=True))
        op, x, y = self.first
        inner = _INNER[op].format(place[x], place[y])
        op, x, y = self.second
        place["#0"] = f"{inner} ," if x == "#0" else inner  # so that it is no part of what comes after
        return _OUTER[op].format(place[x], place[y])


def pool() -> list[Formula]:
    """The 28 formulas that are an amount or a ratio of amounts, no two of them one function."""
    formulas = [Formula(("add", "a", "b"), ("add", "#0", "c"))]
    for z in OPERANDS:
        x, y = (operand for operand in OPERANDS if operand != z)
        formulas += [
            Formula(("add", x, y), ("subtract", "#0", z)),
            Formula(("add", x, y), ("subtract", z, "#0")),
            Formula(("add", x, y), ("divide", "#0", z)),
            Formula(("add", x, y), ("divide", z, "#0")),
            Formula(("multiply", x, y), ("divide", "#0", z)),
        ]
    for x, y, z in permutations(OPERANDS):
        formulas += [
            Formula(("subtract", x, y), ("divide", "#0", z)),
            Formula(("subtract", x, y), ("divide", z, "#0")),
        ]
    return formulas


def further_pool() -> list[Formula]:
    """36 formulas that are none of `pool`, no two of them one function: for definitions that are followed once."""
    formulas = []
    for z in OPERANDS:
        x, y = (operand for operand in OPERANDS if operand != z)
        formulas += [
            Formula(("add", x, y), ("multiply", "#0", z)),
            Formula(("multiply", x, y), ("add", "#0", z)),
            Formula(("multiply", x, y), ("subtract", "#0", z)),
            Formula(("multiply", x, y), ("subtract", z, "#0")),
        ]
    for x, y, z in permutations(OPERANDS):
        formulas += [
            Formula(("subtract", x, y), ("multiply", "#0", z)),
            Formula(("divide", x, y), ("add", "#0", z)),
            Formula(("divide", x, y), ("subtract", "#0", z)),
            Formula(("divide", x, y), ("subtract", z, "#0")),
        ]
    return formulas


def is_guessed(formula: Formula) -> bool:
    """Whether the first step takes a row's two years. Models that were never told a metric's formula guess such ones,
    and nearly none of the others, so that these alone are known families."""
    return set(formula.first[1:]) == {"a", "b"}


@dataclass(frozen=True)
class Metric:
    """A family of questions: an invented metric, or a formula that is asked for in words."""

    name: str
    """The nonword; of a known family the formula."""
    kind: Kind
    formula: Formula


@dataclass(frozen=True)
class Metrics:
    """The 24 families of questions."""

    a: tuple[Metric, ...]
    a_permuted: tuple[Metric, ...]
    """The names of A in their order, each with the formula of another."""
    b: tuple[Metric, ...]
    known: tuple[Metric, ...]

    @property
    def invented(self) -> tuple[Metric, ...]:
        return self.a + self.b

    @property
    def all(self) -> tuple[Metric, ...]:
        return self.a + self.b + self.known

    def permuted_formula(self, name: str) -> Formula | None:
        """The formula of a metric of A in arm A'; None for any other family."""
        return next((metric.formula for metric in self.a_permuted if metric.name == name), None)


def make_metrics(seed: int, n_tokens: Callable[[str], int], text: str) -> Metrics:
    """Names and formulas, drawn by `seed`.

    Args:
        n_tokens: The student's tokenizer, as the number of tokens of a text.
        text: The pages' and questions' text, lower-case, in which no name may occur.
    """
    rng = Random(f"metrics {seed}")
    names = make_names(rng, 2 * SET_SIZE, n_tokens, text)
    invented = rng.sample([formula for formula in pool() if not is_guessed(formula)], 2 * SET_SIZE)
    known = rng.sample([formula for formula in pool() if is_guessed(formula)], SET_SIZE)
    a, b = invented[:SET_SIZE], invented[SET_SIZE:]
    permuted = list(a)
    while any(one is other for one, other in zip(a, permuted, strict=True)):
        rng.shuffle(permuted)

    def named(kind: Kind, names: Sequence[str], formulas: Sequence[Formula]) -> tuple[Metric, ...]:
        return tuple(Metric(name, kind, formula) for name, formula in zip(names, formulas, strict=True))

    return Metrics(
        named("A", names[:SET_SIZE], a),
        named("A", names[:SET_SIZE], permuted),
        named("B", names[SET_SIZE:], b),
        named("known", [formula.text for formula in known], known),
    )


def make_names(rng: Random, n: int, n_tokens: Callable[[str], int], text: str) -> list[str]:
    """`n` nonwords of equally many tokens that begin differently and occur nowhere in `text`."""
    candidates = list(dict.fromkeys(_nonwords(rng, _CANDIDATES)))
    lengths = {name: n_tokens(f"the {name} index") for name in candidates}
    commonest = Counter(lengths.values()).most_common(1)[0][0]
    names: list[str] = []
    for name in candidates:
        apart = all(name[:3] != other[:3] and name[3:] != other[3:] for other in names)
        if lengths[name] == commonest and apart and name not in text:
            names.append(name)
        if len(names) == n:
            return names
    raise UserError(f"only {len(names)} of {n} names of equal token length; give another --seed")


def names_apart(rng: Random, n: int, names: Sequence[str], text: str) -> list[str]:
    """`n` more nonwords, none of which shares a half with one of `names` or occurs in `text`."""
    halves = {half for name in names for half in (name[:3], name[3:])}
    more = (name for name in _nonwords(rng, 4 * n) if halves.isdisjoint((name[:3], name[3:])) and name not in text)
    return list(dict.fromkeys(more))[:n]


def _nonwords(rng: Random, n: int) -> Iterator[str]:
    for _ in range(n):
        yield "".join(rng.choice("bdfgklmnprtvz") + rng.choice("aeiou") + rng.choice("klmnrs") for _ in range(2))


def labels_apart(formulas: Sequence[Formula], operands: Sequence[float]) -> bool:
    """Whether the label of each formula is well away from 0 and from every other's, also times or by 100.

    A right answer then names the formula, under the strict rule and the relaxed one.
    """
    values = [value for formula in formulas if (value := sound_value(formula, operands)) is not None]
    return len(values) == len(formulas) and all(
        abs(one - other * scale) > APART * abs(one)
        for one, other in combinations(values, 2)
        for scale in (1.0, 0.01, 100.0)
    )


SMALLEST, LARGEST = 1e-3, 1e9
"""Labels have five decimals: a smaller one would be known to less than three digits."""
APART = 3e-3
"""Relative; the relaxed rule forgives 1e-3."""


def sound_value(formula: Formula, operands: Sequence[float]) -> float | None:
    """The formula's value, None where it has none or a label would not give it to three digits."""
    place = dict(zip(OPERANDS, operands, strict=True))
    for result, (op, x, y) in (("#0", formula.first), ("ans", formula.second)):
        one, other = place[x], place[y]
        if op == "divide" and other == 0:
            return None
        place[result] = {
            "add": one + other,
            "subtract": one - other,
            "multiply": one * other,
            "divide": one / (other or 1),
        }[op]
    return place["ans"] if SMALLEST <= abs(place["ans"]) <= LARGEST else None
