"""What more or less compatible servers send: whole replies are kept, whatever they look like, and faults are shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from command_fixture import the_one_line
from teacher_server import TeacherServer
from teaching import Teach, number_in

from finqa.chat.answer_journal import Answer, AnswerJournal
from finqa.chat.chat_request import answer_from, one_line, retry_after_s
from finqa.chat.prices import price_of
from finqa.runtime.errors import UserError
from preprocessing.teacher.config import OpenAITeacherConfig
from preprocessing.teacher.conversation import next_limit, reply_from


def body(content: object = "ans = 1", reason: object = "stop", usage: object = None) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}, "finish_reason": reason}], "usage": usage}


WHOLE = ["stop", "eos", "eos_token", "end_turn", "STOP", "stop_sequence", "COMPLETE", "FINISH_REASON_STOP", "", None, 0]


@pytest.mark.parametrize("reason", WHOLE)
def test_a_whole_reply_is_kept_whatever_the_server_calls_its_end(reason: object) -> None:
    answer = answer_from(body(reason=reason), limit=100, asked="m")
    assert isinstance(answer, Answer)
    assert reply_from(answer).code == "ans = 1" and not next_limit(answer, 100)


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens"])
def test_a_reply_that_was_cut_off_is_asked_for_with_a_larger_limit(reason: str) -> None:
    answer = answer_from(body(reason=reason), limit=100, asked="m")
    assert isinstance(answer, Answer)
    assert reply_from(answer).error_kind == "teacher-length" and next_limit(answer, 100) == 200


def test_a_reply_without_a_reason_that_used_all_its_tokens_was_cut_off() -> None:
    answer = answer_from(body(reason=None, usage={"completion_tokens": 100}), limit=100, asked="m")
    assert isinstance(answer, Answer) and reply_from(answer).error_kind == "teacher-length"


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("content_filter", "teacher-content-filter"),
        ("SAFETY", "teacher-safety"),
        ("error", "teacher-error"),
        ("tool_calls", "teacher-tool-calls"),
    ],
)
def test_a_reply_that_was_withheld_has_no_program(reason: str, kind: str) -> None:
    answer = answer_from(body(reason=reason), limit=100, asked="m")
    assert isinstance(answer, Answer) and reply_from(answer).error_kind == kind


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "ans = 1"}],
        [{"type": "text", "text": "ans"}, {"type": "output_text", "text": " = 1"}],
        [{"type": "thinking", "thinking": "ans = 2"}, {"type": "text", "text": "ans = 1"}],
        [{"type": "reasoning", "text": "ans = 2"}, "ans = 1"],
        [{"type": "text", "text": {"value": "ans = 1"}}, {"type": "image_url", "image_url": {}}, None, 7],
        {"text": "ans = 1"},
        "<think>ans = 2</think>ans = 1",
    ],
)
def test_content_in_parts_is_joined(content: object) -> None:
    answer = answer_from(body(content), limit=100, asked="m")
    assert isinstance(answer, Answer) and reply_from(answer).code == "ans = 1"


def test_a_server_that_refuses_max_completion_tokens_gets_max_tokens(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teacher_server.refused_parameter = "max_completion_tokens"

    done = teach("--max-concurrent", "1")

    assert done.returncode == 0, done.stderr
    assert len(teacher_server.bodies) == questions + 1 and all(row.actual_answer for row in teach.rows)
    assert [body["max_tokens"] for body in teacher_server.bodies[1:]] == [16_000] * questions
    assert {line["limit"] for line in teach.journal_lines()} == {16_000}


def test_the_limits_name_can_be_given(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    assert teach("--limit-name", "max_tokens").returncode == 0
    assert all("max_tokens" in body and "max_completion_tokens" not in body for body in teacher_server.bodies)
    assert teach().returncode == 0 and len(teacher_server.bodies) == questions  # The name shapes no reply.
    assert '"max_tokens": 16000' in teach("--dry-run", "--limit-name", "max_tokens", "--no-hint").stdout


def test_a_limit_that_is_refused_under_both_names_is_said_in_the_servers_words(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    teacher_server.fault = lambda question, nth: 400
    error = {"message": "max_completion_tokens is too large", "code": "unsupported_value"}
    teacher_server.error_body = json.dumps({"error": error}).encode()
    line = the_one_line(teach("--max-concurrent", "1"))
    assert "max_completion_tokens is too large" in line and len(teacher_server.bodies) == 2


BODIES = {
    "text": b"quota of the proxy",
    "page": b"<html>quota of the proxy</html>",
    "string": b'"quota of the proxy"',
    "list": b'[{"msg": "quota of the proxy"}]',
    "detail": b'{"detail": [{"loc": ["body"], "msg": "quota of the proxy"}]}',
    "error is text": b'{"error": "quota of the proxy"}',
    "error is a list": b'{"error": ["quota of the proxy"]}',
    "codes that are no text": b'{"error": {"code": ["x"], "type": {"a": 1}, "message": ["quota of the proxy"]}}',
    "message beside a null": b'{"error": null, "message": "quota of the proxy"}',
    "not UTF-8": b"\xff\xfe quota of the proxy",
}


@pytest.mark.parametrize("status", [400, 401, 404, 500])
@pytest.mark.parametrize("name", BODIES)
def test_an_error_of_any_shape_is_shown(teach: Teach, teacher_server: TeacherServer, name: str, status: int) -> None:
    teach.clean_rows(1)
    teacher_server.fault, teacher_server.error_body = lambda question, nth: status, BODIES[name]

    done = teach("--max-failed-share", "1", "--max-retries", "0")

    shown = done.stderr if done.returncode else teach.rows[0].error_message
    assert "quota of the proxy" in shown and "Traceback" not in done.stderr


@pytest.mark.parametrize("value", [10**400, 10**13, -1, True, "7", None, [7], float("inf"), float("nan")])
def test_a_count_of_tokens_that_is_none_counts_nothing(value: object) -> None:
    answer = answer_from(body(usage={"prompt_tokens": value, "completion_tokens": 5.0}), limit=100, asked="m")
    assert isinstance(answer, Answer) and (answer.prompt_tokens, answer.completion_tokens) == (0, 5)


def test_counts_beyond_a_float_end_in_no_traceback(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teacher_server.usage = {"prompt_tokens": 10**400, "completion_tokens": 10**400}
    done = teach()
    assert done.returncode == 0, done.stderr
    assert f"{questions} replies paid for" in done.stdout and "0 tokens read" in done.stdout


def test_such_counts_in_a_journal_of_before_are_none(tmp_path: Any) -> None:
    path = tmp_path / "a.journal.jsonl"
    line = {"key": "k", "text": "ans = 1", "finish_reason": "stop", "model": "m", "prompt_tokens": 10**400}
    path.write_text(json.dumps(line) + "\n")
    assert [answer.prompt_tokens for answer in AnswerJournal(path).read().paid] == [0]


def test_numbers_of_the_user_are_checked_too(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="--timeout-s must be above 0 and at most"):
        OpenAITeacherConfig(timeout_s=1e300)
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"models": {"m": {"input": 10**400, "output": 1}}}))
    with pytest.raises(UserError, match="input of 'm' must be from 0 to"):
        price_of("m", prices)


@pytest.mark.parametrize("date", ["Thu, 01 Jan 99999 00:00:00 GMT", "Thu, 99 Jan 1970", "1e999", ","])
def test_a_date_that_is_none_is_no_retry_after(date: str) -> None:
    assert retry_after_s({"retry-after": date}) is None


@pytest.mark.parametrize(
    "url",
    [
        "HTTP://me:secret@localhost/v1",
        "http://me:secret@localhost/v1",
        "me:secret@localhost/v1",
        "//me:secret@localhost",
        "http:/me:secret@localhost",
        "ht\ntp://me:secret@localhost",
        "http://[me:secret@localhost",
        "https://localhost/v1?key=secret",
        "https://localhost/v1#secret",
        "ftp://secret@localhost",
    ],
)
def test_an_address_with_credentials_is_refused_without_repeating_it(teach: Teach, url: str) -> None:
    for line in (
        the_one_line(teach("--base-url", url)),
        the_one_line(teach.command("download_finqa", "--url-base", url)),
    ):
        assert "must hold no user, password" in line and "secret" not in line
    assert not [path for path in teach.command.data_dir.rglob("*") if path.is_file()]


def test_an_address_may_be_in_upper_case_and_a_servers_words_may_hold_none_with_a_password(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    done = teach("--base-url", teacher_server.url.replace("http", "HTTP"))
    assert done.returncode == 0, done.stderr
    assert one_line("no route to HTTP://me:secret@proxy/v1") == "no route to HTTP://[user]@proxy/v1"


@pytest.mark.parametrize("line_end", ["\u2028", "\x85", "\x0b", "\u2029", "\x1c"])
def test_other_line_ends_in_a_batchs_output_lose_no_reply(
    teach: Teach, teacher_server: TeacherServer, line_end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers other than OpenAI's write such characters raw."""
    import batch_server

    teach.clean_rows(3)
    teacher_server.program = lambda question, gold, turn: f"{gold}  # {number_in(question)}{line_end}b"
    raw = type("raw", (), {"loads": json.loads, "dumps": lambda value: json.dumps(value, ensure_ascii=False)})
    monkeypatch.setattr(batch_server, "json", raw)

    teach("--batch", "submit")
    done = teach("--batch", "fetch")

    assert done.returncode == 0, done.stderr
    assert all(row.generated_code for row in teach.rows) and line_end in teach.rows[1].generated_code
