"""The rows that an evaluation scores: every one with a label, from the best file there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders
from finqa.task import answers, datasets, programs, prompts
from finqa.task.records import Question, TeacherRow, read_questions, read_teacher_rows
from finqa.task.stated_answers import AnswerKind, answer_kind, label_disputed

BEST_FIRST: tuple[datasets.RowsFile, ...] = ("generated", "clean", "filtered")
"""Files that rows are read from, the first that exists: the teacher's says the most, the filtered one lacks rows."""


@dataclass(frozen=True)
class EvalRow:
    """A question to score."""

    id: str
    prompt: str
    """The fine-tuning prompt; the other prompts are made from it."""
    expected: str
    program: str
    teacher_solved: bool | None
    family: str = ""
    family_kind: str = ""
    stated_answer: str = ""

    @property
    def answer_kind(self) -> AnswerKind:
        """What the question asks for: per cent, an amount, or yes or no."""
        return answer_kind(self.stated_answer, self.expected, prompts.question_of(self.prompt))

    @property
    def label_disputed(self) -> bool | None:
        """Whether the stated answer contradicts the label; None where nothing is stated."""
        return label_disputed(self.stated_answer, self.expected)

    @property
    def n_steps(self) -> int | None:
        """Steps of the gold program; None where there is none that can be read."""
        try:
            return len(programs.parse(self.program)) if self.program else None
        except programs.ProgramError:
            return None


def read_rows(
    folders: Folders, data: datasets.Dataset, split: str, max_rows: int | None = None
) -> tuple[Path, list[EvalRow]]:
    """Every row of a split that has a label, and the file it is from: the teacher's, else the clean, else the filtered.

    Raises UserError where the split has none of them, or no rows.
    """
    for kind in BEST_FIRST:
        path: Path = getattr(folders, kind)(data.name, split)
        if path.exists():
            break
    else:
        generated, clean = folders.generated(data.name, split), folders.clean(data.name, split)
        said = f"no rows of {data.name} {split} to evaluate on: neither {generated} nor {clean}; make them with"
        raise datasets.missing(said, "clean", data, split, folders)
    if kind == "filtered":
        print(f"{split}: only the rows that the teacher solved are scored, since only {path} is here", flush=True)
    again = datasets.how_to_make(kind, data, split, folders)
    if kind == "clean":
        rows = [_from_question(question) for question in read_questions(path, again)]
    else:
        rows = [_from_teacher(row, data) for row in read_teacher_rows(path, again)]
    rows = [row for row in rows if row.expected][:max_rows]
    if not rows:
        raise UserError(f"{path} has no row with a label")
    return path, [replace(row, id=row.id or f"row-{n}") for n, row in enumerate(rows)]


def _from_question(q: Question) -> EvalRow:
    prompt = prompts.training_prompt(q)
    return EvalRow(q.id, prompt, q.answer, q.program, None, q.family, q.family_kind, q.stated_answer)


def _from_teacher(row: TeacherRow, data: datasets.Dataset) -> EvalRow:
    solved = answers.match(row.actual_answer, row.expected_answer, data.answer_rule)
    return EvalRow(
        row.id, row.prompt, row.expected_answer, row.program, solved, row.family, row.family_kind, row.stated_answer
    )
