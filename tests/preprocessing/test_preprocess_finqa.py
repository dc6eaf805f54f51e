from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from command_fixture import Command, the_one_line
from made_up_rows import TABLE, every_operation, raw_row, write_raw

from finqa.task.records import read_questions


def clean(data_dir: Path, split: str = "train") -> Path:
    return data_dir / "clean" / "FinQA" / f"{split}.csv"


def test_every_split_becomes_a_clean_csv_with_the_documented_columns(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=every_operation("train"), dev=[raw_row()], test=[raw_row()])

    done = command("preprocess_finqa")

    assert done.returncode == 0, done.stderr
    for split in ("train", "dev", "test"):
        with clean(tmp_path, split).open(newline="") as file:
            header = next(csv.reader(file))
        assert header == ["pre_text", "post_text", "table", "question", "answer", "program", "id", "stated_answer"]
    assert "FinQA train: 11 rows in, 11 kept, 0 dropped" in done.stdout


def test_texts_are_joined_by_newlines_and_table_rows_by_bars(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row()])

    command("preprocess_finqa", "--split", "train")

    with clean(tmp_path).open(newline="") as file:
        row = next(csv.DictReader(file))
    assert row["pre_text"].split("\n") == raw_row()["pre_text"]
    assert row["table"].split("\n")[1] == "net sales|$ 1,206.5|$ 1,050.2"


def test_the_label_is_exe_ans_and_answer_where_that_is_empty(command: Command, tmp_path: Path) -> None:
    rows = [raw_row(exe_ans=0.25, answer="25%"), raw_row(exe_ans="yes"), raw_row(exe_ans="", answer="25%")]
    rows += [raw_row(exe_ans=None, answer="7"), raw_row(exe_ans=0, answer="about nothing")]
    write_raw(tmp_path, train=rows)

    command("preprocess_finqa", "--split", "train")

    questions = read_questions(clean(tmp_path))
    assert [q.answer for q in questions] == ["0.25", "yes", "25%", "7", "0"]
    assert [q.stated_answer for q in questions] == ["25%", "about", "25%", "7", "about nothing"]


def test_a_split_in_which_nothing_is_stated_has_no_column_for_it(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row("none", answer=None), raw_row("list", exe_ans=3.5, answer=["25%"])])

    command("preprocess_finqa", "--split", "train")

    assert "stated_answer" not in clean(tmp_path).read_text().splitlines()[0]
    assert [(q.id, q.stated_answer) for q in read_questions(clean(tmp_path))] == [("none", ""), ("list", "")]


def test_rows_without_question_or_answer_or_of_another_shape_are_dropped_and_counted(
    command: Command, tmp_path: Path
) -> None:
    rows = [raw_row("kept"), raw_row("q", question="  "), raw_row("a", exe_ans="", answer=None), {"id": "no qa"}, 7]
    write_raw(tmp_path, train=[*rows, raw_row("table", exe_ans=1, table="a|b")])

    done = command("preprocess_finqa", "--split", "train")

    assert done.returncode == 0, done.stderr
    assert [q.id for q in read_questions(clean(tmp_path))] == ["kept"]
    assert "6 rows in, 1 kept, 5 dropped" in done.stdout
    assert "no question 1" in done.stdout and "no answer 1" in done.stdout
    dropped = json.loads((tmp_path / "clean/FinQA/train.run.json").read_text())["dropped_rows"]
    assert [row["id"] for row in dropped] == ["q", "a", "no qa", "row 4", "table"]


def test_each_split_has_a_manifest_of_its_own(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=every_operation("train"), dev=[raw_row()])

    command("preprocess_finqa")

    manifests = [json.loads((tmp_path / f"clean/FinQA/{s}.run.json").read_text()) for s in ("train", "dev", "test")]
    assert [m["rows"] for m in manifests] == [11, 1, 0]
    assert [m["config"]["split"] for m in manifests] == ["train", "dev", "test"]


