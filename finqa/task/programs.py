"""FinQA's program language: parse it, run it, compile it to Python.

A program is `op(a, b), op(a, b), ...`. The operations are add, subtract, multiply, divide, exp, greater, which take
two numbers, and table_max, table_min, table_sum, table_average, which take `(row name, none)`. A number is a literal
(`5829`, `5.2%`), a constant (`const_100`, `const_m1`) or the result of an earlier step (`#0`). The rules, and what
each one is worth on real data, follow FinQA's official evaluation (Chen et al., 2021).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finqa.task.records import Table

_OF_TWO: dict[str, Callable[[float, float], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "exp": operator.pow,
    "greater": operator.gt,
}
_OF_ROW: dict[str, Callable[[list[float]], float]] = {
    "table_max": max,
    "table_min": min,
    "table_sum": sum,
    "table_average": lambda row: sum(row) / len(row),
}
ARITHMETIC, TABLE_OPERATIONS = tuple(_OF_TWO), tuple(_OF_ROW)

_OPERATION = "|".join(ARITHMETIC + TABLE_OPERATIONS)
# A row name may hold parentheses and commas, so a step ends only where the next one starts, or the program ends.
_STEP = re.compile(rf"\s*(?P<op>{_OPERATION})\((?P<args>.*?)\)\s*(?:,(?=\s*(?:{_OPERATION})\()|$)", re.DOTALL)

# ASCII: Python reads the digits of other scripts as text, but not as source code.
_NUMBER = re.compile(r"[+-]?\s*(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII)
_CONSTANT = re.compile(r"const_(?P<minus>m?)(?P<digits>\d+(?:\.\d+)?)", re.ASCII)
_REFERENCE = re.compile(r"#\d{1,4}", re.ASCII)


class ProgramError(ValueError):
    """A program that cannot be parsed or run, and why."""


@dataclass(frozen=True)
class Step:
    """One operation; `args` are its two arguments as written."""

    op: str
    args: tuple[str, str]


def parse(program: str) -> list[Step]:
    """Split a program into its steps.

    Raises ProgramError where the text is not a program, a step has not exactly two arguments, or one is no number and
    no step that comes before it.
    """
    steps: list[Step] = []
    position = 0
    while position < len(program) or not steps:
        found = _STEP.match(program, position)
        if not found:
            raise ProgramError(f"cannot read the program from {program[position : position + 60]!r}")
        steps.append(_step(found["op"], found["args"], step=len(steps)))
        position = found.end()
    return steps


def _step(op: str, text: str, step: int) -> Step:
    if op in TABLE_OPERATIONS:
        row, comma, none = text.rpartition(",")
        if not comma or none.strip() != "none":
            raise ProgramError(f"step {step}: {op} takes (row name, none), not ({text})")
        return Step(op, (row.strip(), "none"))
    # `1,234` holds a comma, but no space behind it.
    args = [arg.strip() for arg in re.split(r",\s+", text.strip())]
    if len(args) == 1:
        args = [arg.strip() for arg in text.split(",")]
    if len(args) != 2 or not all(args):
        raise ProgramError(f"step {step}: {op} takes two arguments, not ({text})")
    for arg in args:
        if arg.startswith("#"):
            if not (_REFERENCE.fullmatch(arg) and int(arg[1:]) < step):
                raise ProgramError(f"step {step}: {arg} is no earlier step")
        elif number(arg) is None:
            raise ProgramError(f"step {step}: {arg!r} is not a number")
    return Step(op, (args[0], args[1]))


def execute(program: str | Sequence[Step], table: Table) -> float | str:
    """Run a program over its page's table.

    Returns the last step's result: a float, not rounded (the official comparison is `round(result, 5)`), or "yes" or
    "no" after `greater`. Raises ProgramError for what `parse` refuses, an unknown row, a row with a cell that is no
    number, a division by zero, or a result that is not a finite real number.
    """
    steps = parse(program) if isinstance(program, str) else program
    results: list[float | str] = []
    for number, step in enumerate(steps):
        try:
            results.append(_run(step, results, table))
        except (ZeroDivisionError, OverflowError) as error:
            raise ProgramError(f"step {number}: {step.op}({', '.join(step.args)}): {error}") from None
    return results[-1]


def _run(step: Step, results: list[float | str], table: Table) -> float | str:
    if step.op in TABLE_OPERATIONS:
        return float(_OF_ROW[step.op](row_values(table, step.args[0])))
    value = _OF_TWO[step.op](*(_operand(arg, results) for arg in step.args))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, complex) or not math.isfinite(value):
        raise ProgramError(f"{step.op}({', '.join(step.args)}) is not a finite number")
    return value


def _operand(text: str, results: list[float | str]) -> float:
    if text.startswith("#"):
        value = results[int(text[1:])]
        if isinstance(value, str):
            raise ProgramError(f"{text} is {value}, not a number")
        return value
    value = number(text)
    if value is None:
        raise ProgramError(f"{text!r} is not a number")
    return value


def number(text: str) -> float | None:
    """The value of a literal or constant: commas dropped, `5%` is 0.05, `const_m1` is -1; None where it is none."""
    text = text.replace(",", "").strip()
    if text.startswith("const_"):
        constant = _CONSTANT.fullmatch(text)
        text = f"{'-' if constant['minus'] else ''}{constant['digits']}" if constant else ""
    scale = 1.0
    if text.endswith("%"):
        text, scale = text.removesuffix("%").strip(), 100.0
    if not _NUMBER.fullmatch(text):
        return None
    value = float("".join(text.split())) / scale
    return value if math.isfinite(value) else None


def cell_number(cell: str) -> float | None:
    """The value of a table cell: `$` dropped, only what stands before `(` counts (`-234 ( 234 )` is -234)."""
    return number(cell.replace("$", "").split("(")[0])


def row_values(table: Table, name: str) -> list[float]:
    """The numbers of the row `name`; of two rows of one name the last counts.

    Raises ProgramError where there is no such row, or a cell of it is no number.
    """
    rows = [row for row in table if row and row[0].strip() == name.strip()]
    if not rows:
        raise ProgramError(f"the table has no row {name!r}")
    values = [cell_number(cell) for cell in rows[-1][1:]]
    if not values or None in values:
        raise ProgramError(f"row {name!r} has a cell that is no number")
    return [value for value in values if value is not None]
