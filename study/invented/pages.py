"""Pages of earnings reports whose table has the three operands, with fresh numbers where asked, and what is asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from random import Random

from finqa.runtime.errors import UserError
from finqa.runtime.paths import SPLITS, Folders
from finqa.task.datasets import dataset
from finqa.task.program_compiler import literal
from finqa.task.programs import cell_number
from finqa.task.records import Question, Table, read_questions
from mini.families import Slots
from study.invented.metrics import Formula, labels_apart

SOURCES = ("FinQA", "FinQA-mini")
TEXT_BEFORE, TEXT_AFTER = 450, 250
"""Characters of text that a page keeps on either side of its table, whole sentences: a document has 400 tokens then."""
_MOST_CELLS = 60
"""Cells of a table, at most."""
_LONGEST_NAME = 50
"""Characters of a row's name, at most."""
_YEAR = re.compile(r"(?<![\d/-])(?:19|20)\d\d(?! ?[-/]? ?\d)(?! ?-)")
"""Not one of a span, such as 2015-16 or 2013 - 2015."""
_DASHES = ("2013", "2014")
"""What FinQA's files have where the report has a dash: the code of the character, u2013 or u2014."""
_TRIES = 400
"""Pages that are tried for one more draw before there are said to be too few."""


@dataclass(frozen=True)
class Page:
    """A page, and what can be asked of its table."""

    pre_text: str
    post_text: str
    table: Table
    columns: dict[str, int]
    """Year -> column."""
    rows: dict[str, int]
    """Name of a row with a positive number in every such column -> its place in the table."""

    @property
    def key(self) -> str:
        """Equal for pages of one table, whatever their numbers."""
        return page_key(self.table)

    @property
    def n_columns(self) -> int:
        """Columns after that of the rows' names."""
        return len(self.table[0]) - 1

    def cell(self, row: str, year: str) -> str:
        return self.table[self.rows[row]][self.columns[year]]

    def operands(self, slots: Slots) -> tuple[str, str, str]:
        """Literals of a, b, c."""
        places = ((slots.row, slots.year), (slots.row, slots.year_2), (slots.row_2, slots.year))
        a, b, c = (literal(self.cell(row, year)) for row, year in places)
        return a, b, c


@dataclass(frozen=True)
class Draw:
    """A page, three operands and a phrasing; what is asked of them comes on top."""

    page: Page
    slots: Slots
    phrasing: int

    @property
    def operands(self) -> tuple[str, str, str]:
        return self.page.operands(self.slots)


def page_key(table: Table) -> str:
    """Equal for tables that differ in the digits after the first line alone."""
    lines = ["|".join(" ".join(cell.split()) for cell in line) for line in table]
    return "\n".join([*lines[:1], *(re.sub(r"\d", "0", line) for line in lines[1:])])


def source_of(folders: Folders) -> str:
    """FinQA where the data folder has its three splits, else FinQA-mini, which is shipped."""
    there = all(any(kind("FinQA", split).exists() for kind in (folders.clean, folders.raw)) for split in SPLITS)
    return SOURCES[0] if there else SOURCES[1]


def source_questions(folders: Folders, source: str, split: str) -> list[Question]:
    """The questions of a split from its clean CSV, or from the raw file where there is none."""
    clean = folders.clean(source, split)
    return read_questions(clean) if clean.exists() else dataset(source).load(folders.raw(source, split)).questions


def pages_of(questions: Sequence[Question]) -> list[Page]:
    """The pages that can be asked, each table once, in order."""
    found: dict[str, Page] = {}
    for question in questions:
        page = askable(question)
        if page and page.key not in found:
            found[page.key] = page
    return list(found.values())


