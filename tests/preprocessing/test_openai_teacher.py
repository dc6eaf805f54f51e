from __future__ import annotations

from pathlib import Path

import pytest
from command_fixture import Command, the_one_line
from made_up_rows import every_operation, raw_row
from teacher_server import HINT, Fault, TeacherServer
from teaching import KEY, Teach, number_in, only_for, write_clean

from finqa.runtime.errors import UserError
from preprocessing.teacher.openai_teacher import OpenAITeacherConfig


def test_the_three_commands_keep_every_row_a_good_teacher_solves(
    command: Command, teach: Teach, questions: int, tmp_path: Path
) -> None:
    done = teach()
    assert done.returncode == 0, done.stderr

    filtered = command("filter_valid_answers", "--split", "train")

    assert f"{questions} rows in, {questions} kept, 0 rejected" in filtered.stdout
    assert all(row.finish_reason == "stop" for row in teach.rows)


def test_rows_stay_in_order_whatever_order_replies_come_in(
    teach: Teach, questions: int, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    teacher_server.fault = only_for("add", 500, times=1)
    teach("--max-concurrent", "8")
    assert [row.id for row in teach.rows] == [row["id"] for row in every_operation("train")]


def test_the_request_is_few_shot_with_the_hint_last_and_no_temperature(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teach()
    for body in teacher_server.bodies:
        roles = [message["role"] for message in body["messages"]]
        assert roles == ["system", *["user", "assistant"] * 4, "user"]
        assert body["messages"][-1]["content"].splitlines()[-1].startswith(HINT)
        assert set(body) == {"model", "messages", "max_completion_tokens"}
        assert body["model"] == "gpt-5" and body["max_completion_tokens"] >= 8_000


def test_no_hint_keeps_the_gold_program_out_of_the_prompt(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teach("--no-hint")
    prompts = [body["messages"][-1]["content"] for body in teacher_server.bodies]
    assert len(prompts) == questions and not any(HINT in prompt or "divide(" in prompt for prompt in prompts)


def test_model_temperature_and_limit_are_sent_as_given(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teach("--model", "small-one", "--temperature", "0.5", "--max-completion-tokens", "77", "--limit", "1")
    (body,) = teacher_server.bodies
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("small-one", 0.5, 77)


def test_no_more_than_max_concurrent_requests_are_under_way(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teacher_server.delay_s = 0.1
    teach("--max-concurrent", "3")
    assert teacher_server.most_at_a_time == 3


def test_a_passing_fault_is_asked_again(
    command: Command, teach: Teach, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    faults: list[Fault] = [429, 500, 503, 408, 409, "reset"]
    write_clean(tmp_path, train=[raw_row(f"MADE/up/{i}") for i in range(len(faults))])
    teacher_server.fault = lambda question, nth: faults[number_in(question)] if nth <= 2 else None

    done = teach()

    assert done.returncode == 0, done.stderr
    assert all(row.actual_answer for row in teach.rows)
    assert set(teacher_server.asked.values()) == {3}


def test_the_server_says_how_long_to_wait(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teacher_server.fault = lambda question, nth: 429 if nth == 1 else None
    teacher_server.headers_of_faults = {"Retry-After": "1"}
    teach("--limit", "1")
    first, second = teacher_server.times
    assert second - first >= 1


def test_a_lasting_fault_is_an_error_of_its_row_alone(
    command: Command, teach: Teach, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    kinds: dict[Fault, str] = {
        None: "",
        "length": "teacher-length",
        "filtered": "teacher-content-filter",
        "refusal": "teacher-refusal",
        "empty": "teacher-empty",
        "html": "teacher-malformed",
        "no-json": "teacher-malformed",
        "no-choices": "teacher-malformed",
        "torn": "teacher-connection",
        400: "teacher-bad-request",
        500: "teacher-server",
        429: "teacher-rate-limit",
        "reset": "teacher-connection",
    }
    faults = list(kinds)
    write_clean(tmp_path, train=[raw_row(f"MADE/up/{i}") for i in range(len(faults))])
    teacher_server.fault = lambda question, nth: faults[number_in(question)]

    done = teach("--max-retries", "1", "--max-failed-share", "1")

    assert done.returncode == 0, done.stderr
    solved, *failed = teach.rows
    assert solved.actual_answer and solved.error_kind == ""
    for fault, row in zip(faults[1:], failed, strict=True):
        assert (row.generated_code, row.actual_answer, row.error_kind) == ("", "", kinds[fault]), fault
        assert row.error_message and "\n" not in row.error_message
    assert "12 without (teacher-malformed 3," in done.stdout


def test_without_a_key_nothing_is_sent(command: Command, questions: int, teacher_server: TeacherServer) -> None:
    line = the_one_line(command("process_finqa_code_generation", "--base-url", teacher_server.url, "--split", "train"))
    assert "OPENAI_API_KEY" in line and "--teacher program" in line
    assert teacher_server.bodies == []


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "invalid_api_key", "OPENAI_API_KEY"),
        (404, "model_not_found", "gpt-5"),
        (429, "insufficient_quota", "quota"),
    ],
)
def test_what_would_meet_every_request_stops_at_once(
    teach: Teach, questions: int, teacher_server: TeacherServer, status: int, code: str, says: str
) -> None:
    teacher_server.fault, teacher_server.error_code = lambda question, nth: status, code
    line = the_one_line(teach("--max-concurrent", "1", "--max-retries", "0"))
    assert says in line and "on purpose" in line
    assert len(teacher_server.bodies) == 1


def test_a_parameter_that_every_request_is_refused_for_stops_early(
    command: Command, teach: Teach, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    write_clean(tmp_path, train=[raw_row(f"MADE/up/{i}") for i in range(60)])
    teacher_server.fault = lambda question, nth: 400
    line = the_one_line(teach("--max-concurrent", "4"))
    assert "status 400 on purpose" in line
    assert len(teacher_server.bodies) < 30


def test_a_server_that_is_not_there_is_one_line(command: Command, questions: int) -> None:
    flags = ("--base-url", "http://127.0.0.1:9/v1", "--max-retries", "0", "--split", "train")
    line = the_one_line(command("process_finqa_code_generation", *flags, OPENAI_API_KEY=KEY))
    assert "127.0.0.1:9" in line


def test_the_key_is_sent_and_written_nowhere(
    teach: Teach, questions: int, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    teacher_server.fault = only_for("divide", 400)
    done = teach()
    assert teacher_server.keys == {f"Bearer {KEY}"}
    assert KEY not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_concurrent", 0),
        ("max_completion_tokens", 0),
        ("max_retries", -1),
        ("timeout_s", 0),
        ("temperature", 3),
        ("base_url", "localhost:8000"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(UserError, match=setting.replace("_", "[_-]")):
        OpenAITeacherConfig(**{setting: value})  # pyright: ignore[reportArgumentType]


def test_what_was_answered_is_not_asked_again(
    teach: Teach, questions: int, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    teacher_server.fault = only_for("divide", 400)
    teach()
    before = teach.rows
    teacher_server.fault = only_for("nothing", None)
    teacher_server.bodies.clear()

    done = teach()

    assert len(teacher_server.bodies) == 1
    assert f"1 replies paid for, {questions - 1} rows from the journal" in done.stdout
    assert [row for row in teach.rows if not row.id.endswith("/divide")] == [
        row for row in before if not row.id.endswith("/divide")
    ]


def test_a_changed_parameter_asks_anew(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teach("--limit", "2")
    teach("--limit", "2", "--temperature", "1")
    assert len(teacher_server.bodies) == 4


def test_what_was_cut_off_is_asked_for_once_more_with_twice_the_limit(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teacher_server.fault = only_for("divide", "length", times=1)

    teach("--max-completion-tokens", "9000")

    assert sorted(body["max_completion_tokens"] for body in teacher_server.bodies) == [9_000] * questions + [18_000]
    assert all(row.actual_answer for row in teach.rows)
    lines = [line for line in teach.journal_lines() if line.get("finish_reason") == "length" or line["limit"] > 9_000]
    assert [(line["finish_reason"], line["limit"]) for line in lines] == [("length", 9_000), ("stop", 18_000)]
    assert lines[0]["key"] == lines[1]["key"]


def test_a_larger_limit_asks_again_only_for_what_was_cut_off(
    teach: Teach, questions: int, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    teacher_server.fault = only_for("divide", "length", times=2)
    teach()
    assert [row.error_kind for row in teach.rows].count("teacher-length") == 1
    teacher_server.bodies.clear()

    teach("--max-completion-tokens", "40000")

    assert [body["max_completion_tokens"] for body in teacher_server.bodies] == [40_000]
    assert all(row.actual_answer for row in teach.rows)


def test_equal_questions_are_paid_for_once(
    command: Command, teach: Teach, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    write_clean(tmp_path, train=[raw_row("a", question="twice?"), raw_row("b", question="twice?")])
    teach()
    assert len(teacher_server.bodies) == 1
    assert [bool(row.actual_answer) for row in teach.rows] == [True, True]
