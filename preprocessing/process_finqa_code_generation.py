"""Have a teacher write a Python program for every question, and run it.

    python -m preprocessing.process_finqa_code_generation [--split train|dev|test|all] [--dataset FinQA]
        [--teacher openai|program] [--model gpt-5] [--base-url URL] [--max-concurrent 32] [--no-hint] [--limit N]

Reads  D/clean/FinQA/{split}.csv
Writes D/clean_with_code/FinQA/finqa_{split}_generated.csv: prompt, generated_code, actual_answer, expected_answer, id,
       finish_reason, error_kind, error_message, program; exactly one row for each clean row, in its order;
       generated_code is empty where the teacher failed. Beside it the run manifest finqa_{split}_generated.run.json

`--teacher openai` (the default) asks a model and needs OPENAI_API_KEY; `--base-url` names any compatible server, for
instance vLLM's. Every answer is first written to finqa_{split}_generated.journal.jsonl: killed and started again, the
command asks only for what is missing, and with a larger --max-completion-tokens for what was cut off as well. Delete
the journal to ask anew.
`--teacher program` compiles the gold programs: no network, no cost.

Where more than --max-failed-share of the rows have no program, the files are written all the same, and the exit code
says that the result is not to be trusted.
"""

from __future__ import annotations

import argparse
import sys
import time

from finqa.datasets import Dataset, dataset
from finqa.errors import UserError, report_errors
from finqa.manifest import file_hash, write_manifest
from finqa.paths import SPLITS, Folders, add_folder_flags, chosen_splits
from finqa.prompts import training_prompt
from finqa.records import Question, TeacherRow, read_questions, write_teacher_rows
from preprocessing.openai_teacher import OpenAITeacher, OpenAITeacherConfig
from preprocessing.run_programs import with_answers
from preprocessing.summary import Summary, by_reason, count, manifest_of
from preprocessing.teachers import ProgramTeacher, Reply, Teacher


def main() -> None:
    args = parse_arguments()
    data, folders, splits = dataset(args.dataset), Folders.from_args(args), chosen_splits(args.split)
    questions = {split: read_questions(folders.clean(data.name, split)) for split in splits}
    for split in splits:
        teacher = make_teacher(args, data, split, folders)
        process_finqa_samples(data, split, folders, questions[split][: args.limit], teacher, args.max_failed_share)


def make_teacher(args: argparse.Namespace, data: Dataset, split: str, folders: Folders) -> Teacher:
    """The teacher that the flags name; an OpenAI teacher keeps its journal beside the split's output."""
    if args.teacher == "program":
        return ProgramTeacher()
    config = OpenAITeacherConfig(
        model=args.model,
        hint=args.hint,
        max_completion_tokens=args.max_completion_tokens,
        temperature=args.temperature,
        base_url=args.base_url,
        max_concurrent=args.max_concurrent,
        max_retries=args.max_retries,
        timeout_s=args.timeout_s,
    )
    journal = folders.generated(data.name, split).with_suffix(".journal.jsonl")
    return OpenAITeacher(config, data.worked_examples, journal)


def process_finqa_samples(
    data: Dataset,
    split: str,
    folders: Folders,
    questions: list[Question],
    teacher: Teacher,
    max_failed_share: float = 0.2,
) -> None:
    """Ask the teacher, run its programs, write the generated CSV and its manifest, print the summary.

    Raises UserError, after writing, where more than `max_failed_share` of the rows have no program.
    """
    start = time.monotonic()
    replies = teacher(questions)
    rows = with_answers([teacher_row(q, reply) for q, reply in zip(questions, replies, strict=True)])
    output = folders.generated(data.name, split)
    write_teacher_rows(output, rows)

    failed = count(reply.error_kind for reply in replies)
    seconds = time.monotonic() - start
    summary = Summary(f"{data.name} {split}", len(rows), failed, seconds, output, "with a program", "without")
    did_not_run = count(row.error_kind for row in rows if row.generated_code)
    clean = folders.clean(data.name, split)
    write_manifest(
        manifest_of(output),
        {"dataset": data.name, "split": split, **teacher.settings},
        inputs={clean.name: file_hash(clean)},
        usage=teacher.usage(),
        did_not_run=dict(did_not_run.most_common()),
        **summary.facts(),
    )
    broken = f"{did_not_run.total()} programs do not run{by_reason(did_not_run)}" if did_not_run else ""
    print(summary, *filter(None, [broken, teacher.usage()]), sep="; ", flush=True)
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
        finish_reason=reply.finish_reason,
        error_kind=reply.error_kind,
        error_message=reply.error_message,
        program=question.program,
        family=question.family,
        family_kind=question.family_kind,
    )


def parse_arguments() -> argparse.Namespace:
    defaults = OpenAITeacherConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="FinQA", help="FinQA or FinQA-mini (default: %(default)s)")
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="all", help="(default: %(default)s)")
    parser.add_argument("--teacher", choices=("openai", "program"), default="openai", help="(default: %(default)s)")
    parser.add_argument("--limit", type=at_least_one, help="only the first N questions of each split")
    parser.add_argument(
        "--max-failed-share", type=share, default=0.2, help="of rows without a program (default: %(default)s)"
    )
    openai = parser.add_argument_group("the OpenAI teacher")
    openai.add_argument("--model", default=defaults.model, help="(default: %(default)s)")
    openai.add_argument("--base-url", help="address of a compatible server, e.g. http://localhost:8000/v1")
    openai.add_argument(
        "--hint",
        action=argparse.BooleanOptionalAction,
        default=defaults.hint,
        help="put the gold program into the prompt (default: yes)",
    )
    openai.add_argument(
        "--max-concurrent", type=int, default=defaults.max_concurrent, help="requests at a time (default: %(default)s)"
    )
    openai.add_argument(
        "--max-completion-tokens",
        type=int,
        default=defaults.max_completion_tokens,
        help="limit of a reply, its reasoning included (default: %(default)s)",
    )
    openai.add_argument("--temperature", type=float, help="sent only if given: reasoning models refuse it")
    openai.add_argument(
        "--max-retries", type=int, default=defaults.max_retries, help="of one request (default: %(default)s)"
    )
    openai.add_argument(
        "--timeout-s", type=float, default=defaults.timeout_s, help="seconds for one reply (default: %(default)s)"
    )
    add_folder_flags(parser, results=False)
    return parser.parse_args()


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {value:g}")
    return value


if __name__ == "__main__":
    sys.exit(report_errors(main))
