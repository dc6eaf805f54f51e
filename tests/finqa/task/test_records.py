"""The CSVs between the stages keep every text as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finqa.runtime.errors import UserError
from finqa.task.records import (
    Question,
    TeacherRow,
    format_table,
    parse_table,
    read_questions,
    read_teacher_rows,
    write_questions,
    write_rejected,
    write_teacher_rows,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=30)


@given(TEXT, TEXT, TEXT)
def test_any_text_survives_the_csv(tmp_path_factory: pytest.TempPathFactory, pre: str, question: str, answer: str):
    path = tmp_path_factory.mktemp("csv") / "test.csv"
    written = [Question("1", pre, "post", [["a", "NA"], ["null", "1.0"]], question, answer, "add(1, 2)")]
    write_questions(path, written)
    assert read_questions(path) == written


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path):
    with pytest.raises(UserError, match=r"missing; make it with: python -m preprocessing\.preprocess_finqa"):
        read_questions(tmp_path / "no.csv")


def test_a_missing_column_is_named(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,generated_code\na,b\n")
    with pytest.raises(UserError, match="lacks the column actual_answer, expected_answer"):
        read_teacher_rows(path)


def test_rows_of_commas_alone_are_no_rows(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,generated_code,actual_answer,expected_answer\np,ans = 1,1.0,1\n,,,\n,,,\n")
    assert read_teacher_rows(path) == [TeacherRow("p", "ans = 1", "1.0", "1")]


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_signs_between_the_columns_are_named_without_a_command_that_would_replace_the_file(
    tmp_path: Path, sign: str, name: str
):
    path = tmp_path / "x.csv"
    path.write_text("prompt,generated_code,actual_answer,expected_answer\np,ans = 1,1.0,1\n".replace(",", sign))
    with pytest.raises(UserError, match=f"has {name} between its columns; save it with commas") as raised:
        read_teacher_rows(path)
    assert "python -m" not in str(raised.value)


def test_published_files_of_four_columns_load(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text('prompt,generated_code,actual_answer,expected_answer\np,"ans = 1\n",1.0,1\n')
    assert read_teacher_rows(path) == [TeacherRow("p", "ans = 1\n", "1.0", "1")]


def test_rejected_rows_keep_their_reason_and_load_as_rows(tmp_path: Path):
    row = TeacherRow("p", "ans = 2", "2", "1", id="7")
    write_rejected(tmp_path / "r.csv", [(row, "wrong-answer")])
    assert "wrong-answer" in (tmp_path / "r.csv").read_text()
    assert read_teacher_rows(tmp_path / "r.csv") == [row]


def test_family_columns_appear_only_where_there_are_families(tmp_path: Path):
    write_teacher_rows(tmp_path / "a.csv", [TeacherRow("p", "c", "1", "1")])
    write_teacher_rows(tmp_path / "b.csv", [TeacherRow("p", "c", "1", "1", family="change", family_kind="known")])
    assert "family" not in (tmp_path / "a.csv").read_text()
    assert read_teacher_rows(tmp_path / "b.csv")[0].family_kind == "known"


def test_the_stated_answer_is_a_column_after_the_id_where_any_row_has_one(tmp_path: Path):
    questions = [Question("1", "", "", [], "q", "0.25", stated_answer="25%"), Question("2", "", "", [], "q", "7")]
    rows = [TeacherRow("p", "c", "1", "1", id="1", stated_answer="$ 1"), TeacherRow("p", "c", "1", "1", id="2")]
    clean, generated = tmp_path / "clean.csv", tmp_path / "generated.csv"
    write_questions(clean, questions)
    write_teacher_rows(generated, rows)
    assert clean.read_text().splitlines()[0].endswith(",id,stated_answer")
    assert ",id,stated_answer," in generated.read_text().splitlines()[0]
    assert read_questions(clean) == questions and read_teacher_rows(generated) == rows
    write_questions(clean, questions[1:])
    write_teacher_rows(generated, rows[1:])
    assert "stated_answer" not in clean.read_text() + generated.read_text()
    assert read_questions(clean) == questions[1:] and read_teacher_rows(generated) == rows[1:]


def test_a_pipe_or_line_break_in_a_cell_does_not_break_the_table():
    table = [["a|b", "c\nd"], ["e", "f"]]
    assert parse_table(format_table(table)) == [["a/b", "c d"], ["e", "f"]]


def test_an_empty_split_is_valid(tmp_path: Path):
    write_questions(tmp_path / "q.csv", [])
    write_teacher_rows(tmp_path / "t.csv", [])
    assert read_questions(tmp_path / "q.csv") == [] and read_teacher_rows(tmp_path / "t.csv") == []
