"""Where a question says what it asks for, and where a program does: the places that bound the strata.

A reader who goes from left to right and knows the page (its rows and years) can tell a question's family from the first
place at which no other family's phrasing fits any more: the *cue*. A program starts with look-ups, which say what is
read and nothing of what is done with it; the *operation* starts after them, and its first operator ends the part of the
program that can be about the operator's choice.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finqa.runtime.errors import UserError
from finqa.task.records import Question
from mini.families import FAMILIES
from mini.pages import REGIONS

Fillers = Mapping[str, Sequence[str]]

_SLOT = re.compile(r"\{(\w+)\}")
_OPERATOR = re.compile(r"[A-Za-z_]\w*(?=\()|[\"']|\*\*|[-+*/<>]")
"""A function that is called, the quote of a yes or no, or an operator's sign."""


@dataclass(frozen=True)
class Wording:
    """How the families of a data set are asked for."""

    phrasings: Mapping[str, Sequence[str]]
    """Family -> question templates with slots in braces. `row...` stands for a row name of the page's table, `year...`
    for one of its column headers, other slots for one of `fillers`."""
    templates: Mapping[str, str]
    """Family -> its template: what its questions name (two years, a row, ...). Families of one template can be asked of
    the same page, rows and years, so that only the operation tells them apart."""
    kinds: Mapping[str, str]
    """Family -> `known` where the base model has seen it in pretraining, else `new` or `other`."""
    fillers: Fillers
    """Slot -> the texts that it can hold, for slots that the table does not fill."""


def cue(question: Question, wording: Wording, ends: Sequence[int]) -> int:
    """The first of `ends`, rising offsets into the question's text, up to which only its own family fits; its index.

    len(ends) where other families fit to the end. UserError where the question is not worded as its family's are.
    """
    header, *rows = question.table or [[""]]
    names, years = [row[0] for row in rows], [cell for cell in header[1:] if cell]
    in_parts = {
        family: [_parts(template, names, years, wording.fillers) for template in templates]
        for family, templates in wording.phrasings.items()
    }

    def decided(end: int) -> bool:
        prefix = question.question[:end]
        return not any(
            _fits(prefix, parts) for family, its in in_parts.items() if family != question.family for parts in its
        )

    if not any(_fits(question.question, parts) for parts in in_parts.get(question.family, ())):
        raise UserError(f"{question.id}: {question.question!r} is not worded as questions of {question.family!r} are")
    return bisect_left(ends, True, key=decided)


def operation(code: str) -> tuple[int, int]:
    """Offsets into a program: where its operation starts, and where the first operator in it ends.

    The operation starts on the line after the leading look-ups, assignments of constants; a comment before the first
    statement that computes belongs to it. Both are the length of the code where there is no such statement.
    """
    last_lookup = 0
    for statement in _statements(code):
        if not (isinstance(statement, ast.Assign) and _is_constant(statement.value)):
            break
        last_lookup = statement.end_lineno or 0
    start = sum(len(line) for line in code.splitlines(keepends=True)[:last_lookup])
    found = _OPERATOR.search(code, start)
    return start, found.end() if found else len(code)


def _parts(template: str, rows: Sequence[str], years: Sequence[str], fillers: Fillers) -> list[Sequence[str]]:
    """A template as a sequence of choices: a literal is a choice of one."""
    parts: list[Sequence[str]] = []
    for index, piece in enumerate(_SLOT.split(template)):
        if index % 2 == 0:
            parts.append((piece,))
        else:
            parts.append(rows if piece.startswith("row") else years if piece.startswith("year") else fillers[piece])
    return parts


def _fits(prefix: str, parts: Sequence[Sequence[str]]) -> bool:
    """Whether some text made of one choice of each part starts with `prefix`."""
    if not prefix:
        return True
    if not parts:
        return False
    return any(
        choice.startswith(prefix) or (prefix.startswith(choice) and _fits(prefix[len(choice) :], parts[1:]))
        for choice in parts[0]
    )


def _statements(code: str) -> list[ast.stmt]:
    try:
        return ast.parse(code).body
    except SyntaxError:
        return []


def _is_constant(value: ast.expr) -> bool:
    """Whether an expression names and calls nothing: a number, a list of numbers, `26 / 100`."""
    return not any(isinstance(node, (ast.Name, ast.Call)) for node in ast.walk(value))


def finqa_mini_wording() -> Wording:
    """How FinQA-mini asks, of all families, those that FinQA-mini leaves to another fine-tune included."""
    return Wording(
        phrasings={family.name: family.phrasings for family in FAMILIES},
        templates={family.name: family.shape for family in FAMILIES},
        kinds={family.name: family.kind for family in FAMILIES},
        fillers={"region": REGIONS, "count": tuple("23456")},
    )
