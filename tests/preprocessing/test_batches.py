"""The Batch API: the same rows as by single requests, nothing sent twice, everything that can go wrong said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_fixture import the_one_line
from teacher_server import TeacherServer
from teaching import KEY, Teach, number_in, only_for

from finqa.runtime.errors import UserError
from preprocessing.teacher.batch.batches import read_line, read_records, split_into_files
from preprocessing.teacher.conversation import Wanted


def test_a_batch_gives_the_rows_that_single_requests_give(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teach()
    single = teach.rows
    teach.journal.unlink()
    teach.output.unlink()
    teacher_server.bodies.clear()

    submitted, status, fetched = (teach("--batch", what) for what in ("submit", "status", "fetch"))

    assert f"{questions} requests submitted as batch_0" in submitted.stdout and "estimate: " in submitted.stdout
    assert "batch_0 is completed" in status.stdout
    assert fetched.returncode == 0, fetched.stderr
    assert teach.rows == single and not teacher_server.bodies
    assert f"{questions} replies paid for" in fetched.stdout
    assert teach.manifest()["config"]["batch"] is True


def test_a_batch_is_paid_for_at_half_the_price(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teacher_server.usage = {"prompt_tokens": 1_000_000, "completion_tokens": 0}
    teach("--batch", "submit")
    teach("--batch", "fetch")
    assert teach.manifest()["dollars"] == pytest.approx(questions * 1.25 / 2)


def test_submitting_twice_sends_once(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teach("--batch", "submit")
    again = teach("--batch", "submit", "--max-completion-tokens", "20000")
    assert f"nothing to submit; {questions} requests are under way" in again.stdout
    teach("--batch", "fetch")
    assert "nothing to submit; 0 requests" in teach("--batch", "submit").stdout
    assert len(teacher_server.batches.lines()) == questions


def test_single_requests_are_refused_while_a_batch_has_them(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teach("--batch", "submit")
    line = the_one_line(teach())
    assert f"{questions} of the questions are in batches under way" in line and "--batch fetch" in line
    assert not teacher_server.bodies


def test_what_is_in_the_journal_is_in_no_batch(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teach("--limit", "4")
    teach("--batch", "submit")
    assert len(teacher_server.batches.lines()) == questions - 4
    assert teach("--batch", "fetch").returncode == 0
    assert all(row.actual_answer for row in teach.rows)


def test_a_batch_that_is_not_done_leaves_the_output_alone(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teach("--batch", "submit", "--batch-requests", "6")
    assert [len(record.requests) for record in read_records(_file(teach))] == [6, 5]
    teacher_server.batches.status = "in_progress"

    line = the_one_line(teach("--batch", "fetch"))
    assert "batch_0 is in_progress, batch_1 is in_progress" in line and not teach.output.exists()

    teacher_server.batches.status = "completed"
    assert teach("--batch", "fetch").returncode == 0 and all(row.actual_answer for row in teach.rows)


def test_an_expired_batch_keeps_what_it_did_and_the_rest_is_sent_again(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teach("--batch", "submit")
    teacher_server.batches.status, teacher_server.batches.unanswered = "expired", {"/add ", "/divide "}

    line = the_one_line(teach("--batch", "fetch"))

    assert "2 requests are still wanted" in line and "--batch submit" in line
    kinds = [row.error_kind for row in teach.rows]
    assert kinds.count("teacher-batch-expired") == 2 and kinds.count("") == questions - 2
    teacher_server.batches.status = "completed"
    teach("--batch", "submit")
    assert len(teacher_server.batches.lines()) == questions + 2
    assert teach("--batch", "fetch").returncode == 0 and all(row.actual_answer for row in teach.rows)


def test_a_failed_batch_says_why_and_can_be_sent_again(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teach("--batch", "submit")
    teacher_server.batches.status = "failed"
    teacher_server.batches.errors = [{"code": "token_limit_exceeded", "message": "too many enqueued on purpose"}]

    fetched = teach("--batch", "fetch")

    assert f"{questions} requests are still wanted" in the_one_line(fetched)
    assert "batch_0 is failed: token_limit_exceeded" in fetched.stdout
    assert {row.error_kind for row in teach.rows} == {"teacher-batch-failed"}
    assert "token_limit_exceeded: too many enqueued on purpose" in teach.rows[0].error_message
    assert f"{questions} requests submitted as batch_1" in teach("--batch", "submit").stdout


def test_errors_of_single_lines_are_errors_of_their_rows(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(6)
    faults = [None, 400, "filtered", "no-choices", "empty", "refusal"]
    teacher_server.fault = lambda question, nth: faults[number_in(question)]
    teach("--batch", "submit")

    line = the_one_line(teach("--batch", "fetch", "--max-failed-share", "1"))

    assert "1 requests are still wanted" in line  # The malformed one: a 400 would be one again.
    assert [row.error_kind for row in teach.rows] == [
        "",
        "teacher-bad-request",
        "teacher-content-filter",
        "teacher-malformed",
        "teacher-empty",
        "teacher-refusal",
    ]


def test_second_attempts_and_larger_limits_go_through_batches_too(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(3)
    teacher_server.program = lambda question, gold, turn: gold if turn > 1 else "ans = 41"
    teacher_server.fault = only_for("1", "length", times=1)
    for _ in range(3):
        teach("--batch", "submit", "--attempts", "2")
        done = teach("--batch", "fetch", "--attempts", "2")
    assert done.returncode == 0, done.stderr
    assert [row.actual_answer for row in teach.rows] == ["2256.7"] * 3
    assert len(teacher_server.batches.lines()) == 3 * 2 + 1


def test_a_batch_whose_id_never_came_is_found_by_its_mark(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teacher_server.batches.create_fault = "lost"
    line = the_one_line(teach("--batch", "submit", "--batch-requests", "8"))
    assert "is not known" in line and "same command again" in line
    teacher_server.batches.create_fault = ""

    teach("--batch", "submit", "--batch-requests", "1")
    teach("--batch", "fetch")

    assert len(teacher_server.batches.batches) == 1 + (questions - 8)
    assert len(teacher_server.batches.lines()) == questions and all(row.actual_answer for row in teach.rows)


def test_a_batch_that_was_refused_is_forgotten(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teacher_server.batches.create_fault = "refused"
    assert "no batches on purpose" in the_one_line(teach("--batch", "submit"))
    teacher_server.batches.create_fault = ""
    assert f"{questions} requests submitted as batch_0" in teach("--batch", "submit").stdout


def test_a_fetch_that_was_killed_halfway_counts_no_answer_twice(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teach("--batch", "submit")
    noted = _file(teach).read_bytes()
    teach("--batch", "fetch")
    lines = teach.journal.read_bytes()
    _file(teach).write_bytes(noted)  # As it was before the batch was marked as taken.
    teach("--batch", "fetch")
    assert teach.journal.read_bytes() == lines


def test_a_batch_that_would_cost_too_much_is_not_made(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    line = the_one_line(teach("--batch", "submit", "--max-cost", "0.01"))
    assert "--max-cost" in line and "--limit" in line and not teacher_server.batches.batches


def test_a_fetch_without_a_batch_is_one_line(teach: Teach, questions: int) -> None:
    assert "--batch submit" in the_one_line(teach("--batch", "fetch"))


def test_a_batch_of_another_account_is_one_line(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teach("--batch", "submit")
    teacher_server.batches.batches.clear()
    line = the_one_line(teach("--batch", "status"))
    assert "batch_0" in line and "same server and account" in line


def test_the_key_is_in_no_file_of_a_batch(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teach("--batch", "submit")
    teach("--batch", "fetch")
    files = [path for path in teach.command.data_dir.rglob("*") if path.is_file()]
    assert teacher_server.keys == {f"Bearer {KEY}"} and len(files) >= 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert not any(KEY.encode() in content for content in teacher_server.batches.files.values())


def test_files_are_split_at_the_limits() -> None:
    wanted = [Wanted(f"k{i}", {"messages": [], "max_completion_tokens": 7, "text": "x" * 100}) for i in range(10)]
    by_count = list(split_into_files(wanted, most_requests=4))
    assert [len(names) for names, _ in by_count] == [4, 4, 2]
    size = len(by_count[0][1]) // 4
    by_size = list(split_into_files(wanted, most_bytes=3 * size + 5))
    assert [len(names) for names, _ in by_size] == [3, 3, 3, 1] and max(len(c) for _, c in by_size) <= 3 * size + 5
    for files in (by_count, by_size):
        lines = [json.loads(line) for _, content in files for line in content.splitlines()]
        assert [line["custom_id"] for line in lines] == [f"k{i}.7" for i in range(10)]
        assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}


@pytest.mark.parametrize("line", ["", "{", "7", "{}", '{"custom_id": 7}', '{"custom_id": "k.x"}'])
def test_a_damaged_line_of_an_output_is_nobodys(line: str) -> None:
    assert read_line(line, "gpt-5", "batch_0")[0] == ""


def test_a_damaged_list_of_batches_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("[{]")
    with pytest.raises(UserError, match="mend it by hand"):
        read_records(tmp_path / "b.json")


def _file(teach: Teach) -> Path:
    return teach.output.with_suffix(".batches.json")
