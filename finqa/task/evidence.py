"""Where a program's numbers stand on the page: the cells and sentences that it used."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from finqa.task.program_compiler import NUMBER_IN_TEXT, cells_with, same_number
from finqa.task.programs import number
from finqa.task.records import Question

UNITS = frozenset({1, 100, 1000, 1_000_000})
"""Numbers that turn one unit into another; they count only where a name is given to them."""
SHOWN = 160
"""Characters of a sentence that are shown."""


@dataclass(frozen=True)
class Evidence:
    """One number of a program, and where the page has it."""

    number: float
    name: str
    """The variable that holds it; empty where it stands in an expression."""
    places: tuple[str, ...]
    """`table: <row>, <column>` or `text: <sentence>`; empty where the page does not have it."""


def evidence(code: str, question: Question) -> list[Evidence]:
    """The numbers of a program in their order, each once, with every cell that holds it, else every sentence.

    A number is the same as on the page where it differs by its sign or by a factor of 100 (per cent) alone. Code that
    does not parse has no evidence.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names = {id(constant): name for name, constant in _assigned(tree)}
    found: dict[float, Evidence] = {}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and _is_number(node.value)]
    for node in sorted(constants, key=lambda node: (node.lineno, node.col_offset)):
        value, name = float(node.value), names.get(id(node), "")  # pyright: ignore[reportArgumentType]
        if value not in found and (name or value not in UNITS):
            cells = [f"table: {', '.join(filter(None, place))}" for place in cells_with(value, question.table)]
            found[value] = Evidence(value, name, tuple(cells or _sentences(value, question)))
    return list(found.values())


def _is_number(value: object) -> bool:
    # An int can have more digits than a float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _assigned(tree: ast.AST) -> list[tuple[str, ast.Constant]]:
    """Names with the constant they are given, a sign or a division by 100 aside."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = node.value
            if isinstance(value, ast.BinOp) and isinstance(value.right, ast.Constant):
                value = value.left
            if isinstance(value, ast.UnaryOp):
                value = value.operand
            if isinstance(value, ast.Constant):
                found.append((node.targets[0].id, value))
    return found


def _sentences(value: float, question: Question) -> list[str]:
    return [
        f"text: {_around(sentence, place)}"
        for line in question.passage.split("\n")
        for sentence in re.split(r"(?<=[.;]) +(?=[A-Za-z])", line)
        if (place := _place(value, sentence)) is not None
    ]


def _place(value: float, sentence: str) -> int | None:
    for found in NUMBER_IN_TEXT.finditer(sentence):
        if same_number(number(found[0].rstrip(",.")), value):
            return found.start()
    return None


def _around(sentence: str, place: int) -> str:
    """At most SHOWN characters of a sentence, the number among them."""
    start = max(0, min(place - SHOWN // 2, len(sentence) - SHOWN))
    shown = sentence[start : start + SHOWN].strip()
    return f"{'... ' if start else ''}{shown}{' ...' if start + SHOWN < len(sentence) else ''}"
