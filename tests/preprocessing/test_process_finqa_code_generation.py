from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from command_fixture import Command, the_one_line
from made_up_rows import PROGRAMS, every_operation, raw_row, write_raw

from finqa.task.prompts import page_from_prompt
from finqa.task.records import TeacherRow, read_questions, read_teacher_rows


def generated(data_dir: Path, split: str = "train") -> list[TeacherRow]:
    return read_teacher_rows(data_dir / "clean_with_code" / "FinQA" / f"finqa_{split}_generated.csv")


def with_program_teacher(command: Command, *flags: str) -> None:
    for done in (
        command("preprocess_finqa", *flags),
        command("process_finqa_code_generation", "--teacher", "program", *flags),
    ):
        assert done.returncode == 0, done.stderr


def test_the_program_teacher_solves_every_operation(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=every_operation("train"), dev=[raw_row()])

    with_program_teacher(command)

    for row, name in zip(generated(tmp_path), PROGRAMS, strict=True):
        assert row.id == f"MADE/train/{name}"
        assert row.error_kind == "" and row.actual_answer, row
        if row.expected_answer in ("yes", "no"):
            assert row.actual_answer == row.expected_answer
        else:
            assert float(row.actual_answer) == pytest.approx(float(row.expected_answer), abs=5.01e-6)


def test_the_columns_are_the_documented_ones(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row()])

    with_program_teacher(command, "--split", "train")

    with (tmp_path / "clean_with_code/FinQA/finqa_train_generated.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert header[:5] == ["prompt", "generated_code", "actual_answer", "expected_answer", "id"]
    assert {"finish_reason", "error_kind"} <= set(header)


def test_the_program_teacher_writes_in_the_style_that_is_asked_for(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row()])
    assert command("preprocess_finqa", "--split", "train").returncode == 0
    asked = ("process_finqa_code_generation", "--split", "train", "--style", "formula-first")

    assert "--style needs --teacher program" in command(*asked).stderr
    assert command(*asked, "--teacher", "program").returncode == 0

    assert generated(tmp_path)[0].generated_code.startswith("# ")
    manifest = json.loads((tmp_path / "clean_with_code/FinQA/finqa_train_generated.run.json").read_text())
    assert manifest["config"]["style"] == "formula-first"


def test_the_prompt_is_the_fine_tuning_prompt_and_holds_the_page(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row()])

    with_program_teacher(command, "--split", "train")

    prompt = generated(tmp_path)[0].prompt
    question = read_questions(tmp_path / "clean/FinQA/train.csv")[0]
    assert prompt.startswith("Read the following passage") and prompt.endswith("###Python")
    assert page_from_prompt(prompt).question == question.question
    assert page_from_prompt(prompt).table == question.table


def test_there_is_one_row_for_each_clean_row_even_where_the_teacher_fails(command: Command, tmp_path: Path) -> None:
    rows = [raw_row("a"), raw_row("b", "no program", exe_ans=1), raw_row("c", "", exe_ans=1), raw_row("d")]
    write_raw(tmp_path, train=rows)
    command("preprocess_finqa", "--split", "train")

    done = command(
        "process_finqa_code_generation", "--teacher", "program", "--split", "train", "--max-failed-share", "0.5"
    )

    assert done.returncode == 0, done.stderr
    rows = generated(tmp_path)
    assert [row.id for row in rows] == ["a", "b", "c", "d"]
    assert [bool(row.generated_code) for row in rows] == [True, False, False, True]
    assert [row.error_kind for row in rows] == ["", "teacher-program", "teacher-program", ""]
    assert "4 rows in, 2 with a program, 2 without (teacher-program 2)" in done.stdout


def test_too_many_failures_are_an_error_after_the_files_are_written(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row("a"), raw_row("b", "no program", exe_ans=1)])
    command("preprocess_finqa", "--split", "train")

    done = command("process_finqa_code_generation", "--teacher", "program", "--split", "train")

    line = the_one_line(done)
    assert "50%" in line and "--max-failed-share" in line and "no program" in line
    assert len(generated(tmp_path)) == 2


