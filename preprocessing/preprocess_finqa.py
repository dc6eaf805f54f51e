"""From FinQA's raw JSON to clean CSVs.

    python -m preprocessing.preprocess_finqa [--dataset FinQA] [--split train|dev|test|all] [--data-dir D]

Reads  D/FinQA/{train,dev,test}.json (python -m preprocessing.download_finqa makes them; FinQA-mini is shipped)
Writes D/clean/FinQA/{train,dev,test}.csv: pre_text, post_text, table, question, answer (the label), program, id, and
       where the data set has them stated_answer (what the report's annotator wrote), family, family_kind; beside each
       its run manifest {split}.run.json

Rows without a question or a label, or of another shape, are dropped; the summary counts them by reason, the manifest
names them. A second row of one id is kept as `<id>#2`. Where more than --max-failed-share of the rows of a split are
dropped, the files are written all the same, and the exit code is not zero.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass

from finqa.runtime.command_line import flag, from_args
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.journal import only_run_on
from finqa.runtime.paths import Folders
from finqa.task.datasets import Dataset, rows_file
from finqa.task.records import write_questions
from preprocessing.rows import Rows, stage_parser
from preprocessing.summary import Summary, by_reason, count


@dataclass(frozen=True)
class Dropping:
    """How many rows may be dropped."""

    max_failed_share: float = flag(0.2, metavar="SHARE", least=0, most=1)
    """Rows that were dropped, as a share, above which the exit code is not zero."""


def main() -> None:
    args = stage_parser(__doc__, Dropping).parse_args()
    folders, (data, splits) = Folders.from_args(args), from_args(Rows, args).chosen
    for split in splits:
        rows_file("raw", data, split, folders)  # before anything is written
    most, too_many = from_args(Dropping, args).max_failed_share, []
    for split in splits:
        with only_run_on(folders.clean(data.name, split)):
            summary = preprocess_split(data, split, folders)
        print(summary, flush=True)
        if summary.left_out_share > most:
            too_many.append(f"{summary.left_out_share:.0%} of the rows of {folders.raw(data.name, split)}")
    if too_many:
        raise UserError(
            f"dropped {', '.join(too_many)}, more than --max-failed-share {most:g}; the manifest beside each clean CSV "
            "says why"
        )


def preprocess_split(data: Dataset, split: str, folders: Folders) -> Summary:
    """Write the clean CSV of one split. Raises UserError where the raw file holds no usable row."""
    start = time.monotonic()
    raw, clean = folders.raw(data.name, split), folders.clean(data.name, split)
    loaded = data.load(raw)
    dropped = count(row.reason for row in loaded.dropped)
    if dropped and not loaded.questions:
        raise UserError(f"{raw} holds no usable question: all {dropped.total()} rows dropped{by_reason(dropped)}")
    write_questions(clean, loaded.questions)

    rows = len(loaded.questions) + len(loaded.dropped)
    summary = Summary(data.name, split, rows, dropped, time.monotonic() - start, clean)
    summary.write_manifest({}, raw, dropped_rows=[asdict(row) for row in loaded.dropped])
    return summary


if __name__ == "__main__":
    sys.exit(report_errors(main))
