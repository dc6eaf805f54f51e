"""Have a teacher write a Python program for every question, and run it.

    python -m preprocessing.process_finqa_code_generation [--split train|dev|test|all] [--dataset FinQA]
        [--teacher openai|program] [--model gpt-5] [--base-url URL] [--max-concurrent 32] [--no-hint] [--attempts N]
        [--limit N] [--dry-run] [--max-cost DOLLARS] [--batch submit|status|fetch]

Reads  D/clean/FinQA/{split}.csv
Writes D/clean_with_code/FinQA/finqa_{split}_generated.csv: prompt, generated_code, actual_answer, expected_answer, id,
       stated_answer (where the clean CSV has it), finish_reason, error_kind, error_message, program; exactly one row
       for each clean row, in its order; generated_code is empty where the teacher failed. Beside it the run manifest
       finqa_{split}_generated.run.json

`--teacher openai` (the default) asks a model and needs OPENAI_API_KEY; `--base-url` names any compatible server, for
instance vLLM's. Every try is first written to finqa_{split}_generated.journal.jsonl: killed and started again, the
command asks only for what is missing, and with a larger --max-completion-tokens for what was cut off as well. At a
kill, the requests under way (at most --max-concurrent) are lost and sent again; Ctrl-C waits for them. Delete the
journal to ask anew.

Money: `--dry-run` prints the first prompt and an estimate and sends nothing; the estimate is printed before the first
request in any case. `--max-cost` ends the run before more dollars are spent, by this run and the earlier ones in the
journals of the chosen splits: what is under way is finished and kept, the files are written with what there is, and
the exit code is not zero. A request that timed out may be billed without an answer, which nobody here can count.

`--batch submit` sends what is missing through the Batch API instead (half the price at OpenAI, done within a day),
`--batch status` says how far it is, and `--batch fetch` takes the answers into the same journal and writes the files.

A row without a program says why in error_kind: teacher-length, teacher-content-filter (how the reply ended),
teacher-refusal, teacher-empty, teacher-malformed (what came), teacher-bad-request, teacher-forbidden (what the server
refused), teacher-rate-limit, teacher-server, teacher-timeout, teacher-connection (given up after --max-retries),
teacher-batch-failed, teacher-batch-expired, teacher-batch-cancelled, teacher-batch-error, teacher-not-asked; and
teacher-program of the program teacher.

`--teacher program` compiles the gold programs: no network, no cost. `--style` says how its programs are written
(finqa/task/program_compiler.py).

Where more than --max-failed-share of the rows have no program, the files are written all the same, and the exit code
says that the result is not to be trusted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finqa.chat.config import config_from
from finqa.runtime.command_line import add_flags, flag, from_args
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.journal import only_run_on
from finqa.runtime.paths import Folders
from finqa.task.datasets import Dataset, how_to_make, rows_file
from finqa.task.program_compiler import ProgramStyle
from finqa.task.prompts import training_prompt
from finqa.task.records import Question, TeacherRow, read_questions, read_teacher_rows, write_teacher_rows
from preprocessing.rows import Rows, stage_parser
from preprocessing.run_programs import with_answers
from preprocessing.summary import Summary, by_reason, count
from preprocessing.teacher.batch.batches import REQUESTS_A_BATCH
from preprocessing.teacher.batch.teacher import BatchTeacher
from preprocessing.teacher.config import OpenAITeacherConfig
from preprocessing.teacher.openai_teacher import OpenAITeacher
from preprocessing.teacher.teachers import ProgramTeacher, Reply, Teacher


@dataclass(frozen=True)
class Asking:
    """Which teacher writes the programs, and how far it goes."""

    teacher: Literal["openai", "program"] = flag("openai", help="Who writes the programs")
    style: ProgramStyle | None = flag(None, shown="plain; named for FinQA-mini")
    """How the programs of --teacher program are written."""
    limit: int | None = flag(None, least=1, help="Only the first N questions of each split")
    max_failed_share: float = flag(0.2, metavar="SHARE", least=0, most=1)
    """Rows without a program, as a share, above which the exit code is not zero."""
    dry_run: bool = flag(False, help="Print the first prompt and the estimate; send and write nothing")
    batch: Literal["submit", "status", "fetch"] | None = flag(None)
    """Go through the Batch API instead of single requests."""
    batch_requests: int = flag(REQUESTS_A_BATCH, least=1, metavar="REQUESTS")
    """Requests in one batch, at most."""


def main() -> None:
    args = parse_arguments()
    asking, config = from_args(Asking, args), config_from(args, OpenAITeacherConfig)
    folders, (data, splits) = Folders.from_args(args), from_args(Rows, args).chosen
    questions = {
        split: read_questions(rows_file("clean", data, split, folders), how_to_make("clean", data, split, folders))
        for split in splits
    }
    # Where an OpenAI teacher keeps what it was asked and answered for an output.
    journals = {split: folders.generated(data.name, split).with_suffix(".journal.jsonl") for split in splits}
    errors: list[UserError] = []
    for split in splits:
        chosen, whole = questions[split][: asking.limit], len(questions[split])
        teacher = make_teacher(asking, config, data, split, journals)
        if asking.dry_run:
            print(f"{data.name} {split}: {teacher.dry_run(chosen, show_prompt=split == splits[0])}", flush=True)
        elif isinstance(teacher, BatchTeacher) and asking.batch == "submit":
            print(f"{data.name} {split}: {teacher.submit(chosen, asking.batch_requests)}", flush=True)
        elif isinstance(teacher, BatchTeacher) and asking.batch == "status":
            print(f"{data.name} {split}: {teacher.status()}", flush=True)
        else:
            try:
                output = folders.generated(data.name, split)
                with only_run_on(output):
                    check_not_shortened(output, len(chosen), whole)
                    process_finqa_samples(data, split, folders, chosen, teacher, asking.max_failed_share, of_rows=whole)
            except UserError as error:
                if not asking.batch:
                    raise
                errors.append(error)  # The batches of the other splits can be fetched all the same.
    if errors:
        raise UserError("; ".join(map(str, errors)))


def make_teacher(
    asking: Asking, config: OpenAITeacherConfig, data: Dataset, split: str, journals: dict[str, Path]
) -> Teacher:
    """The teacher that is asked for; an OpenAI teacher has a journal for each of the chosen splits."""
    if asking.teacher == "program":
        return ProgramTeacher(asking.style or data.program_style)
    kind = BatchTeacher if asking.batch else OpenAITeacher
    return kind(config, data.worked_examples, journals[split], data.answer_rule, paid_in=journals.values())


def check_not_shortened(output: Path, rows: int, whole: int) -> None:
    """Raises UserError where writing only the first `rows` of the `whole` rows would replace a longer output."""
    there = len(read_teacher_rows(output)) if rows < whole and output.exists() else 0
    if there > rows:
        raise UserError(
            f"{output} has {there} rows and --limit would replace them by {rows}; move it away first, or give another "
            "--data-dir"
        )


def process_finqa_samples(
    data: Dataset,
    split: str,
    folders: Folders,
    questions: Sequence[Question],
    teacher: Teacher,
    max_failed_share: float = 0.2,
    of_rows: int | None = None,
) -> None:
    """Ask the teacher, run its programs, write the generated CSV and its manifest, print the summary.

    `of_rows` is the number of rows of the split, where `questions` are only its first.

    Raises UserError, after writing, where the teacher stopped before its last question, or more than
    `max_failed_share` of the rows have no program.
    """
    start = time.monotonic()
    replies = teacher(questions)
    rows = with_answers([teacher_row(q, reply) for q, reply in zip(questions, replies, strict=True)])
    output = folders.generated(data.name, split)
    write_teacher_rows(output, rows)

    failed = count(reply.error_kind for reply in replies)
    seconds = time.monotonic() - start
    summary = Summary(data.name, split, len(rows), failed, seconds, output, "with a program", "without")
    did_not_run = count(row.error_kind for row in rows if row.generated_code)
    shortened = of_rows is not None and len(rows) < of_rows
    summary.write_manifest(
        teacher.settings,
        folders.clean(data.name, split),
        usage=teacher.usage(),
        did_not_run=dict(did_not_run.most_common()),
        **teacher.facts(),
        **({"only_the_first_of": of_rows} if shortened else {}),
    )
    notes = (
        f"only the first {len(rows)} of {of_rows} rows (--limit)" if shortened else "",
        f"{did_not_run.total()} programs do not run{by_reason(did_not_run)}" if did_not_run else "",
        teacher.usage(),
    )
    print(summary, *filter(None, notes), sep="; ", flush=True)
    if teacher.stopped:
        raise UserError(f"{teacher.stopped}; {output} has what there is")
    if summary.left_out_share > max_failed_share:
        example = next(reply for reply in replies if reply.error_kind)
        raise UserError(
            f"{summary.left_out_share:.0%} of the rows of {output} have no program, more than --max-failed-share "
            f"{max_failed_share:g}; the first: {example.error_kind}: {example.error_message}"
        )


def teacher_row(question: Question, reply: Reply) -> TeacherRow:
    """A row of the generated CSV, before its program has run."""
    return TeacherRow(
        prompt=training_prompt(question),
        generated_code=reply.code,
        actual_answer="",
        expected_answer=question.answer,
        id=question.id,
        stated_answer=question.stated_answer,
        finish_reason=reply.finish_reason,
        error_kind=reply.error_kind,
        error_message=reply.error_message,
        program=question.program,
        family=question.family,
        family_kind=question.family_kind,
    )


def parse_arguments() -> argparse.Namespace:
    parser = stage_parser(__doc__, Asking)
    add_flags(parser.add_argument_group("the OpenAI teacher"), OpenAITeacherConfig)
    args = parser.parse_args()
    asking = from_args(Asking, args)
    if asking.batch and asking.teacher != "openai":
        parser.error("--batch needs --teacher openai")
    if asking.style and asking.teacher != "program":
        parser.error("--style needs --teacher program")
    return args


if __name__ == "__main__":
    sys.exit(report_errors(main))
