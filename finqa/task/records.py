"""The rows that the stages exchange, and their CSV files.

Every cell is read as text: `NA`, `null` and `1.0` stay what they are.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from finqa.runtime.errors import UserError
from finqa.runtime.paths import write_atomically

Table = list[list[str]]


@dataclass(frozen=True)
class Question:
    """One question over one page of an earnings report."""

    id: str
    pre_text: str
    """The text before the table, a line a sentence."""
    post_text: str
    table: Table
    """Rows of cells; the first row is the header, the first cell of a row its name."""
    question: str
    answer: str
    """The label: a number or yes/no, as text."""
    program: str = ""
    """The gold program in FinQA's language (see finqa.task.programs); empty where there is none."""
    stated_answer: str = ""
    """What the report's annotator wrote, e.g. `24%` or `$ 4.26 million` (finqa.task.stated_answers); may be empty."""
    family: str = ""
    """Question family, where the data set knows it (FinQA-mini)."""
    family_kind: str = ""
    """`known` or `new`: whether the base model has seen the family in pretraining (FinQA-mini)."""

    @property
    def passage(self) -> str:
        """The text around the table."""
        return f"{self.pre_text}\n{self.post_text}"


@dataclass(frozen=True)
class TeacherRow:
    """What the teacher wrote for one question, and what its program gave."""

    prompt: str
    """The fine-tuning prompt, without chat mark-up (finqa.task.prompts.training_prompt)."""
    generated_code: str
    """Empty where the teacher failed."""
    actual_answer: str
    expected_answer: str
    id: str = ""
    stated_answer: str = ""
    finish_reason: str = ""
    error_kind: str = ""
    error_message: str = ""
    program: str = ""
    family: str = ""
    family_kind: str = ""


_COLUMNS_OF_SOME = ("stated_answer", "family", "family_kind")
"""Columns that a file has only where a row of it has something there."""
_CLEAN_COLUMNS = ("pre_text", "post_text", "table", "question", "answer", "program", "id", *_COLUMNS_OF_SOME)
_TEACHER_COLUMNS = tuple(field.name for field in fields(TeacherRow))
_REQUIRED_CLEAN = ("pre_text", "post_text", "table", "question", "answer")
_REQUIRED_TEACHER = ("prompt", "generated_code", "actual_answer", "expected_answer")


def cell_text(cell: str) -> str:
    """A cell for a table's text, where `|` and line breaks separate cells and rows: inside a cell they are replaced."""
    return " ".join(cell.replace("|", "/").splitlines())


def format_table(table: Table) -> str:
    """A table as text: one line a row, cells joined by `|`."""
    return "\n".join("|".join(map(cell_text, row)) for row in table)


def parse_table(text: str) -> Table:
    """The inverse of `format_table`."""
    return [line.split("|") for line in text.split("\n")] if text else []


def read_questions(path: Path, remedy: str = "python -m preprocessing.preprocess_finqa") -> list[Question]:
    """Read a clean CSV. `id`, `program` and the columns of some data sets may be absent; other columns are ignored.

    Raises UserError, with the command `remedy` that makes the file, for a missing file or column, a file that was cut
    off, or a row with too many or too few cells.
    """
    rows = _read_rows(path, _REQUIRED_CLEAN, remedy)
    cells: list[dict[str, Any]] = [{c: row.get(c, "") for c in _CLEAN_COLUMNS} for row in rows]
    for row in cells:
        row["table"] = parse_table(row["table"])
    return [Question(**row) for row in cells]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write a clean CSV; the columns of some data sets appear only where a question has something there."""
    _write_rows(path, _CLEAN_COLUMNS, questions)


def read_teacher_rows(
    path: Path, remedy: str = "python -m preprocessing.process_finqa_code_generation"
) -> list[TeacherRow]:
    """Read a generated, filtered or rejected CSV; the published files with only the first four columns load too.

    Raises UserError as read_questions does.
    """
    rows = _read_rows(path, _REQUIRED_TEACHER, remedy)
    return [TeacherRow(**{c: row[c] for c in _TEACHER_COLUMNS if c in row}) for row in rows]


def write_teacher_rows(path: Path, rows: Sequence[TeacherRow]) -> None:
    """Write a generated or filtered CSV."""
    _write_rows(path, _TEACHER_COLUMNS, rows)


def write_rejected(path: Path, rejected: Sequence[tuple[TeacherRow, str]]) -> None:
    """Write the rows that the filter set aside, each with its reason."""
    _write_rows(path, _TEACHER_COLUMNS, [row for row, _ in rejected], [reason for _, reason in rejected])


def _read_rows(path: Path, required: Sequence[str], remedy: str) -> list[dict[str, str]]:
    if not path.exists():
        raise UserError(f"{path} is missing; make it with: {remedy}")
    csv.field_size_limit(sys.maxsize)  # a page of an annual report can exceed the module's 128 KiB
    try:
        text = path.read_bytes().decode("utf-8-sig")  # read_text would change a carriage return inside a cell
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    # Strict, because a file that was cut off inside quotes would else be read as if it were whole.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, str]] = []
    try:
        for sign, name in ((";", "semicolons"), ("\t", "tabs")):
            if len(reader.fieldnames or ()) == 1 and sign in text.partition("\n")[0]:
                raise UserError(f"{path} has {name} between its columns; save it with commas, as CSV (UTF-8)")
        missing = [column for column in required if column not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path} lacks the column {', '.join(missing)}; make it again with: {remedy}")
        for row in reader:
            if None in row or None in row.values():
                more = "more" if None in row else "fewer"
                raise UserError(f"{path}, row {len(rows) + 1}: {more} cells than columns; make it again with: {remedy}")
            if any(row.values()):  # a spreadsheet writes empty rows as commas alone
                rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, row {len(rows) + 1}: {error}; make it again with: {remedy}") from None
    return rows


def _write_rows(
    path: Path,
    columns: Sequence[str],
    rows: Sequence[Question] | Sequence[TeacherRow],
    reasons: Sequence[str] | None = None,
) -> None:
    """Write the columns of the rows, and beside them their `reasons` where those are given."""
    shown = [c for c in columns if c not in _COLUMNS_OF_SOME or any(getattr(row, c) for row in rows)]
    text = io.StringIO(newline="")
    # The csv module quotes a line break only where the terminator has it: with "\n" a lone "\r" would end a row.
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow([*shown, *([] if reasons is None else ["reason"])])
    for number, row in enumerate(rows):
        cells = [getattr(row, c) for c in shown]
        texts = [format_table(cell) if isinstance(cell, list) else cell for cell in cells]
        writer.writerow([*texts, *([] if reasons is None else [reasons[number]])])
    write_atomically(path, text.getvalue())
