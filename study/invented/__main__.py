"""Invented metrics on real pages, before any dictionary: rows, ten fine-tunes, evaluations, gates.

    make data && python -m study.invented            all of it
    python -m study.invented base train-A            the jobs whose names begin so, and what they need
    python -m study.invented --rows                  make the rows alone
    python -m study.invented --list                  the commands for a GPU of their own, and what must come before
    python -m study.invented --gates                 gates.csv from what is there, nothing run
    python -m study.invented --model pocket-mistral --source FinQA-mini --quick      a rehearsal on two cores

Makes its questions from the user's FinQA files (D/clean/FinQA, or D/FinQA as downloaded), on FinQA-mini's pages where
there are none. Writes D/invented/<model>/ (study/invented/files.py says what) and R/invented/<model>/ with gates.csv.
Runs as many commands beside each other as every GPU has memory for. A killed study goes on when it is started again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from finqa.models.students import POCKET, load_tokenizer, local_model
from finqa.runtime.errors import report_errors
from finqa.runtime.paths import Folders, add_folder_flags
from finqa.task.datasets import INVENTED
from study.invented.files import Place, write_rows
from study.invented.gates import summary, write_gates
from study.invented.pages import SOURCES, source_of
from study.invented.plan import Plan
from study.invented.rows import QUICK, Sizes, make_rows
from study.students.jobs import add_job_flags, gpus_of_this_machine, print_jobs, run_jobs
from study.students.plan import MAIN, chosen, short


def main() -> None:
    args = parse_arguments()
    given = Folders(args.data_dir.resolve(), args.results_dir.resolve())
    source = args.source or source_of(given)
    local = local_model(args.model)
    name = f"{local.name if local else short(args.model)}{'-quick' if args.quick else ''}"
    model = args.model if args.model == POCKET or not local else str(local)
    plan = Plan(Place(given, name), model, INVENTED[source])
    jobs = chosen(plan.jobs(), args.jobs)
    if args.list:
        print_jobs(jobs)
        return
    n_tokens = token_counter(args.model)
    if not args.gates:
        sizes = QUICK if args.quick else Sizes()
        rows = make_rows(given, source, plan.dataset, args.seed, n_tokens, sizes)
        config = {"source": source, "model": name, "seed": args.seed, "sizes": asdict(sizes)}
        print(write_rows(plan.place, rows, config), flush=True)
    if not (args.rows or args.gates):
        started = time.monotonic()
        logs = plan.place.results / "logs"
        run_jobs(jobs, logs, gpus_of_this_machine())
        print(f"{len(jobs)} commands in {time.monotonic() - started:.0f} s (this call); logs in {logs}")
    if args.gates or not (args.rows or args.jobs):
        path, gates = write_gates(plan, n_tokens)
        print(f"{summary(gates)}\n{path}: {sum(one.holds is True for one in gates)} of {len(gates)} hold")


def token_counter(model: str) -> Callable[[str], int]:
    """The number of tokens of a text to the student."""
    tokenizer = load_tokenizer(model)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m study.invented", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_job_flags(parser)
    parser.add_argument("--rows", action="store_true", help="make the rows and run nothing")
    parser.add_argument("--gates", action="store_true", help="write gates.csv from what is there")
    parser.add_argument("--model", default=MAIN, help="an instruct model, by its name or folder (default: %(default)s)")
    parser.add_argument("--source", choices=SOURCES, help="whose pages (default: FinQA where it is there)")
    parser.add_argument("--seed", type=int, default=0, help="of names, formulas and draws (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few rows of everything: shows that the commands work")
    add_folder_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
