"""What the sandbox costs a program, beside cheaper and dearer ways to run it, all in one run.

    python -m benchmarks.bench_sandbox [--rows 1000] [--repeats 5] [--interpreters 100] [--out FOLDER]

Programs: what the program teacher writes for the first --rows training questions of FinQA-mini. Every way runs the
same programs and must give the same answers; the ways take turns, so that a busy moment of the machine hits all alike.

- a fresh interpreter a program (its first --interpreters programs): `python -I -S -c`, no limits at all;
- fork and limits: the sandbox's helper without its system-call filter, one worker;
- everything on, one worker;
- everything on, two workers: a gain of 2 needs two idle cores beside the calling process's own small share.

Prints a table; writes sandbox.json and sandbox.md into benchmarks/results, or into --out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from benchmarks.parts.record import RESULTS, markdown_table, summary, write_record
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import Folders, add_folder_flags
from finqa.sandbox.results import Run
from finqa.sandbox.running import Sandbox
from finqa.task.datasets import dataset
from preprocessing.teacher.teachers import ProgramTeacher

Way = Callable[[Sequence[str]], list[float | str | bool | None]]
"""Runs programs and gives their answers."""

INTERPRETER, LIMITS, ONE, TWO = (
    "a fresh interpreter a program",
    "fork and limits, 1 worker",
    "everything on, 1 worker",
    "everything on, 2 workers",
)


def main() -> None:
    args = parse_arguments()
    codes = programs(args.rows, Folders.from_args(args))
    with ways() as (by_name, missing):
        seconds = measure(by_name, codes, args.repeats, args.interpreters)
    per_program = {
        name: summary([1000 * t / (args.interpreters if name == INTERPRETER else len(codes)) for t in times])
        for name, times in seconds.items()
    }
    table = table_of(per_program)
    print(table)
    record = {
        "n_programs": len(codes),
        "n_programs_fresh_interpreter": args.interpreters,
        "lines_a_program": round(sum(code.count("\n") + 1 for code in codes) / len(codes), 2),
        "protections_missing": missing,
        "ms_a_program": per_program,
        "scaling_two_workers": round(per_program[ONE]["median"] / per_program[TWO]["median"], 3),
    }
    note = f"n = {len(codes)} programs ({args.interpreters} with a fresh interpreter), {args.repeats} repeats."
    path = write_record("sandbox", record, f"{note}\n\n{table}", args.out)
    print(f"\n{note} Written to {path}")


def programs(rows: int, folders: Folders) -> list[str]:
    """What the program teacher writes for the first training questions of FinQA-mini."""
    data = dataset("FinQA-mini")
    questions = data.load(folders.raw(data.name, "train")).questions[:rows]
    codes = [reply.code for reply in ProgramTeacher()(questions) if reply.code]
    if len(codes) < rows:
        raise UserError(f"--rows {rows}: FinQA-mini has {len(codes)} training questions with a program")
    return codes


@contextlib.contextmanager
def ways() -> Iterator[tuple[dict[str, Way], tuple[str, ...]]]:
    """The ways by name, their helpers started; and the protections that this system does not have."""
    with contextlib.ExitStack() as stack:
        one, two = stack.enter_context(Sandbox(workers=1)), stack.enter_context(Sandbox(workers=2))
        with (
            mock.patch("finqa.sandbox.running.compiled_filter", lambda _: b""),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            limits = stack.enter_context(Sandbox(workers=1))
        yield (
            {INTERPRETER: fresh_interpreters, LIMITS: through(limits), ONE: through(one), TWO: through(two)},
            one.missing,
        )


def through(sandbox: Sandbox) -> Way:
    return lambda codes: [answer_of(run) for run in sandbox.run_many(codes)]


def answer_of(run: Run) -> float | str | bool | None:
    if run.error_kind:
        raise UserError(f"a program of the teacher's fails: {run.error_kind}: {run.message}")
    return run.answer


def fresh_interpreters(codes: Sequence[str]) -> list[float | str | bool | None]:
    answers = []
    for code in codes:
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"{code}\nprint(ans if isinstance(ans, (str, bool)) else float(ans))",
        ]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        answers.append({"True": True, "False": False}.get(text, text))
    return answers


def measure(by_name: dict[str, Way], codes: list[str], repeats: int, interpreters: int) -> dict[str, list[float]]:
    """Seconds of each repeat by way. Raises UserError where a way gives other answers than the sandbox."""
    expected = by_name[TWO](codes)  # this one is not timed: it starts the second worker
    for name in (LIMITS, ONE):
        by_name[name](codes[:100])
    seconds: dict[str, list[float]] = {name: [] for name in by_name}
    for _ in range(repeats):
        for name, way in by_name.items():
            chosen = codes[:interpreters] if name == INTERPRETER else codes
            start = time.perf_counter()
            answers = way(chosen)
            seconds[name].append(time.perf_counter() - start)
            if list(map(str, answers)) != list(map(str, expected[: len(chosen)])):
                raise UserError(f"{name}: other answers than with everything on")
    return seconds


def table_of(per_program: dict[str, dict[str, float | int]]) -> str:
    full = per_program[ONE]["median"]
    rows = [
        (name, f"{ms['median']:.2f}", f"{ms['lowest']:.2f} to {ms['highest']:.2f}", f"{ms['median'] / full:.2f}")
        for name, ms in per_program.items()
    ]
    return markdown_table(("way", "ms a program, median", "lowest to highest", "times everything on, 1 worker"), rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="programs (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="times that every way runs them (default: %(default)s)")
    parser.add_argument(
        "--interpreters", type=int, default=100, help="programs for the first way (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record (default: %(default)s)")
    add_folder_flags(parser, results=False)
    args = parser.parse_args()
    if min(args.rows, args.repeats, args.interpreters) < 1 or args.interpreters > args.rows:
        parser.error("--rows, --repeats and --interpreters must be at least 1, and --interpreters at most --rows")
    return args


if __name__ == "__main__":
    sys.exit(report_errors(main))
