"""`make data`: from the download to the filtered CSVs in one command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from file_server import FileServer, blob_id, running_file_server
from made_up_rows import every_operation, raw_row

from finqa.runtime.paths import REPOSITORY, SPLITS
from finqa.task.records import TeacherRow, read_teacher_rows, write_teacher_rows

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@dataclass(frozen=True)
class MakeData:
    """Runs `make data` with this interpreter; what the server has counts as the official files."""

    data_dir: Path
    server: FileServer

    def __call__(self) -> subprocess.CompletedProcess[str]:
        ids = {split: blob_id(self.server.files[f"{split}.json"]) for split in SPLITS}
        return subprocess.run(
            [
                *("make", "--no-print-directory", "data", f"DATA_DIR={self.data_dir}", f"URL_BASE={self.server.url}"),
                *("READY=", f"VENV={os.path.relpath(sys.prefix, REPOSITORY)}"),
            ],
            cwd=REPOSITORY,
            env=os.environ
            | {"PYTHONPATH": str(Path(__file__).parent / "made_up_official"), "OFFICIAL_BLOB_IDS": json.dumps(ids)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def csv(self, split: str, what: str) -> Path:
        return self.data_dir / "clean_with_code" / "FinQA" / f"finqa_{split}_{what}.csv"

    def files(self) -> dict[str, tuple[int, int]]:
        """Every CSV of programs, with its inode and time of change: the same only where it was not written again."""
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.csv("", "").parent.iterdir()}


@pytest.fixture
def make_data(tmp_path: Path) -> Iterator[MakeData]:
    with running_file_server() as server:
        wrong = raw_row("MADE/wrong", exe_ans=7)
        rows = {"train": [*every_operation("train"), wrong], "dev": [raw_row("MADE/d")], "test": [raw_row("MADE/t")]}
        server.files = {f"{split}.json": json.dumps(rows[split]).encode() for split in SPLITS}
        yield MakeData(tmp_path / "with a space", server)


def test_one_command_makes_the_filtered_csvs_and_a_second_run_writes_no_program(make_data: MakeData) -> None:
    done = make_data()
    assert done.returncode == 0, done.stderr
    assert [row.id for row in read_teacher_rows(make_data.csv("train", "generated_rejected"))] == ["MADE/wrong"]
    kept = {split: len(read_teacher_rows(make_data.csv(split, "generated_filtered"))) for split in SPLITS}
    assert kept == {"train": len(every_operation("train")), "dev": 1, "test": 1}

    files, requests = make_data.files(), len(make_data.server.ranges)
    again = make_data()
    assert again.returncode == 0, again.stderr
    assert make_data.files() == files and len(make_data.server.ranges) == requests
    assert again.stdout.count("already there") == 2 * len(SPLITS)


def test_it_stops_at_the_first_stage_that_fails_with_its_line(make_data: MakeData) -> None:
    make_data.server.status = 404
    done = make_data()
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ") and "train.json: HTTP 404" in lines[0]
    assert [line for line in lines[1:] if not line.startswith("make")] == []
    assert not (make_data.data_dir / "clean").exists()

    make_data.server.status = None
    assert make_data().returncode == 0


def test_a_failing_teacher_stops_it_before_the_filter_each_time(make_data: MakeData) -> None:
    make_data.server.files["dev.json"] = json.dumps([raw_row("MADE/d", "no program", exe_ans=1)]).encode()
    for _ in range(2):
        done = make_data()
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert len(errors) == 1 and "finqa_dev_generated.csv" in errors[0] and "no program" in errors[0]
        assert make_data.csv("train", "generated_filtered").exists()
        assert not make_data.csv("dev", "generated_filtered").exists()
        assert not make_data.csv("test", "generated").exists()


def test_published_files_that_were_dropped_in_are_kept(make_data: MakeData) -> None:
    """A generated file is filtered; a filtered one is left as it is, and no teacher writes beside it."""
    published = [TeacherRow("p", "ans = 1", "1.0", "1"), TeacherRow("p", "ans = 2", "2.0", "1")]
    write_teacher_rows(make_data.csv("train", "generated"), published)
    write_teacher_rows(make_data.csv("dev", "generated_filtered"), published)
    before = make_data.files()

    done = make_data()

    assert done.returncode == 0, done.stderr
    assert before.items() <= make_data.files().items()
    assert read_teacher_rows(make_data.csv("train", "generated_filtered")) == published[:1]
    assert not make_data.csv("dev", "generated").exists()
    assert make_data.csv("test", "generated_filtered").exists()


@pytest.mark.parametrize("lost", ["generated", "generated_filtered", "generated_filtered.run"])
def test_what_a_killed_run_did_not_write_is_made(make_data: MakeData, lost: str) -> None:
    """Files that a stage writes after another: lost is what the kill kept from being written, and what follows."""
    order = ["generated.csv", "generated.run.json", "generated_filtered.csv", "generated_rejected.csv"]
    order += ["generated_filtered.run.json"]
    assert make_data().returncode == 0
    whole = set(make_data.files())
    first = next(i for i, name in enumerate(order) if name.rpartition(".")[0] == lost)
    for name in order[first:]:
        (make_data.csv("dev", "generated").parent / f"finqa_dev_{name}").unlink()

    assert make_data().returncode == 0
    assert set(make_data.files()) == whole


def test_the_programs_of_another_teacher_are_filtered_and_not_written_again(make_data: MakeData) -> None:
    rows = [TeacherRow("p", "ans = 1", "1.0", "1", id="MADE/d")]
    write_teacher_rows(make_data.csv("dev", "generated"), rows)
    make_data.csv("dev", "generated").with_suffix(".run.json").write_text('{"config": {"teacher": "openai"}}')
    before = make_data.files()

    assert make_data().returncode == 0

    assert before.items() <= make_data.files().items()
    assert read_teacher_rows(make_data.csv("dev", "generated_filtered")) == rows
