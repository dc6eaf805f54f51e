"""Preprocessing at FinQA's full size: raw JSON -> clean CSV -> programs, compiled and run -> filtered CSV.

    python -m benchmarks.bench_preprocessing [--questions 8281] [--cores 2] [--repeats 3]

Makes synthetic questions in FinQA's raw schema (mini/), their pages filled up to the length of real ones: 3,600
characters of text and six table rows on average. Then runs the stages as the commands that a user types, with the
program teacher, on --cores cores, and checks that every row comes out of the filter.

Times are wall time, and processor time of the stage with all its processes (user and system): on a busy machine only
the latter says something. The target is 60 s for all stages on two cores.

Writes benchmarks/results/preprocessing.json and .md.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.parts.record import RESULTS, markdown_table, summary, write_record
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import REPOSITORY, SPLITS, Folders, write_atomically
from finqa.task.programs import execute
from finqa.task.records import read_teacher_rows
from mini.make_finqa_mini import as_json, make_split
from mini.pages import LINE_ITEMS, make_page

FINQA_QUESTIONS = {"train": 6251, "dev": 883, "test": 1147}
TARGET_S = 60.0
SEED = 7
TEXT_CHARACTERS = (3600, 1100)
"""Mean and standard deviation of the text around a table; of 300 real pages."""
SENTENCE_CHARACTERS = 150
TABLE_ROWS = (3, 9)
"""Real tables have six rows on average, the header included."""
STAGES = {
    "raw JSON to clean CSV": ("preprocess_finqa",),
    "program teacher, programs run": ("process_finqa_code_generation", "--teacher", "program"),
    "filter": ("filter_valid_answers",),
}


@dataclass(frozen=True)
class Cost:
    wall_s: float
    cpu_s: float
    """User and system time of the stage's processes."""


def main() -> None:
    args = parse_arguments()
    use_cores(args.cores)
    with tempfile.TemporaryDirectory(prefix="bench_preprocessing.") as folder:
        folders = Folders(data=Path(folder))
        pages = write_raw_files(folders, args.questions)
        repeats = [
            {stage: run_stage(command, folders.data) for stage, command in STAGES.items()} for _ in range(args.repeats)
        ]
        check_output(folders, args.questions)
    report(args, pages, repeats)


def use_cores(cores: int) -> None:
    """Hold this process, and so the stages, to the first `cores` of its processor cores."""
    if not hasattr(os, "sched_setaffinity"):
        print("this system cannot hold a process to some cores: all of them are used", flush=True)
        return
    available = sorted(os.sched_getaffinity(0))
    if len(available) < cores:
        raise UserError(f"--cores {cores}: this process may use {len(available)}")
    os.sched_setaffinity(0, available[:cores])


def write_raw_files(folders: Folders, questions: int) -> dict[str, float]:
    """Write the raw files, `questions` in FinQA's proportions; returns the mean sizes of their pages."""
    rng = Random(SEED)
    sentences = [_sentence(rng) for _ in range(4000)]
    rows: list[dict[str, Any]] = []
    for split, size in split_sizes(questions).items():
        made = [lengthen(row, rng, sentences) for row in make_split(split, size, ("known", "new"), SEED)]
        write_atomically(folders.raw("FinQA", split), as_json(made))
        rows += made
    return {
        "text_characters": statistics.mean(sum(map(len, row["pre_text"] + row["post_text"])) for row in rows),
        "table_rows": statistics.mean(len(row["table"]) for row in rows),
        "table_columns": statistics.mean(len(row["table"][0]) for row in rows),
    }


def split_sizes(questions: int) -> dict[str, int]:
    total = sum(FINQA_QUESTIONS.values())
    sizes = {split: questions * size // total for split, size in FINQA_QUESTIONS.items()}
    sizes["train"] += questions - sum(sizes.values())
    return sizes


def _sentence(rng: Random) -> str:
    parts: list[str] = []
    while sum(map(len, parts)) < SENTENCE_CHARACTERS:
        before, after = make_page(rng).text(rng)
        parts += [sentence.removesuffix(" .") for sentence in before + after]
    return " , and ".join(parts) + " ."


def lengthen(row: dict[str, Any], rng: Random, sentences: list[str]) -> dict[str, Any]:
    """The question over a page as long as a real one; its label is the program's result over the new page."""
    mean, deviation = TEXT_CHARACTERS
    length = max(500.0, rng.gauss(mean, deviation))
    while sum(map(len, row["pre_text"] + row["post_text"])) < length - SENTENCE_CHARACTERS / 2:
        row[rng.choice(("pre_text", "post_text"))].append(rng.choice(sentences))
    table = row["table"]
    names = rng.sample([name for name in LINE_ITEMS if name not in {line[0] for line in table}], max(TABLE_ROWS))
    for name in names[: max(0, rng.randint(*TABLE_ROWS) - len(table))]:
        table.append([name, *(f"$ {rng.randint(100, 99_999):,}" for _ in table[0][1:])])
    result = execute(row["qa"]["program"], table)
    row["qa"]["exe_ans"] = round(result, 5) if isinstance(result, float) else result
    return row


def run_stage(command: tuple[str, ...], data_dir: Path) -> Cost:
    """Run one stage as its command; raises UserError where it fails."""
    line = [sys.executable, "-m", f"preprocessing.{command[0]}", *command[1:], "--data-dir", str(data_dir)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    wall_s, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr.strip()}")
    return Cost(wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def check_output(folders: Folders, questions: int) -> None:
    kept = sum(len(read_teacher_rows(folders.filtered("FinQA", split))) for split in SPLITS)
    if kept != questions:
        raise UserError(f"{kept} of {questions} rows came out of the filter; the times are of no use")


def report(args: argparse.Namespace, pages: dict[str, float], repeats: list[dict[str, Cost]]) -> None:
    whole = "all stages"
    for repeat in repeats:
        repeat[whole] = Cost(sum(c.wall_s for c in repeat.values()), sum(c.cpu_s for c in repeat.values()))
    wall = {stage: summary([repeat[stage].wall_s for repeat in repeats]) for stage in repeats[0]}
    cpu = {stage: summary([repeat[stage].cpu_s for repeat in repeats]) for stage in repeats[0]}
    lines = [
        (
            stage,
            f"{wall[stage]['median']:.2f}",
            f"{wall[stage]['lowest']:.2f} to {wall[stage]['highest']:.2f}",
            f"{cpu[stage]['median']:.2f}",
            f"{1e3 * cpu[stage]['median'] / args.questions:.2f}",
        )
        for stage in wall
    ]
    table = markdown_table(("stage", "wall s", "lowest to highest", "processor s", "processor ms a question"), lines)
    verdict = "within" if wall[whole]["median"] <= TARGET_S else "over"
    sizes = f"{args.questions} questions, pages of {pages['text_characters']:.0f} characters and a table of "
    sizes += f"{pages['table_rows']:.1f} rows by {pages['table_columns']:.1f} columns"
    note = f"{sizes}; {args.cores} cores, median of {args.repeats}. All stages {verdict} the target of {TARGET_S:g} s."
    print(f"{table}\n\n{note}", flush=True)
    record = {"questions": args.questions, "cores": args.cores, "pages": pages, "target_s": TARGET_S}
    path = write_record(
        "preprocessing", record | {"wall_s": wall, "processor_s": cpu}, f"{table}\n\n{note}", args.output
    )
    print(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    total = sum(FINQA_QUESTIONS.values())
    parser.add_argument("--questions", type=int, default=total, help="FinQA has %(default)s (default)")
    parser.add_argument("--cores", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
