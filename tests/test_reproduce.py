"""docs/reproduce.md says what the records say."""

from __future__ import annotations

import json

import pytest

from benchmarks.bench_evaluation import ALONE, BASE, CALLS, PROJECT
from benchmarks.parts.mistral_7b import TRAIN_ROWS
from finqa.runtime.paths import REPOSITORY

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


def test_the_rows_of_one_and_two_processes_are_those_of_their_records():
    table = PAGE.partition("**One and two H200s of one host**")[2].partition("Fine-tuning without recorded steps")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
    recorded = []
    for name in ("processes", "processes_steps", "processes_engines"):
        one, two = json.loads((RECORDS / f"{name}.json").read_text())["processes"].values()
        recorded += [[_told(one[stage]), _told(two[stage]), f"{two[stage]['efficiency']:.2f}"] for stage in one]
    assert sorted(row[1:] for row in rows) == sorted(recorded)


def _told(stage: dict[str, float]) -> str:
    if "ms_an_update" in stage:
        return f"{stage['ms_an_update']:.1f}"
    if "ms_a_step" in stage:
        return f"{stage['ms_a_step']:.2f}"
    return f"{stage.get('tokens_per_second') or stage['replies_per_second']:,}"


def test_evaluation_takes_what_its_records_say():
    base, adapted = (json.loads((RECORDS / f"{name}.json").read_text()) for name in ("evaluation", "evaluation_lora"))
    project, alone, calls = (base["ways"][name] for name in (PROJECT, ALONE, CALLS))
    seconds = [round(record["ways"][PROJECT]["seconds"]["median"]) for record in (base, adapted)]
    starts = [round(record["engine"]["start_seconds"]) for record in (base, adapted)]
    line = f"| {seconds[0]} s for 1,104 prompts by the base, {seconds[1]} s with the adapter, on an H100; "
    assert f"{line}{starts[0]} and {starts[1]} s before that to start the engine" in PAGE
    assert project["prompts"] == alone["prompts"] == adapted["ways"][PROJECT]["prompts"] == 1104
    prose = " ".join(PAGE.split())
    assert f"({project['tokens_in'] / 1104:,.0f} tokens on average) with replies of 131 tokens each" in prose
    assert project["tokens_out"] == 131 * 1104
    assert f"({project['rate_against_vllm_alone']:.2f} times its rate)" in prose
    assert f"calls of eight prompts reached {calls['rate_against_vllm_alone']:.2f} of it" in prose
    slower = adapted["ways"][BASE]["prompts_per_second"] / adapted["ways"][PROJECT]["prompts_per_second"]
    assert f"at rank {adapted['lora_r']} that takes {slower:.1f} times the base's time" in prose


def test_merging_takes_what_its_record_says():
    ours = json.loads((RECORDS / "merge.json").read_text())["layers"]["32"]["a matrix at a time"]
    told = (
        f"took {ours['seconds']:.0f} s on two CPU cores and {ours['peak_bytes'] / 1e9:.1f} GB of the machine's memory"
    )
    assert told in " ".join(PAGE.split())