HOSTILE = {
    "bar-in-cell": raw_row(table=[["a|b", "2009"], ["net | sales", "7"]], program="add(7, 1)"),
    "newline-in-cell": raw_row(table=[["a", "2009"], ["net\nsales", "7"]], program="add(7, 1)"),
    "carriage-return-in-cell": raw_row(table=[["a", "2009"], ["net\r\nsales\r", "7"]], program="add(7, 1)"),
    "other-line-breaks-in-cell": raw_row(table=[["a", "2009"], ["net\u2028\x0b\x85sales", "7"]], program="add(7, 1)"),
    "quotes-and-commas": raw_row(question='what is "net, sales", in all?', pre_text=['a "quoted", line']),
    "starts-with-equals": raw_row(question="=SUM(A1:A2) of what?"),
    "unicode": raw_row(question="wie hoch war der umsatz in € für 2009 ？ 🧾", pre_text=["naïve \u200b\ufeff café"]),
    "missing-values": raw_row(table=[["NA", "null"], ["nan", "7"], ["None", ""]], program="add(7, 1)", question="NA"),
    "markers": raw_row(question="###Python or ###Question: ?", pre_text=["###End Python"]),
    "no-table": raw_row(table=[], program="add(7, 1)"),
    "empty-texts": raw_row(pre_text=[], post_text=[]),
    "nul": raw_row(pre_text=["a\x00b"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_read_back_as_one_row_of_the_same_shape(command: Command, tmp_path: Path, name: str) -> None:
    row = HOSTILE[name]
    write_raw(tmp_path, train=[raw_row("before"), row | {"id": name}, raw_row("after")])

    done = command("preprocess_finqa", "--split", "train")

    assert done.returncode == 0, done.stderr
    questions = read_questions(clean(tmp_path))
    assert [q.id for q in questions] == ["before", name, "after"]
    assert [len(line) for line in questions[1].table] == [len(line) for line in row["table"]]
    assert questions[1].question == " ".join(row["qa"]["question"].split())
    assert questions[1].answer == str(row["qa"]["exe_ans"])


def test_strings_that_look_like_missing_values_stay_text(command: Command, tmp_path: Path) -> None:
    table = [["", "NA", "null"], ["nan", "None", "1.0"]]
    write_raw(tmp_path, train=[raw_row("NA", table=table, question="null", program="add(1, 1)")])

    command("preprocess_finqa", "--split", "train")

    question = read_questions(clean(tmp_path))[0]
    assert (question.id, question.question, question.table) == ("NA", "null", table)


def test_half_a_character_that_no_file_can_hold_drops_the_row(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row("kept"), raw_row("half", pre_text=["a\ud800b"])])

    done = command("preprocess_finqa", "--split", "train")

    assert done.returncode == 0, done.stderr
    assert [q.id for q in read_questions(clean(tmp_path))] == ["kept"]


def test_rows_without_id_keep_apart(command: Command, tmp_path: Path) -> None:
    rows = [raw_row(), raw_row()]
    for row in rows:
        del row["id"]
    write_raw(tmp_path, train=rows)

    command("preprocess_finqa", "--split", "train")

    ids = [q.id for q in read_questions(clean(tmp_path))]
    assert len(set(ids)) == 2 and all(ids)


def test_family_columns_follow_the_id_where_the_data_set_has_them(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row(family="ratio", family_kind="known")])

    command("preprocess_finqa", "--split", "train")

    with clean(tmp_path).open(newline="") as file:
        assert next(csv.reader(file))[-4:] == ["id", "stated_answer", "family", "family_kind"]


def test_a_missing_raw_file_is_one_line_with_the_remedy_before_anything_is_written(
    command: Command, tmp_path: Path
) -> None:
    write_raw(tmp_path, train=[raw_row()])
    (tmp_path / "FinQA/test.json").unlink()

    done = command("preprocess_finqa")

    line = the_one_line(done)
    assert "test.json is missing" in line and "python -m preprocessing.download_finqa" in line
    assert not clean(tmp_path).exists()


def test_broken_json_is_one_line_that_names_the_line(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path)
    (tmp_path / "FinQA/train.json").write_text('[\n{"id": "a"},\n{"id": \n]')

    done = command("preprocess_finqa")

    line = the_one_line(done)
    assert "train.json" in line and "line 4" in line


@pytest.mark.parametrize("content", ['{"data": []}', '["a", "b"]', '[{"id": "a", "text": "b"}]', "7", ""])
def test_a_file_of_another_shape_is_one_line(command: Command, tmp_path: Path, content: str) -> None:
    write_raw(tmp_path)
    (tmp_path / "FinQA/train.json").write_text(content)

    done = command("preprocess_finqa", "--split", "train")

    assert "train.json" in the_one_line(done)
    assert not clean(tmp_path).exists()


@pytest.mark.parametrize("script", ["preprocess_finqa", "process_finqa_code_generation", "filter_valid_answers"])
def test_an_unknown_dataset_is_one_line_that_lists_the_known(command: Command, script: str) -> None:
    line = the_one_line(command(script, "--dataset", "TAT-QA"))

    assert "TAT-QA" in line and "FinQA-mini" in line


def test_the_made_up_table_has_what_finqa_tables_have() -> None:
    cells = " ".join(cell for line in TABLE for cell in line)
    assert all(sign in cells for sign in ("$", "%", "( 45 )", "1,206.5", "( in millions )"))
