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
from collections.abc import Iterator, Sequence
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
_YEARS = range(1900, 2101)
_YEAR = r"(?:19|20)\d\d"
_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
_OF_LISTS = frozenset([*_MONTHS.split("|"), "respectively", "year", "years", "ended", "fiscal"])
_DAY = re.compile(rf"\b(?:{_MONTHS}) \d\d?\b")
NUMBER_IN_TEXT = re.compile(r"(?<![\w.])-?\d[\d,]*\.?\d*(?![\w])")


@dataclass
class _Names:
    """The variables of one program: one name per thing, one thing per name."""

    taken: set[str] = field(default_factory=set)

    def claim(self, words: Sequence[str], fallback: str) -> str:
        """The first of some names that is free; a numbered one where all are taken."""
        bases = list(filter(None, map(identifier, words))) or [fallback]
        base = next((base for base in bases if base not in self.taken and base not in _RESERVED), bases[0])
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
                rows[row] = names.claim([row] if located else [], "row")
                values = ", ".join(literal(cell) for cell in _row_cells(table, row))
                assignments.append(f"{rows[row]} = [{values}]")
            continue
        for arg in step.args:
            if arg.startswith(("#", "const_")) or arg in variables:
                continue
            places = locate(arg, table, question, passage) if located else []
            variables[arg] = names.claim(places, "value")
            assignments.append(f"{variables[arg]} = {literal(arg)}")

    results: list[str] = []  # variable of each step
    formulas: list[str] = []  # each step written out in the operands
    computation: list[str] = []
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        results.append("ans" if last else names.claim([_RESULT_NAME[step.op]], "step"))
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


def locate(operand: str, table: Table, question: str, passage: str) -> list[str]:
    """Words that say what `operand` is, the best first: row and column, else the text around it, else the question's.

    Empty where the page does not hold the number.
    """
    value = number(operand)
    if value is None:
        return []
    asked = set(_words(question))

    def best_first(places: list[str]) -> list[str]:
        return sorted(places, key=lambda words: -len(asked & set(_words(words))))

    found = best_first([_year_last(f"{row} {column}") for row, column in cells_with(value, table)])
    for text in (passage, question):
        if mentions := list(_mentions(text, value)):
            found += best_first([short for short, _ in mentions]) + [more for _, longer in mentions for more in longer]
    return found


def cells_with(value: float, table: Table) -> list[tuple[str, str]]:
    """Row and column name of each cell that holds `value`; a table without a header has no column names."""
    headed = has_header(table)
    return [
        (row[0], table[0][column] if headed and column < len(table[0]) else "")
        for row in table[headed:]
        for column, cell in enumerate(row)
        if column > 0 and same_number(cell_number(cell), value)
    ]


def has_header(table: Table) -> bool:
    """Whether the first row names the columns: it has no number but years."""
    numbers = [cell_number(cell) for cell in table[0][1:]] if table else []
    return all(value is None or value in _YEARS for value in numbers)


def _year_last(words: str) -> str:
    """`2007 operating leases` as `operating leases 2007`; a number alone is an amount."""
    found = _words(words)
    start = next((place for place, word in enumerate(found) if not word.isdigit()), len(found))
    return " ".join([*(found[start:] or ["amount"] * bool(found)), *found[:start]]) if start else words


def _mentions(text: str, value: float) -> Iterator[tuple[str, list[str]]]:
    """The words around each place where `text` has the number `value`, and longer ones that tell it from others.

    The short ones are up to four words before it, and its unit or verb. The longer ones have the year that it is for,
    where a sentence lists as many years as amounts, or what follows, or more of what comes before.
    """
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
            unit = [w for w in after[:2] if w.isalpha() and w not in _STOP_WORDS and w != "respectively"][:1]
            rest = re.split(r"[.;:] ", line[found.end() : found.end() + _NEAR])[0]
            follows = [w for w in dict.fromkeys(_words(rest)) if not w.isdigit() and w not in _OF_LISTS]
            year = _year_of(sentence, rest)
            dated = [*before[-3:], *unit, year] if year and before else []
            longer = [dated, before[-3:] + follows[:2], before[-2:] + follows[:3], before[-7:-4] + before[-2:]]
            yield " ".join(before[-4:] + unit), [" ".join(words) for words in longer]


def _year_of(before: str, after: str) -> str:
    """The year that a number is for, where its sentence lists amounts and as many years; empty elsewhere."""
    spans = [NUMBER_IN_TEXT.finditer(_DAY.sub(" ", re.sub(r"\([^()]*\)", " ", part))) for part in (before, after)]
    left, right = ([found[0].strip(",.") for found in part] for part in spans)
    years = [word for word in left + right if re.fullmatch(_YEAR, word)]
    place = sum(not re.fullmatch(_YEAR, word) for word in left)
    amounts = 1 + sum(not re.fullmatch(_YEAR, word) for word in left + right)
    if not years or amounts % len(years):
        return ""
    return years[place % len(years)]


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
