"""Odd files, and a system that refuses: every stage goes on, or says in one line what is wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
from command_fixture import Command, the_one_line
from made_up_rows import every_operation, raw_row, write_raw

from finqa.runtime.errors import REMEDIES, UserError, report_errors
from finqa.runtime.paths import REPOSITORY, write_atomically
from finqa.task.datasets import load_finqa
from finqa.task.records import TeacherRow, read_questions, read_teacher_rows, write_teacher_rows

COLUMNS = "prompt,generated_code,actual_answer,expected_answer"


# --- Raw JSON ---------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.json", tmp_path / "marked.json"
    text = json.dumps(every_operation("train"), indent=1)
    plain.write_bytes(text.encode())
    marked.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_finqa(marked) == load_finqa(plain)


def test_rows_of_one_id_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([raw_row(i) for i in ("a", "b", "a", "a#2", "a")]))
    assert [q.id for q in load_finqa(path).questions] == ["a", "b", "a#2", "a#2#2", "a#3"]


@pytest.mark.parametrize(
    ("label", "answer", "kept"),
    [("NaN", "7", "7"), ("Infinity", "7", "7"), ("NaN", "", None), ("[1]", "7", None), ('{"a": 1}', "7", None)],
)
def test_a_label_that_is_no_answer_is_not_kept(tmp_path: Path, label: str, answer: str, kept: str | None) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([raw_row(exe_ans="LABEL", answer=answer)]).replace('"LABEL"', label))
    assert [q.answer for q in load_finqa(path).questions] == ([kept] if kept else [])


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[" + b"9" * 10_000 + b"]", b"\xff\xfe[\x00]\x00", b"\x00", b""], ids=repr
)
def test_json_that_nobody_can_read_is_one_line(command: Command, tmp_path: Path, content: bytes) -> None:
    write_raw(tmp_path)
    (tmp_path / "FinQA/train.json").write_bytes(content)
    assert "train.json" in the_one_line(command("preprocess_finqa", "--split", "train"))


def test_a_cell_of_megabytes_comes_through_all_stages(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row("big", pre_text=["a sentence of net sales . " * 100_000])])
    for stage in (["preprocess_finqa"], ["process_finqa_code_generation", "--teacher", "program"]):
        done = command(*stage, "--split", "train")
        assert done.returncode == 0, done.stderr
    assert len(read_questions(tmp_path / "clean/FinQA/train.csv")[0].pre_text) > 2_000_000
    assert "1 kept" in command("filter_valid_answers", "--split", "train").stdout


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ('p,"ans = 1', "row 1: unexpected end of data"),
        ("p,c,1,1\np,c,1", "row 2: fewer cells than columns"),
        ("p,c,1,1\np,c,1,1,1", "row 2: more cells than columns"),
        ('p,"c"x,1,1', "row 1: ',' expected after '\"'"),
    ],
)
def test_a_csv_that_was_cut_off_is_refused(tmp_path: Path, rest: str, problem: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"{COLUMNS}\n{rest}")
    with pytest.raises(UserError, match=f"x.csv, {problem}"):
        read_teacher_rows(path)


def test_a_csv_of_another_program_is_read(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, an empty line, columns that nobody asked for."""
    path = tmp_path / "x.csv"
    path.write_bytes(f'\ufeff{COLUMNS},note\r\n\r\n"p\r\nq",c\x00d,1,1,\r\n'.encode())
    assert read_teacher_rows(path) == [TeacherRow("p\r\nq", "c\x00d", "1", "1")]


def test_half_a_character_in_a_reply_does_not_lose_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_teacher_rows(path, [TeacherRow("p", "ans = '\ud800'", "", "1"), TeacherRow("q", "ans = 1", "1", "1")])
    assert [row.generated_code for row in read_teacher_rows(path)] == ["ans = '\\ud800'", "ans = 1"]


# --- The system refuses -----------------------------------------------------------------------------------------------


def test_no_room_is_one_line_and_leaves_the_file_that_was_there(command: Command, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    write_raw(tmp_path, train=[raw_row()])
    assert command("preprocess_finqa", "--split", "train").returncode == 0
    before = (tmp_path / "clean/FinQA/train.csv").read_bytes()
    write_raw(tmp_path, train=every_operation("train") * 20)

    done = subprocess.run(
        command.line("preprocess_finqa", "--split", "train"),
        cwd=REPOSITORY,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        capture_output=True,
        text=True,
        check=False,
    )

    line = the_one_line(done)
    assert "clean/FinQA/train.csv: File too large" in line and "make room" in line
    assert (tmp_path / "clean/FinQA/train.csv").read_bytes() == before
    assert {path.name for path in (tmp_path / "clean/FinQA").iterdir()} == {"train.csv", "train.run.json"}


def test_something_in_the_way_is_one_line(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row()])
    (tmp_path / "clean").write_text("a file where the folder should be")
    line = the_one_line(command("preprocess_finqa", "--split", "train"))
    assert "train.csv" in line and "move what is in the way" in line


def test_a_log_on_a_full_disk_is_one_line_and_no_success(command: Command, tmp_path: Path) -> None:
    write_raw(tmp_path, train=[raw_row()])
    with Path("/dev/full").open("w") as full:
        line = command.line("preprocess_finqa", "--split", "train")
        done = subprocess.run(line, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("error: what this command prints or writes: No space left on device; make room there")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "clean/FinQA/train.csv").exists()


def test_a_folder_without_rights_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "read-only" / "x.csv"
    path.parent.mkdir(mode=0o500)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # To root every folder is open.
        assert report_errors(lambda: write_atomically(path, "text")) == 1
    finally:
        os.seteuid(user)
    assert capsys.readouterr().err == f"error: {path}: Permission denied; {REMEDIES[errno.EACCES]}\n"


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(OSError) as error:
        write_atomically(tmp_path / "x.csv", "text")
    assert error.value.filename == str(tmp_path / "x.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
