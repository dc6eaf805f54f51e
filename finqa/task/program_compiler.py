"""The program teacher: FinQA programs as readable Python.

Each operand becomes a variable named after where the page has it: row and column of the table, or the words before
it in the text. What cannot be located falls back to a plain name, so that every program compiles. Three styles:

    named           the variables, a comment with the whole formula where there are several steps, the steps
    formula-first   the formula as the first line of every program, then the variables and the steps
    plain           variables called `value`, `value_2`, ... and no comment
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from finqa.task.programs import TABLE_OPERATIONS, Step, cell_number, number, parse, row_values
from finqa.task.records import Table

ProgramStyle = Literal["named", "formula-first", "plain"]
PROGRAM_STYLES: tuple[ProgramStyle, ...] = get_args(ProgramStyle)

_RESULT_NAME = {
    "add": "total",
    "subtract": "change",
    "multiply": "product",
    "divide": "ratio",
    "exp": "power",
    "greater": "is_greater",
    "table_max": "highest",
    "table_min": "lowest",
    "table_sum": "row_total",
    "table_average": "row_average",
}
_SYMBOL = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "exp": "**"}
_TABLE_EXPRESSION = {
    "table_max": "max({0})",
    "table_min": "min({0})",
    "table_sum": "sum({0})",
    "table_average": "sum({0}) / len({0})",
}
_RESERVED = {"ans", "max", "min", "sum", "len", "abs", "round", "print", "math"} | set(keyword.kwlist)
_STOP_WORDS = frozenset(
    re.findall(
        r"\S+",
        "a an and approximately are as at be been by during each for from had has have in is it its of on or our per "
        "that the their this to was we were which will with $ million billion thousand",
    )
)
_MAX_WORDS = 5
_NEAR = 400
"""Characters on either side of a number in the text that are looked at for its name: a line can be a whole page."""
NUMBER_IN_TEXT = re.compile(r"(?<![\w.])-?\d[\d,]*\.?\d*(?![\w])")


@dataclass
class _Names:
    """The variables of one program: one name per thing, one thing per name."""

    taken: set[str] = field(default_factory=set)

    def claim(self, words: str, fallback: str) -> str:
        base = identifier(words) or fallback
        name, count = base, 1
        while name in self.taken or name in _RESERVED:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


def to_python(
    program: str | Sequence[Step], table: Table, question: str, passage: str = "", style: ProgramStyle = "named"
) -> str:
    """Compile a program to the Python that a careful teacher would write.

    Args:
        program: The gold program, or its steps.
        table: The page's table; operands found there are named after their row and column.
        question: Decides between several places that hold the same number.
        passage: The text around the table; operands found there are named after the words before them.
        style: How the program is written.

    Returns source code that leaves its result in `ans`. Raises ProgramError for what `parse` refuses.
    """
    steps = parse(program) if isinstance(program, str) else program
    names, located = _Names(), style != "plain"
    variables: dict[str, str] = {}  # operand as written -> variable
    rows: dict[str, str] = {}  # row name of a table operation -> variable; a row may be called 2009
    assignments: list[str] = []
    for step in steps:
        if step.op in TABLE_OPERATIONS:
            row = step.args[0]
            if row not in rows:
                rows[row] = names.claim(row if located else "", "row")
                values = ", ".join(literal(cell) for cell in _row_cells(table, row))
                assignments.append(f"{rows[row]} = [{values}]")
            continue
        for arg in step.args:
            if arg.startswith(("#", "const_")) or arg in variables:
                continue
            place = locate(arg, table, question, passage) if located else None
            variables[arg] = names.claim(place or "", "value")
            assignments.append(f"{variables[arg]} = {literal(arg)}")

    results: list[str] = []  # variable of each step
    formulas: list[str] = []  # each step written out in the operands
    computation: list[str] = []
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        results.append("ans" if last else names.claim(_RESULT_NAME[step.op], "step"))
        computation.append(f"{results[-1]} = {_expression(step, variables, rows, results)}")
        formula = _expression(step, variables, rows, formulas)
        formulas.append(formula if step.op in ("table_max", "table_min", "table_sum") or last else f"({formula})")
    comment = [f"# {formulas[-1]}"]
    if style == "formula-first":
        return "\n".join(comment + assignments + computation)
    return "\n".join(assignments + (comment if located and len(steps) > 1 else []) + computation)


def _expression(step: Step, variables: dict[str, str], rows: dict[str, str], results: Sequence[str]) -> str:
    if step.op in TABLE_OPERATIONS:
        return _TABLE_EXPRESSION[step.op].format(rows[step.args[0]])
    a, b = (_reference(arg, variables, results) for arg in step.args)
    if step.op == "greater":
        return f'"yes" if {a} > {b} else "no"'
    if step.op == "exp" and a.startswith("-"):
        a = f"({a})"  # -1 ** 2 is -(1 ** 2)
    return f"{a} {_SYMBOL[step.op]} {b}"


def _reference(arg: str, variables: dict[str, str], results: Sequence[str]) -> str:
    if arg.startswith("#"):
        return results[int(arg[1:])]
    if arg.startswith("const_"):
        return literal(arg)
    return variables[arg]


def literal(text: str) -> str:
    """A literal, constant or table cell as Python: `5.2%` becomes `5.2 / 100`."""
    text = "".join(text.replace("$", "").split("(")[0].replace(",", "").split())
    if text.startswith("const_"):
        text = text.removeprefix("const_").replace("m", "-", 1)
    percent = text.endswith("%")
    text = text.removesuffix("%")
    sign = "-" if text.startswith("-") else ""
    text = text.lstrip("+-")
    text = sign + re.sub(r"^0+(?=\d)", "", f"0{text}" if text.startswith(".") else text)  # Python refuses 007
    return f"{text} / 100" if percent else text


def _row_cells(table: Table, name: str) -> list[str]:
    row_values(table, name)  # raises ProgramError for a row that is missing or holds no numbers
    return [row for row in table if row and row[0].strip() == name.strip()][-1][1:]


def locate(operand: str, table: Table, question: str, passage: str) -> str | None:
    """Words that say what `operand` is: row and column, else the text before it, else the question's words.

    Returns None where the page does not hold the number.
    """
    value = number(operand)
    if value is None:
        return None
    asked = set(_words(question))
    cells = [
        f"{row[0]} {table[0][column] if column < len(table[0]) else ''}"
        for row in table[1:]
        for column, cell in enumerate(row)
        if column > 0 and same_number(cell_number(cell), value)
    ]
    if cells:
        return max(cells, key=lambda words: len(asked & set(_words(words))))
    for text in (passage, question):
        mentions = list(_mentions(text, value))
        if mentions:
            return max(mentions, key=lambda words: len(asked & set(_words(words))))
    return None


def _mentions(text: str, value: float):
    """The words around each place where `text` has the number `value`: up to four before it, and its unit or verb."""
    for line in text.split("\n"):
        for found in NUMBER_IN_TEXT.finditer(line):
            literal = found[0].rstrip(",.")
            after = line[found.end() : found.end() + _NEAR].split()
            if after[:1] == ["%"] or line[found.end() : found.end() + 1] == "%":
                literal += "%"
                after = after[1:]
            if not same_number(number(literal), value):
                continue
            sentence = re.split(r"[.;:] ", line[max(0, found.start() - _NEAR) : found.start()])[-1]
            before = [w for w in _words(sentence) if not w.isdigit()]
            unit = [w for w in after[:2] if w.isalpha() and w not in _STOP_WORDS]
            yield " ".join(before[-4:] + unit[:1])


def same_number(found: float | None, value: float) -> bool:
    """Whether a number that the page holds is the one a program names."""
    # A program may quote a percentage as a plain number, and drop a sign that the bracket shows.
    if found is None:
        return False
    tolerance = 1e-9 * max(1.0, abs(value))
    return abs(found - value) <= tolerance or abs(found * 100 - value) <= tolerance or abs(found + value) <= tolerance


def _words(text: str) -> list[str]:
    return [w for w in re.findall(r"[a-z]+|\d+", text.lower()) if w not in _STOP_WORDS]


def identifier(text: str) -> str:
    """At most five of the words of `text` as a Python name; empty where nothing is left."""
    words = _words(text)
    if len(words) > _MAX_WORDS:
        # Keep the end: it has the year of a cell, and the word next to a number in the text.
        words = words[: _MAX_WORDS - 2] + words[-2:]
    name = "_".join(words)
    return f"n_{name}" if name[:1].isdigit() else name
