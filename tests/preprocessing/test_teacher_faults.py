"""A server that misbehaves: what passes, what fails a row, what ends the run."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from typing import Any

import pytest
from command_fixture import the_one_line
from teacher_server import Fault, TeacherServer
from teaching import KEY, Teach, number_in

from finqa.chat.answer_journal import request_key
from finqa.chat.chat_request import retry_after_s, storable


def test_every_try_is_in_the_journal(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(2)
    teacher_server.fault = lambda question, nth: 503 if nth <= 2 else None

    done = teach()

    assert done.stdout.count("teacher-server: Error code: 503") == 1 and "it is tried again" in done.stdout
    kinds = Counter(line.get("failure", {}).get("kind", "answer") for line in teach.journal_lines())
    assert kinds == {"teacher-server": 4, "answer": 2}


@pytest.mark.parametrize(("headers", "least"), [({}, 0.25), ({"Retry-After": "0.8"}, 0.8)])
def test_a_fault_is_followed_by_a_wait(
    teach: Teach, teacher_server: TeacherServer, headers: dict[str, str], least: float
) -> None:
    teach.clean_rows(1)
    teacher_server.fault, teacher_server.headers_of_faults = lambda question, nth: 503 if nth == 1 else None, headers
    teach()
    first, second = teacher_server.times
    assert second - first >= least


@pytest.mark.parametrize("fault", ["stall", "torn", "no-json"])
def test_a_reply_that_does_not_come_whole_is_asked_for_again(
    teach: Teach, teacher_server: TeacherServer, fault: Fault
) -> None:
    teach.clean_rows(3)
    teacher_server.fault = lambda question, nth: fault if nth == 1 and number_in(question) == 1 else None

    done = teach("--timeout-s", "0.5")

    assert done.returncode == 0, done.stderr
    assert [bool(row.actual_answer) for row in teach.rows] == [True, True, True]
    assert sum(teacher_server.asked.values()) == 4


def test_a_stalled_connection_is_a_time_out_of_its_row(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(2)
    teacher_server.fault = lambda question, nth: "stall" if number_in(question) == 1 else None

    teach("--timeout-s", "0.3", "--max-retries", "1", "--max-failed-share", "1")

    assert [row.error_kind for row in teach.rows] == ["", "teacher-timeout"]
    assert "--timeout-s" in teach.rows[1].error_message


def test_a_malformed_reply_is_asked_for_once_more_and_no_oftener(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(2)
    teacher_server.fault = lambda question, nth: "no-choices" if number_in(question) == 1 else None

    teach("--max-failed-share", "1")

    assert [row.error_kind for row in teach.rows] == ["", "teacher-malformed"]
    assert sorted(teacher_server.asked.values()) == [1, 2]


def test_a_server_that_takes_four_at_a_time_gets_about_four(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(120)
    teacher_server.takes_at_a_time, teacher_server.delay_s = 4, 0.03
    teacher_server.headers_of_faults = {"Retry-After": "0.05"}

    done = teach("--max-concurrent", "32", "--max-retries", "20")

    assert done.returncode == 0, done.stderr
    assert all(row.actual_answer for row in teach.rows)
    # The first 32 are refused together. From then on the limit swings about what the server takes.
    refused = sum(teacher_server.asked.values()) - 120
    assert refused <= 200  # Without slowing down it is more than 500.


def test_one_retry_after_holds_every_request_back(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(12)
    teacher_server.fault = lambda question, nth: 429 if len(teacher_server.times) == 4 else None
    teacher_server.headers_of_faults, teacher_server.delay_s = {"Retry-After": "1"}, 0.05

    teach("--max-concurrent", "4")

    gaps = [b - a for a, b in zip(teacher_server.times, teacher_server.times[1:], strict=False)]
    assert max(gaps) >= 0.9


def test_a_pause_of_an_hour_ends_the_run_instead(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(3)
    teacher_server.fault = lambda question, nth: 429 if number_in(question) == 2 else None
    teacher_server.headers_of_faults = {"Retry-After": "3600"}

    line = the_one_line(teach("--max-concurrent", "1"))

    assert "3,600 s" in line and "what was answered is kept" in line
    assert sum("text" in entry for entry in teach.journal_lines()) == 2


def test_what_is_under_way_when_the_run_ends_is_kept(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(8)
    teacher_server.fault = lambda question, nth: 401 if number_in(question) == 3 else None
    teacher_server.program = lambda question, gold, turn: (time.sleep(0.3), gold)[1]

    the_one_line(teach("--max-concurrent", "4"))

    assert sum(teacher_server.asked.values()) == 4
    assert sum("text" in entry for entry in teach.journal_lines()) == 3


def test_a_parameter_that_the_server_blames_ends_the_run_at_once(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(5)
    teacher_server.fault, teacher_server.error_code = lambda question, nth: 400, "unsupported_value"
    line = the_one_line(teach("--max-concurrent", "1"))
    assert "refuses a parameter" in line and sum(teacher_server.asked.values()) == 1


@pytest.mark.parametrize("answered_before", [True, False])
def test_a_403_stops_the_run_only_where_nothing_was_answered(
    teach: Teach, teacher_server: TeacherServer, answered_before: bool
) -> None:
    teach.clean_rows(5)
    teacher_server.fault = lambda question, nth: 403 if number_in(question) == int(answered_before) else None

    done = teach("--max-concurrent", "1")

    if answered_before:
        assert done.returncode == 0 and teach.rows[1].error_kind == "teacher-forbidden"
    else:
        assert "OPENAI_API_KEY" in the_one_line(done) and len(teacher_server.bodies) == 1


def test_refusals_alone_are_no_reason_to_stop_once_there_are_answers(
    teach: Teach, teacher_server: TeacherServer
) -> None:
    teach.clean_rows(60)
    teacher_server.fault = lambda question, nth: 400 if number_in(question) % 2 else None
    teach("--max-failed-share", "0.5", "--max-concurrent", "1")
    before = teach.output.read_bytes()

    done = teach("--max-failed-share", "0.5")

    assert done.returncode == 0, done.stderr
    assert teach.output.read_bytes() == before and "30 without (teacher-bad-request 30)" in done.stdout


def test_a_larger_limit_than_the_model_has_leaves_the_row_cut_off(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(30)
    teacher_server.fault = lambda question, nth: "length" if nth == 1 else 400
    teacher_server.error_code = "unsupported_value"
    for _ in range(2):
        done = teach("--max-failed-share", "1")
        assert done.returncode == 0, done.stderr
        assert {row.error_kind for row in teach.rows} == {"teacher-length"}


def test_a_server_that_is_gone_ends_the_run(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(60)
    teacher_server.fault = lambda question, nth: "reset" if number_in(question) >= 5 else None

    line = the_one_line(teach("--max-concurrent", "10", "--max-retries", "1"))

    assert "the last 20 requests all failed" in line and "start the same command again" in line
    assert sum(teacher_server.asked.values()) <= 5 + 2 * 30


def test_a_key_that_the_server_quotes_is_written_nowhere(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(3)
    teacher_server.fault = lambda question, nth: "echo-key" if number_in(question) == 1 else None
    teacher_server.program = lambda question, gold, turn: f"# {KEY}\n{gold}"

    done = teach("--max-failed-share", "1")

    assert "[key]" in teach.rows[1].error_message and "[key]" in teach.rows[0].generated_code
    assert KEY not in done.stdout + done.stderr
    folder = teach.command.data_dir
    assert not [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_an_address_with_a_password_is_refused_without_repeating_it(teach: Teach) -> None:
    line = the_one_line(teach("--base-url", "http://me:word@localhost/v1"))
    assert "OPENAI_API_KEY" in line and "word@" not in line and "me:" not in line


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
    ],
)
def test_retry_after_is_read_in_each_of_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


def test_half_a_surrogate_pair_becomes_storable() -> None:
    assert storable("a\ud800b").encode()


def test_ctrl_c_waits_for_what_is_under_way_and_keeps_it(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(20)
    teacher_server.delay_s = 0.5
    # Tests that run in the background of a shell ignore the signal, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = teach.start("--max-concurrent", "3")
    finally:
        signal.signal(signal.SIGINT, before)
    while len(teacher_server.times) < 3:
        assert process.poll() is None
        time.sleep(0.02)

    process.send_signal(signal.SIGINT)

    assert process.wait(timeout=20) == 130
    assert sum(teacher_server.asked.values()) == sum("text" in entry for entry in teach.journal_lines()) == 3


@pytest.mark.slow
def test_500_questions_and_three_kills_on_a_bad_day(teach: Teach, teacher_server: TeacherServer) -> None:
    """Every row is answered or set aside with its reason, and what had reached the journal is asked no second time.

    A request that is under way at a kill can be sent again: at most --max-concurrent for each kill.
    """
    teach.clean_rows(500)
    passing: list[Fault] = [429, 500, 408, "reset", "torn", "no-json"]
    lasting: dict[Fault, str] = {
        400: "teacher-bad-request",
        "filtered": "teacher-content-filter",
        "length": "teacher-length",
        "refusal": "teacher-refusal",
        "empty": "teacher-empty",
    }
    kinds = list(lasting)

    def fault(question: str, nth: int) -> Fault:
        number = number_in(question)
        if number % 10 == 3:
            return kinds[number // 10 % len(kinds)]
        return passing[number % len(passing)] if number % 7 == 0 and nth == 1 else None

    teacher_server.fault, teacher_server.delay_s = fault, 0.01
    teacher_server.headers_of_faults = {"Retry-After": "0.05"}
    flags = ("--max-concurrent", "8", "--max-completion-tokens", "9000")
    kept: list[dict[str, Any]] = []
    for kill in range(3):
        process = teach.start(*flags)
        while not teach.journal.exists() or teach.journal.read_bytes().count(b"\n") < 130 * (kill + 1):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append({"answers": _answered(teach), "sent": len(teacher_server.bodies)})

    done = teach(*flags)

    assert done.returncode == 0, done.stderr
    assert [number_in(row.id) for row in teach.rows] == list(range(500))
    for number, row in enumerate(teach.rows):
        expected = lasting[kinds[number // 10 % len(kinds)]] if number % 10 == 3 else ""
        assert row.error_kind == expected and bool(row.actual_answer) == (not expected), row
    # Answers that the server sent whole, beyond one for each request, are those that a kill caught on their way.
    twice = sum(teacher_server.answered.values()) - len(_answered(teach))
    assert 0 <= twice <= 3 * 8
    for state in kept:
        later = [(request_key(body), body["max_completion_tokens"]) for body in teacher_server.bodies[state["sent"] :]]
        assert not state["answers"].intersection(later)


def _answered(teach: Teach) -> set[tuple[str, int]]:
    """Key and limit of every answer that is whole in the journal."""
    whole = teach.journal.read_text().rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    return {(line["key"], line["limit"]) for line in lines if "text" in line}