def test_floats_survive_the_file(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row("third", "divide(1, 3)"), raw_row("large", "multiply(123456789.125, 1000)")])

    with_program_teacher(command, "--split", "train")

    assert [float(row.actual_answer) for row in generated(tmp_path)] == [1 / 3, 123456789125.0]


def test_a_row_whose_program_does_not_run_keeps_the_program_and_says_why(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row("a"), raw_row("b", "divide(1, 0)", exe_ans=1)])

    command("preprocess_finqa", "--split", "train")
    done = command("process_finqa_code_generation", "--teacher", "program", "--split", "train")

    assert done.returncode == 0, done.stderr
    assert "1 programs do not run (runtime 1)" in done.stdout
    row = generated(tmp_path)[1]
    assert row.generated_code and row.actual_answer == ""
    assert row.error_kind and "ZeroDivisionError" in row.error_message


def test_empty_splits_are_valid(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path)

    with_program_teacher(command)
    done = command("filter_valid_answers")

    assert done.returncode == 0, done.stderr
    assert [generated(tmp_path, split) for split in ("train", "dev", "test")] == [[], [], []]
    assert "FinQA dev: 0 rows in, 0 kept" in done.stdout


def test_an_absent_id_column_is_valid(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row("a"), raw_row("b")])
    command("preprocess_finqa", "--split", "train")
    path = tmp_path / "clean/FinQA/train.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [c for c in rows[0] if c != "id"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)

    done = command("process_finqa_code_generation", "--teacher", "program", "--split", "train")

    assert done.returncode == 0, done.stderr
    assert [(row.id, bool(row.actual_answer)) for row in generated(tmp_path)] == [("", True), ("", True)]


def test_limit_takes_the_first_rows(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=every_operation("train"))
    command("preprocess_finqa", "--split", "train")

    command("process_finqa_code_generation", "--teacher", "program", "--split", "train", "--limit", "3")

    assert [row.id.rpartition("/")[2] for row in generated(tmp_path)] == ["add", "subtract", "multiply"]


def test_the_manifest_says_who_taught_what_from_which_input(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=every_operation("train"), dev=[raw_row()])

    with_program_teacher(command)

    folder = tmp_path / "clean_with_code/FinQA"
    manifest = json.loads((folder / "finqa_train_generated.run.json").read_text())
    assert manifest["config"] == {"dataset": "FinQA", "split": "train", "teacher": "program", "style": "plain"}
    assert manifest["rows"] == manifest["kept"] == len(PROGRAMS)
    assert len(manifest["inputs"]["train.csv"]) == 64
    assert (folder / "finqa_dev_generated.run.json").exists()


@pytest.mark.parametrize("flags", [("--teacher", "program"), ()], ids=["program", "openai"])
def test_missing_clean_files_are_one_line_with_the_remedy(command: Command, flags: tuple[str, ...]) -> None:
    line = the_one_line(command("process_finqa_code_generation", *flags))
    assert "train.csv is missing" in line
    assert line.endswith(f"make it with: python -m preprocessing.download_finqa --data-dir {command.data_dir}\n")


@pytest.mark.parametrize(
    "script", ["download_finqa", "preprocess_finqa", "process_finqa_code_generation", "filter_valid_answers"]
)
def test_importing_a_script_imports_nothing_heavy(script: str) -> None:
    import subprocess
    import sys

    code = (
        f"import sys, preprocessing.{script}; "
        "print([m for m in ('torch', 'openai', 'pandas', 'transformers', 'vllm', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("operand", ["–12", "1.5 million", "0x10", "1_000", "const_x"])
def test_an_operand_that_is_no_number_is_the_reason_of_its_row(command: Command, tmp_path: Path, operand: str) -> None:
    write_raw(tmp_path, train=[raw_row("bad", f"add({operand}, 1)", exe_ans=1), *every_operation("train")])
    command("preprocess_finqa", "--split", "train")

    done = command("process_finqa_code_generation", "--teacher", "program", "--split", "train")

    assert done.returncode == 0 and "1 without (teacher-program 1)" in done.stdout, done.stderr
    row = read_teacher_rows(tmp_path / "clean_with_code/FinQA/finqa_train_generated.csv")[0]
    assert row.error_message == f"step 0: {operand!r} is not a number" and not row.generated_code
