"""Real students on real FinQA: everything of docs/finqa.md, by the project's own commands.

    make data && python -m study.students            all of it
    python -m study.students search                  the search for settings alone; also student, again, seed, named,
                                                     vote, curve, wording, collect, train, analyse, or whole names
    python -m study.students --list                  the commands for a GPU of their own, and what must come before
    python -m study.students --tables                tables, figures and the page from what is there, nothing run

Needs the three splits of FinQA in D (`make data`), and vLLM on a GPU. Runs as many commands beside each other as every
GPU of the machine has memory for, a log a command in R/FinQA/logs/. A killed study goes on when it is started again;
a command that was run to its end is not run again.

Writes docs/reference/finqa/ and the tables of docs/finqa.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from finqa.runtime.commands import make_data
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import SPLITS, Folders, add_folder_flags
from finqa.task.datasets import dataset
from finqa.task.program_compiler import PROGRAM_STYLES
from finqa.task.records import read_questions
from preprocessing.filter_valid_answers import filter_split
from preprocessing.process_finqa_code_generation import process_finqa_samples
from preprocessing.teacher.teachers import ProgramTeacher
from study.students.jobs import Job, add_job_flags, gpus_of_this_machine, print_jobs, run_jobs
from study.students.plan import DATASET, Plan, chosen, logs_of


def main() -> None:
    args = parse_arguments()
    folders = Folders(args.data_dir.resolve(), args.results_dir.resolve())
    plan = Plan(folders)
    jobs = chosen(plan.jobs(), args.jobs)
    if args.list:
        print_jobs(jobs)
        return
    if not args.tables:
        started = time.monotonic()
        for path in (kind(DATASET, split) for split in SPLITS for kind in (folders.clean, folders.filtered)):
            if not path.exists():
                raise UserError(f"{path} is missing; make it with: {make_data(folders)}")
        make_styled_rows(plan, jobs)
        run_jobs(jobs, logs_of(folders), gpus_of_this_machine())
        print(f"{len(jobs)} commands in {time.monotonic() - started:.0f} s (this call); logs in {logs_of(folders)}")
    if args.tables or not args.jobs:
        from study.students.tables import write_reference

        print(write_reference(plan))


def make_styled_rows(plan: Plan, jobs: Sequence[Job]) -> None:
    """Rows in the styles of these jobs that are not the data set's own; what is there is made anew only where the
    clean rows have changed."""
    data = dataset(DATASET)
    for style in PROGRAM_STYLES:
        folders = plan.styled(style)
        last = folders.filtered(data.name, "train")
        if folders == plan.folders or not any(str(folders.data) in job.command for job in jobs):
            continue
        if last.exists() and all(
            same_file(plan.folders.clean(data.name, split), folders.clean(data.name, split)) for split in SPLITS
        ):
            continue
        last.unlink(missing_ok=True)
        for split in SPLITS:
            clean = folders.clean(data.name, split)
            clean.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plan.folders.clean(data.name, split), clean)
            questions = read_questions(clean)
            process_finqa_samples(data, split, folders, questions, ProgramTeacher(style))
            filter_split(data.name, split, folders, data.answer_rule)


def same_file(one: Path, other: Path) -> bool:
    return other.exists() and one.read_bytes() == other.read_bytes()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m study.students", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_job_flags(parser)
    parser.add_argument("--tables", action="store_true", help="write tables, figures and page from what is there")
    add_folder_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
