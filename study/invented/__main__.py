"""Invented metrics on real pages: rows, ten fine-tunes, gates, ceilings, dictionaries, verdicts (docs/prereg.md).

    make data && python -m study.invented            all of it; make study MODEL=...
    python -m study.invented base train-A            the jobs whose names begin so, and what they need
    python -m study.invented --rows                  make the rows alone
    python -m study.invented --list                  the commands for a GPU of their own, and what must come before
    python -m study.invented --gates                 gates.csv from what is there, nothing run
    python -m study.invented --tables                tables, verdicts and figure from what is there, nothing run
    python -m study.invented --model pocket-mistral --source FinQA-mini --quick      a rehearsal on two cores

Makes its questions from the user's FinQA files (D/clean/FinQA, or D/FinQA as downloaded), on FinQA-mini's pages where
there are none. Writes D/invented/<model>/ (study/invented/files.py says what), R/invented/<model>/, and the tables:
{models,gates,ceilings,settings,dictionaries,items,causal_norm,explored,objections,findings}.csv, headline.png and .svg,
run.json in docs/reference/invented/ and docs/study.md, for a rehearsal in R/invented/<model>/tables/.

No dictionary is trained before the gates hold. Runs as many commands beside each other as every GPU has memory for.
Start NVIDIA's MPS first (nvidia-cuda-mps-control -d), or they take turns on it: on one H200 seven jobs that train small
dictionaries took 900 steps a second together with it, three took 350 without. A killed study goes on when it is started
again, on another machine too, where D/invented/<model>/ without its activations and R/invented/<model>/ are brought: of
an adapter adapter_model.safetensors, adapter_config.json and run.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from finqa.models.students import load_tokenizer
from finqa.runtime.errors import report_errors
from finqa.runtime.paths import write_atomically
from study.invented import verdicts
from study.invented.diff.plan import diff_jobs, study_flags
from study.invented.files import write_rows
from study.invented.gates import summary, write_gates
from study.invented.plan import add_plan_flags, plan_from
from study.invented.rows import make_rows
from study.students.jobs import add_job_flags, gpus_of_this_machine, print_jobs, run_jobs
from study.students.plan import chosen


def main() -> None:
    args = parse_arguments()
    plan = plan_from(args)
    jobs = chosen([*plan.jobs(), *diff_jobs(plan, study_flags(plan))], args.jobs)
    if args.list:
        print_jobs(jobs)
        return
    n_tokens = token_counter(args.model)
    nothing_run = args.gates or args.tables
    if not nothing_run:
        rows = make_rows(plan.place.given, plan.source, plan.dataset, args.seed, n_tokens, plan.sizes)
        config = {"source": plan.source, "model": plan.place.model, "seed": args.seed, "sizes": asdict(plan.sizes)}
        print(write_rows(plan.place, rows, config), flush=True)
    if not (args.rows or nothing_run):
        started = time.monotonic()
        logs = plan.place.results / "logs"
        run_jobs(jobs, logs, gpus_of_this_machine())
        print(f"{len(jobs)} commands in {time.monotonic() - started:.0f} s (this call); logs in {logs}")
    if nothing_run or not (args.rows or args.jobs):
        path, gates = write_gates(plan, n_tokens)
        print(f"{summary(gates)}\n{path}: {sum(one.holds is True for one in gates)} of {len(gates)} hold")
        if not args.gates:
            from study import page
            from study.invented.diff.tables import REFERENCE, write_tables

            output, found = write_tables(plan, gates)
            if output.is_relative_to(REFERENCE):
                write_atomically(page.PAGE, page.fill(page.PAGE.read_text(), REFERENCE, "invented"))
            rehearsed = "a rehearsal, which no verdict is given on:\n" if plan.is_rehearsal else ""
            print(f"{rehearsed}{verdicts.summary(found)}\ntables and figure in {output}")


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
    parser.add_argument("--tables", action="store_true", help="write tables, verdicts and figure from what is there")
    parser.add_argument("--gates", action="store_true", help="write gates.csv from what is there")
    parser.add_argument("--seed", type=int, default=0, help="of names, formulas and draws (default: %(default)s)")
    add_plan_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
