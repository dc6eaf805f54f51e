"""Keep the teacher's programs that give the label.

    python -m preprocessing.filter_valid_answers [--dataset FinQA] [--split train|dev|test|all] [--data-dir D]

Reads  D/clean_with_code/FinQA/finqa_{split}_generated.csv
Writes finqa_{split}_generated_filtered.csv beside it: the rows whose answer is right (finqa.task.answers, by the data
       set's rule), in their order; finqa_{split}_generated_rejected.csv: the others with their reason; and the run
       manifest finqa_{split}_generated_filtered.run.json
Prints for each split how many rows were kept, how many rejected for which reason, and their shares

The column actual_answer is believed: the stage before wrote it by running the program. For a file from elsewhere, or
to check one, --rerun runs every program again and judges by that. Of a published file only the columns prompt,
generated_code, actual_answer and expected_answer are needed.

Where no row of a split is kept, the files are written all the same, and the exit code is not zero.

Reasons: `wrong-answer`; `no-answer` and `no-program`, where a published file says nothing more; the sandbox's error
kind (`runtime`, `cpu-time`, ...) where the program failed; `teacher-...` where the teacher wrote none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from finqa.runtime.command_line import flag, from_args
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.journal import only_run_on
from finqa.runtime.paths import Folders
from finqa.task.answers import Rule, match
from finqa.task.datasets import dataset, how_to_make, rows_file
from finqa.task.records import TeacherRow, read_teacher_rows, write_rejected, write_teacher_rows
from preprocessing.rows import Rows, stage_parser
from preprocessing.run_programs import with_answers
from preprocessing.summary import Summary, count, table_of_reasons


@dataclass(frozen=True)
class Filter:
    """How rows are judged."""

    rule: Rule | None = flag(None, shown="the data set's", help="Answer rule")
    rerun: bool = flag(False, help="Run every program again instead of believing the file")


def main() -> None:
    args = stage_parser(__doc__, Filter).parse_args()
    judging, folders, (data, splits) = from_args(Filter, args), Folders.from_args(args), from_args(Rows, args).chosen
    for split in splits:
        rows_file("generated", data, split, folders)
    empty: list[str] = []
    for split in splits:
        with only_run_on(folders.filtered(data.name, split)):
            summary = filter_split(data.name, split, folders, judging.rule or data.answer_rule, judging.rerun)
        print(summary, table_of_reasons(summary), sep="\n", flush=True)
        if summary.rows and not summary.kept:
            empty.append(split)
    if empty:
        raise UserError(
            f"no row of {', '.join(empty)} was kept, so there is nothing to train on: the reasons are in the table "
            f"above, and beside each row in {folders.rejected(data.name, empty[0])}"
        )


def filter_split(dataset_name: str, split: str, folders: Folders, rule: Rule, rerun: bool = False) -> Summary:
    """Write the filtered and the rejected CSV of one split."""
    start = time.monotonic()
    generated, filtered = folders.generated(dataset_name, split), folders.filtered(dataset_name, split)
    rows: Sequence[TeacherRow] = read_teacher_rows(
        generated, how_to_make("generated", dataset(dataset_name), split, folders)
    )
    if rerun:
        rows = with_answers(rows)
    reasons = [rejection(row, rule) for row in rows]
    judged = list(zip(rows, reasons, strict=True))
    write_teacher_rows(filtered, [row for row, reason in judged if not reason])
    write_rejected(folders.rejected(dataset_name, split), [(row, reason) for row, reason in judged if reason])

    seconds = time.monotonic() - start
    summary = Summary(dataset_name, split, len(rows), count(reasons), seconds, filtered, left_out_as="rejected")
    summary.write_manifest({"rule": rule, "rerun": rerun}, generated)
    return summary


def rejection(row: TeacherRow, rule: Rule) -> str:
    """Why a row is not kept; empty where its program gives the label."""
    if not row.generated_code.strip():
        return row.error_kind or "no-program"
    if match(row.actual_answer, row.expected_answer, rule):
        return ""
    return row.error_kind or ("wrong-answer" if row.actual_answer else "no-answer")


if __name__ == "__main__":
    sys.exit(report_errors(main))
