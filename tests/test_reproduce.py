"""docs/reproduce.md says what the records say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.mistral_7b import TRAIN_ROWS
from finqa.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "reproduce.md").read_text()
RECORDS = REPOSITORY / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("row", "record", "variant"),
    [
        ("packed, compiled layers, CUDA graphs", "lora_7b_1_row", "1 row, + CUDA graphs"),
        ("`--fp8-base` (other rounding", "lora_7b_1_row", "1 row, + fp8 base"),
        ("transformers as it comes", "lora_7b_1_row", "1 row, plain"),
        ("the default on an H100", "lora_7b_1_row_h100", "1 row, + CUDA graphs"),
        ("`--fp8-base` there (H100)", "lora_7b_1_row_h100", "1 row, + fp8 base"),
        ("plain transformers there (H100)", "lora_7b_1_row_h100", "1 row, plain"),
        ("`--gradient-checkpointing yes`", "lora_7b_24gb", "1 row, checkpointing"),
        ("base in 4 bits (`-F`)", "lora_7b_24gb", "1 row, 4-bit"),
    ],
)
def test_each_row_of_the_training_table_is_that_of_its_record(row: str, record: str, variant: str):
    measured = json.loads((RECORDS / f"{record}.json").read_text())["variants"][variant]
    [line] = [line for line in PAGE.splitlines() if line.startswith("|") and row in line]
    n, ms, minutes, peak = (float(cell) for cell in line.split("|")[2:6])
    assert (n, ms, peak) == (measured["steps"], round(measured["ms_a_step"]), measured["peak_memory_gb"])
    # The epoch is scaled by tokens, as the rows of a benchmark are not quite as long as the data set's.
    table = (RECORDS / f"{record}.md").read_text()
    [recorded] = [line for line in table.splitlines() if line.startswith(f"| {variant} ")]
    assert minutes == float(recorded.split("|")[5]) == pytest.approx(ms * TRAIN_ROWS / 6e4, rel=0.2)


def test_the_diff_takes_what_its_record_says():
    record = json.loads((RECORDS / "diff.json").read_text())
    seconds = [round(record["seconds"][stage]) for stage in ("collect", "train", "analyse")]
    assert f"| {' + '.join(map(str, seconds))} s at the H200's speed" in PAGE


def test_the_files_and_flags_it_names_exist():
    for name in re.findall(r"`((?:benchmarks|finqa|docs)/[\w/.]+)`", PAGE):
        assert Path(REPOSITORY / name).exists(), name
    sources = "".join(path.read_text() for folder in (".", "finqa", "preprocessing")
                      for path in (REPOSITORY / folder).glob("**/*.py" if folder != "." else "*.py"))  # fmt: skip
    for flag in set(re.findall(r"`?(--[a-z0-9][a-z0-9-]+)", PAGE)):
        assert f'"{flag}"' in sources, flag
