from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest
from command_fixture import Command, the_one_line

from finqa.task.records import TeacherRow, read_teacher_rows, write_teacher_rows
from preprocessing.filter_valid_answers import rejection

PUBLISHED = ("prompt", "generated_code", "actual_answer", "expected_answer")


def row(code: str = "ans = 1", actual: str = "1.0", expected: str = "1", **more: str) -> TeacherRow:
    return TeacherRow("###Passage:\np\n###Question:\nq\n###Python", code, actual, expected, **more)


def folder(data_dir: Path) -> Path:
    return data_dir / "clean_with_code/FinQA"


def write_generated(data_dir: Path, rows: list[TeacherRow]) -> None:
    write_teacher_rows(folder(data_dir) / "finqa_train_generated.csv", rows)


def filtered(data_dir: Path) -> list[TeacherRow]:
    return read_teacher_rows(folder(data_dir) / "finqa_train_generated_filtered.csv")


def rejected(data_dir: Path) -> list[dict[str, str]]:
    with (folder(data_dir) / "finqa_train_generated_rejected.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("judged", "reason"),
    [
        (row(), ""),
        (row(actual="0.14464", expected="0.144640001"), ""),
        (row(actual="True", expected="yes"), ""),
        (row(actual="no", expected="no"), ""),
        (row(actual="257", expected="257.0"), ""),
        (row(actual="2.0"), "wrong-answer"),
        (row(actual="14.464", expected="0.14464"), "wrong-answer"),
        (row(actual="1.0", expected="yes"), "wrong-answer"),
        (row(actual="nan", expected="nan"), "wrong-answer"),
        (row(actual=""), "no-answer"),
        (row(actual="", error_kind="cpu-time"), "cpu-time"),
        (row(code="", actual=""), "no-program"),
        (row(code=" \n", actual="1.0"), "no-program"),
        (row(code="", actual="", error_kind="teacher-length"), "teacher-length"),
    ],
)
def test_a_row_is_kept_or_rejected_for_a_reason(judged: TeacherRow, reason: str) -> None:
    assert rejection(judged, "strict") == reason


def test_every_row_lands_in_one_of_the_two_files_in_order(command: Command, tmp_path: Path) -> None:
    rows = [row(id=str(i), actual=str(i % 3), expected="1") for i in range(10)]
    write_generated(tmp_path, rows)

    done = command("filter_valid_answers", "--split", "train")

    assert [r.id for r in filtered(tmp_path)] == ["1", "4", "7"]
    assert [r["id"] for r in rejected(tmp_path)] == ["0", "2", "3", "5", "6", "8", "9"]
    assert {r["reason"] for r in rejected(tmp_path)} == {"wrong-answer"}
    assert "FinQA train: 10 rows in, 3 kept, 7 rejected (wrong-answer 7)" in done.stdout


def test_the_table_of_reasons_accounts_for_every_row(command: Command, tmp_path: Path) -> None:
    right, wrong, silent = row(), row(actual="3"), row(actual="", error_kind="cpu-time")
    write_generated(tmp_path, [right] * 3 + [wrong] * 4 + [silent] + [row(code="", actual="")] * 2)

    lines = command("filter_valid_answers", "--split", "train").stdout.splitlines()

    assert lines[0].startswith("FinQA train: 10 rows in, 3 kept, 7 rejected")
    assert [line.split() for line in lines[1:]] == [
        ["reason", "rows", "share"],
        ["kept", "3", "30.0%"],
        ["wrong-answer", "4", "40.0%"],
        ["no-program", "2", "20.0%"],
        ["cpu-time", "1", "10.0%"],
    ]
    assert len(rejected(tmp_path)) == 7


def test_an_empty_file_has_an_empty_table(command: Command, tmp_path: Path) -> None:
    write_generated(tmp_path, [])
    last = command("filter_valid_answers", "--split", "train").stdout.splitlines()[-1]
    assert last.split() == ["kept", "0", "0.0%"]


def test_a_published_file_with_four_columns_loads(command: Command, tmp_path: Path) -> None:
    folder(tmp_path).mkdir(parents=True)
    with (folder(tmp_path) / "finqa_train_generated.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, PUBLISHED)
        writer.writeheader()
        writer.writerow({c: getattr(row(actual="1"), c) for c in PUBLISHED})
        writer.writerow({c: getattr(row(actual="3"), c) for c in PUBLISHED})

    done = command("filter_valid_answers", "--split", "train")

    assert done.returncode == 0, done.stderr
    assert [r.actual_answer for r in filtered(tmp_path)] == ["1"]
    assert [r["reason"] for r in rejected(tmp_path)] == ["wrong-answer"]


def test_the_recorded_answer_is_believed_and_rerun_is_not_fooled(command: Command, tmp_path: Path) -> None:
    write_generated(tmp_path, [row("ans = 2", actual="1", id="lie"), row("ans = 1", actual="", id="never run")])

    command("filter_valid_answers", "--split", "train")
    assert [r.id for r in filtered(tmp_path)] == ["lie"]

    command("filter_valid_answers", "--split", "train", "--rerun")
    assert [(r.id, r.actual_answer) for r in filtered(tmp_path)] == [("never run", "1.0")]
    assert [(r["id"], r["actual_answer"], r["reason"]) for r in rejected(tmp_path)] == [("lie", "2.0", "wrong-answer")]


def test_a_looser_rule_keeps_more(command: Command, tmp_path: Path) -> None:
    write_generated(tmp_path, [row(actual="14.464", expected="0.14464")])

    command("filter_valid_answers", "--split", "train", "--rule", "relaxed")

    assert len(filtered(tmp_path)) == 1


def test_a_missing_generated_file_is_one_line_with_the_remedy(command: Command) -> None:
    line = the_one_line(command("filter_valid_answers"))
    assert "finqa_train_generated.csv is missing" in line
    assert line.endswith(f"make it with: python -m preprocessing.download_finqa --data-dir {command.data_dir}\n")


def test_missing_columns_are_one_line(command: Command, tmp_path: Path) -> None:
    folder(tmp_path).mkdir(parents=True)
    (folder(tmp_path) / "finqa_train_generated.csv").write_text("prompt,code\na,b\n")

    line = the_one_line(command("filter_valid_answers", "--split", "train"))

    assert "generated_code" in line and "actual_answer" in line


@pytest.mark.skipif("FINQA_ROWS" not in os.environ, reason="FINQA_ROWS names no folder with real rows")
def test_the_program_teacher_keeps_every_real_row(command: Command, tmp_path: Path) -> None:
    shutil.copytree(Path(os.environ["FINQA_ROWS"]) / "raw", tmp_path / "FinQA")

    command("preprocess_finqa", "--split", "all")
    command("process_finqa_code_generation", "--teacher", "program", "--split", "all")
    done = command("filter_valid_answers", "--split", "all")

    assert done.returncode == 0, done.stderr
    for split in ("train", "dev", "test"):
        rows = read_teacher_rows(folder(tmp_path) / f"finqa_{split}_generated.csv")
        kept = read_teacher_rows(folder(tmp_path) / f"finqa_{split}_generated_filtered.csv")
        assert rows and kept == rows


def test_a_filter_that_keeps_no_row_says_so_and_exits_with_an_error(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "clean_with_code/FinQA/finqa_train_generated.csv"
    write_teacher_rows(path, [TeacherRow("p", "ans = 2", "2.0", "1")])
    line = the_one_line(command("filter_valid_answers", "--split", "train"))
    assert "no row of train was kept" in line and "finqa_train_generated_rejected.csv" in line
    assert path.with_name("finqa_train_generated_rejected.csv").exists()