def askable(question: Question) -> Page | None:
    """The question's page, its text cut to the sentences around the table; None where it lacks years or rows.

    A column counts where its header names one year that no other names; a row where its name is its own and it has a
    positive number in every such column.
    """
    table = question.table
    if not table or sum(map(len, table)) > _MOST_CELLS:
        return None
    years = [(year, column) for column, cell in enumerate(table[0]) if column for year in set(_YEAR.findall(cell))]
    by_year, by_column = Counter(year for year, _ in years), Counter(column for _, column in years)
    columns = {year: column for year, column in years if by_year[year] == by_column[column] == 1}
    names = Counter(line[0].strip() for line in table if line)
    rows = {
        name: index
        for index, line in enumerate(table)
        if index and line and names[name := line[0].strip()] == 1 and _is_name(name) and _has_numbers(line, columns)
    }
    if len(columns) < 2 or len(rows) < 2:
        return None
    before, after = sentences(question.pre_text), sentences(question.post_text)
    pre_text = "\n".join(reversed(_within(before[::-1], TEXT_BEFORE)))
    return Page(pre_text, "\n".join(_within(after, TEXT_AFTER)), table, columns, rows)


def _is_name(text: str) -> bool:
    return len(text) <= _LONGEST_NAME and bool(re.fullmatch(r"(?=.*[a-z]{3})[a-z ,()&'/-]+", text))


def _has_numbers(line: Sequence[str], columns: dict[str, int]) -> bool:
    cells = [line[column] if column < len(line) else "" for column in columns.values()]
    numbers = [None if "%" in cell or cell.strip() in _DASHES else cell_number(cell) for cell in cells]
    return all(number is not None and number >= 1 for number in numbers)


def sentences(text: str) -> list[str]:
    """Some files have a page's text as one line: a sentence ends at its full stop too."""
    parts = (part.strip() for line in text.splitlines() for part in re.split(r"(?<= \.) ", line))
    return [part for part in parts if part]


def _within(parts: Sequence[str], characters: int) -> list[str]:
    """The first parts, as many as there is room for."""
    kept: list[str] = []
    for part in parts:
        characters -= len(part) + 1
        if characters < 0:
            break
        kept.append(part)
    return kept


def with_fresh_numbers(page: Page, rng: Random) -> Page:
    """The page with every number of its rows drawn anew, of as many digits and written alike."""
    table = [list(line) for line in page.table]
    for index in page.rows.values():
        for column in page.columns.values():
            table[index][column] = fresh(table[index][column], rng)
    return replace(page, table=table)


def fresh(cell: str, rng: Random) -> str:
    """A cell with other digits. A number that stands twice in it, as in `-12 ( 12 )`, stays one number."""
    new: dict[str, str] = {}

    def other(found: re.Match[str]) -> str:
        if found[0] not in new:
            digits = (str(rng.randint(1, 9)), *(str(rng.randint(0, 9)) for _ in found[0][1:]))
            new[found[0]] = "".join(d if old.isdigit() else old for d, old in zip(digits, found[0], strict=True))
        return new[found[0]]

    return re.sub(r"\d[\d,.]*", other, cell)


def draws(
    pages: Sequence[Page],
    n: int,
    phrasings: Sequence[int],
    rng: Random,
    formulas: Sequence[Formula],
    once: bool = False,
) -> list[Draw]:
    """`n` distinct draws, pages and phrasings taken in turn; with `once` no page is drawn twice.

    Each is one on which no two of the formulas have one label. Raises UserError where the pages do not yield as many.
    """
    order = rng.sample(list(pages), len(pages))
    seen: set[object] = set()
    found: list[Draw] = []
    tried = 0
    turns = count()
    while len(found) < n:
        tried += 1
        if tried > _TRIES or not order:
            raise UserError(f"{len(pages)} pages yield only {len(found)} of {n} draws; use a larger source of pages")
        page = order[next(turns) % len(order)]
        draw = Draw(page, _slots(page, rng), phrasings[len(found) % len(phrasings)])
        key = page.key if once else (page.key, draw.slots, draw.phrasing)
        if key not in seen and labels_apart(formulas, [float(operand) for operand in draw.operands]):
            seen.add(key)
            found.append(draw)
            tried = 0
    return found


def _slots(page: Page, rng: Random) -> Slots:
    row, row_2 = rng.sample(list(page.rows), 2)
    earlier, later = sorted(rng.sample(list(page.columns), 2))
    return Slots(row=row, row_2=row_2, year=later, year_2=earlier)
