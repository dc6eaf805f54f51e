"""The preprocessing benchmark: its pages are as long as real ones, its rows are valid, its record says what it ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.bench_preprocessing import TEXT_CHARACTERS, split_sizes, write_raw_files
from finqa.runtime.paths import REPOSITORY, SPLITS, Folders
from finqa.task.answers import match
from finqa.task.datasets import load_finqa
from finqa.task.programs import execute


def test_the_sizes_are_finqas_and_add_up():
    assert split_sizes(8281) == {"train": 6251, "dev": 883, "test": 1147}
    assert sum(split_sizes(100).values()) == 100


def test_pages_are_as_long_as_real_ones_and_labels_are_their_programs_results(tmp_path: Path):
    folders = Folders(data=tmp_path)
    sizes = write_raw_files(folders, 300)
    loaded = [load_finqa(folders.raw("FinQA", split)) for split in SPLITS]
    questions = [question for split in loaded for question in split.questions]
    assert len(questions) == 300 and not any(split.dropped for split in loaded)
    assert all(match(execute(q.program, q.table), q.answer) for q in questions)
    assert abs(sizes["text_characters"] - TEXT_CHARACTERS[0]) < 300
    assert 5.5 < sizes["table_rows"] < 7


def test_the_command_runs_the_stages_and_writes_its_record(tmp_path: Path):
    flags = ["--questions", "40", "--cores", "1", "--repeats", "2", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_preprocessing", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "preprocessing.json").read_text())
    assert record["questions"] == 40 and record["wall_s"]["all stages"]["repeats"] == 2
    parts = [record["processor_s"][stage]["lowest"] for stage in record["processor_s"] if stage != "all stages"]
    assert len(parts) == 3 and min(parts) > 0
    assert "| all stages" in (tmp_path / "preprocessing.md").read_text()
