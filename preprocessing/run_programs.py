"""Run a column of programs and write down what each gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finqa.runtime.progress import Progress
from finqa.sandbox.running import Sandbox
from finqa.task.records import TeacherRow


def with_answers(rows: Sequence[TeacherRow]) -> list[TeacherRow]:
    """The rows with actual_answer, error_kind and error_message from running their programs in the sandbox.

    Rows without a program are returned as they are.
    """
    programs = [row.generated_code for row in rows if row.generated_code.strip()]
    if not programs:
        return list(rows)
    progress = Progress("programs run", len(programs))
    with Sandbox() as sandbox:
        runs = sandbox.run_many(programs, progress=lambda done, total: progress.advance())
    progress.close()
    gave = iter(
        [
            {"actual_answer": answer_text(run.answer), "error_kind": run.error_kind or "", "error_message": run.message}
            for run in runs
        ]
    )
    return [replace(row, **next(gave)) if row.generated_code.strip() else row for row in rows]


def answer_text(answer: float | str | bool | None) -> str:
    """An answer as the CSV has it: numbers by repr, so that reading it gives the same float; empty for none."""
    if answer is None:
        return ""
    return answer if isinstance(answer, str) else repr(answer)
