"""The shipped data set through the three commands, without a copy of it in the data folder."""

from __future__ import annotations

from pathlib import Path

from command_fixture import Command

from finqa.task.records import read_questions, read_teacher_rows


def test_the_program_teacher_keeps_every_shipped_dev_row_with_its_family(command: Command, tmp_path: Path) -> None:
    flags = ("--dataset", "FinQA-mini", "--split", "dev")

    for stage in (("preprocess_finqa",), ("process_finqa_code_generation", "--teacher", "program")):
        done = command(*stage, *flags)
        assert done.returncode == 0, done.stderr
    done = command("filter_valid_answers", *flags)

    assert done.returncode == 0, done.stderr
    questions = read_questions(tmp_path / "clean/FinQA-mini/dev.csv")
    kept = read_teacher_rows(tmp_path / "clean_with_code/FinQA-mini/finqa-mini_dev_generated_filtered.csv")
    assert [(row.id, row.family, row.family_kind) for row in kept] == [
        (question.id, question.family, question.family_kind) for question in questions
    ]
    assert {row.family_kind for row in kept} == {"known", "new"}
