from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from command_fixture import Command, the_one_line
from made_up_rows import TABLE, every_operation, raw_row, write_raw

from finqa.task.datasets import load_finqa
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
    assert [q.answer for q in questions] == ["0.25", "yes", "0.25", "7", "0"]
    assert [q.stated_answer for q in questions] == ["25%", "about", "25%", "7", "about nothing"]


def test_a_split_in_which_nothing_is_stated_has_no_column_for_it(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row("none", answer=None), raw_row("list", exe_ans=3.5, answer=["25%"])])

    command("preprocess_finqa", "--split", "train")

    assert "stated_answer" not in clean(tmp_path).read_text().splitlines()[0]
    assert [(q.id, q.stated_answer) for q in read_questions(clean(tmp_path))] == [("none", ""), ("list", "")]


NO_LABEL = ["n/a", "nan", "None", "null", "inf", "1e999", "\x07", '"', "\ufeff7", "12.3.4", "about 7", "{}", "-", "$"]


@pytest.mark.parametrize("label", [*NO_LABEL, float("inf"), None, ""])
def test_what_is_no_number_and_no_yes_or_no_is_no_label(command: Command, tmp_path: Path, label: object) -> None:
    # A text that is no label is not passed over for what the annotator stated.
    write_raw(tmp_path, train=[raw_row("kept"), raw_row("dropped", exe_ans=label, answer="7" if label else "about 7")])

    done = command("preprocess_finqa", "--split", "train", "--max-failed-share", "0.5")

    if label == float("inf"):
        assert [q.answer for q in read_questions(clean(tmp_path))][1:] == ["7"]
    else:
        assert "1 dropped (an answer that is no number and no yes or no 1)" in done.stdout, done.stderr
        assert [q.id for q in read_questions(clean(tmp_path))] == ["kept"]


@pytest.mark.parametrize(
    ("stated", "label"),
    [
        ("12.3%", "0.123"),
        ("-12.3 %", "-0.123"),
        ("0.5 per cent", "0.005"),
        ("$1,234 million", "1234"),
        ("$ 4.26 million", "4.26"),
        ("1,234.50", "1234.50"),
        ("-$5", "-5"),
        (".5", "0.5"),
        ("Yes", "yes"),
        ("no", "no"),
        (7, "7"),
        (0.25, "0.25"),
        ("between 5 and 7", None),
        ("12% in 2009", None),
        ("", None),
    ],
)
def test_where_exe_ans_is_absent_the_label_is_what_the_stated_answer_comes_to(
    tmp_path: Path, stated: object, label: str | None
) -> None:
    absent = raw_row(exe_ans=None, answer=stated)
    del absent["qa"]["exe_ans"]
    write_raw(tmp_path, train=[absent])
    assert [q.answer for q in load_finqa(tmp_path / "FinQA/train.json").questions] == ([label] if label else [])


def test_texts_may_be_one_string_and_null_is_empty(tmp_path: Path) -> None:
    table = [["", 2009], [None, "7"], ["net sales", None, 5.5]]
    rows = [raw_row("string", pre_text="one line .\ntwo .", post_text="the end ."), raw_row("null", pre_text=None)]
    rows += [raw_row("nulls", pre_text=["a", None, "b"], table=table, program="add(7, 1)")]
    write_raw(tmp_path, train=rows)

    string, null, nulls = load_finqa(tmp_path / "FinQA/train.json").questions

    assert (string.pre_text, string.post_text) == ("one line .\ntwo .", "the end .")
    assert null.pre_text == "" and nulls.pre_text == "a\nb"
    assert nulls.table == [["", "2009"], ["", "7"], ["net sales", "", "5.5"]]


def test_a_program_names_its_row_as_the_table_has_it(tmp_path: Path) -> None:
    table = [["", "2009"], ["a|b", "5"], ["c\nd", "7"]]
    program = "table_sum(a|b, none), table_sum(c\nd, none), add(#0, #1)"
    write_raw(tmp_path, train=[raw_row(table=table, program=program)])
    [question] = load_finqa(tmp_path / "FinQA/train.json").questions
    assert [line[0] for line in question.table] == ["", "a/b", "c d"]
    assert question.program == "table_sum(a/b, none), table_sum(c d, none), add(#0, #1)"


def test_more_dropped_rows_than_the_share_end_in_an_exit_code_after_the_files_are_written(
    command: Command, tmp_path: Path
) -> None:
    rows = [raw_row(f"a{i}", exe_ans="n/a" if i < 3 else 1.0) for i in range(8)]
    write_raw(tmp_path, train=rows, dev=rows[3:], test=rows)

    line = the_one_line(command("preprocess_finqa"))

    assert "38% of the rows" in line and "train.json" in line and "test.json" in line and "dev.json" not in line
    assert "--max-failed-share 0.2" in line
    assert [len(read_questions(clean(tmp_path, split))) for split in ("train", "dev", "test")] == [5, 5, 5]
    assert command("preprocess_finqa", "--max-failed-share", "0.4").returncode == 0


def test_rows_without_question_or_answer_or_of_another_shape_are_dropped_and_counted(
    command: Command, tmp_path: Path
) -> None:
    rows = [raw_row("kept"), raw_row("q", question="  "), raw_row("a", exe_ans="", answer=None), {"id": "no qa"}, 7]
    write_raw(tmp_path, train=[*rows, raw_row("table", exe_ans=1, table="a|b")])

    done = command("preprocess_finqa", "--split", "train", "--max-failed-share", "1")

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

    done = command("preprocess_finqa", "--split", "train", "--max-failed-share", "0.5")

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
