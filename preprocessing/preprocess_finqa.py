"""From FinQA's raw JSON to clean CSVs.

    python -m preprocessing.preprocess_finqa [--dataset FinQA] [--split train|dev|test|all] [--data-dir D]

Reads  D/FinQA/{train,dev,test}.json (python -m preprocessing.download_finqa makes them; FinQA-mini is shipped)
Writes D/clean/FinQA/{train,dev,test}.csv: pre_text, post_text, table, question, answer (the label), program, id, and
       where the data set has them stated_answer (what the report's annotator wrote), family, family_kind; beside each
       its run manifest {split}.run.json

Rows without a question or an answer, or of another shape, are dropped; the summary counts them by reason, the
manifest names them. A second row of one id is kept as `<id>#2`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from finqa.runtime.command_line import add_flags, from_args, script_parser
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.manifest import file_hash, write_manifest
from finqa.runtime.paths import Folders, add_folder_flags
from finqa.task.datasets import Dataset, rows_file
from finqa.task.records import write_questions
from preprocessing.rows import Rows
from preprocessing.summary import Summary, by_reason, count, manifest_of


def main() -> None:
    parser = script_parser(__doc__)
    add_flags(parser, Rows)
    add_folder_flags(parser, results=False)
    args = parser.parse_args()
    folders, (data, splits) = Folders.from_args(args), from_args(Rows, args).chosen
    for split in splits:
        rows_file("raw", data, split, folders)  # before anything is written
    for split in splits:
        print(preprocess_split(data, split, folders), flush=True)


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
    summary = Summary(f"{data.name} {split}", rows, dropped, time.monotonic() - start, clean)
    write_manifest(
        manifest_of(clean),
        {"dataset": data.name, "split": split},
        inputs={Path(raw).name: file_hash(raw)},
        dropped_rows=[{"id": row.id, "reason": row.reason} for row in loaded.dropped],
        **summary.facts(),
    )
    return summary


if __name__ == "__main__":
    sys.exit(report_errors(main))
