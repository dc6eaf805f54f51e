from __future__ import annotations

import json
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from finqa.chat.answer_journal import Answer, AnswerJournal, Failure, request_key
from finqa.runtime.errors import UserError
from finqa.sandbox.results import Run

ANSWER = Answer("ans = 1  # naïve \U0001f9fe \n", "stop", "gpt-5-dated", 100, 10)
REQUEST = {"model": "gpt-5", "messages": [{"role": "user", "content": "how much?"}], "max_completion_tokens": 100}


def test_an_answer_is_read_back_as_it_was(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path / "j.jsonl") as journal:
        journal.add_answer("a", ANSWER)
    with AnswerJournal(tmp_path / "j.jsonl") as journal:
        assert journal.answer("a") == ANSWER and journal.answer("b") is None


def test_an_answer_is_in_the_file_when_add_returns(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path / "j.jsonl") as journal:
        journal.add_answer("a", ANSWER)
        assert (tmp_path / "j.jsonl").read_bytes().count(b"\n") == 1


def test_a_torn_last_line_is_cut_off_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with AnswerJournal(path) as journal:
        journal.add_answer("a", ANSWER)
        journal.add_answer("b", ANSWER)
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for length in range(first, len(content) - 1):
        path.write_bytes(content[:length])
        with AnswerJournal(path) as journal:
            assert journal.answer("a") == ANSWER and journal.answer("b") is None and journal.damaged_lines == 0
            journal.add_answer("c", ANSWER)
        with AnswerJournal(path) as journal:
            assert journal.answer("c") == ANSWER and len(journal) == 2


def test_a_last_line_that_lacks_only_its_break_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with AnswerJournal(path) as journal:
        journal.add_answer("a", ANSWER)
    path.write_bytes(path.read_bytes()[:-1])
    with AnswerJournal(path) as journal:
        assert journal.answer("a") == ANSWER and journal.damaged_lines == 0
        journal.add_answer("b", ANSWER)
    with AnswerJournal(path) as journal:
        assert len(journal) == 2


def test_failures_and_runs_are_read_back_and_an_answer_ends_them(tmp_path: Path) -> None:
    path, run, failure = tmp_path / "j.jsonl", Run("yes", None, ""), Failure("teacher-timeout", "slow")
    with AnswerJournal(path) as journal:
        journal.add_failure("a", failure)
        journal.add_answer("b", ANSWER)
        journal.add_run("b", run)
    with AnswerJournal(path) as journal:
        assert journal.failure("a") == failure and journal.run("b") == run
        journal.add_answer("a", ANSWER)
        journal.add_answer("b", replace(ANSWER, text="another"))
    with AnswerJournal(path) as journal:
        assert journal.failure("a") is None and journal.run("b") is None
        assert len(journal) == 2 and len(journal.paid) == 3


def test_a_journal_of_the_first_form_is_read(tmp_path: Path) -> None:
    line = {"key": "a", "text": "ans = 1", "finish_reason": "stop", "model": "m", "prompt_tokens": 1, "limit": 9}
    (tmp_path / "j.jsonl").write_text(json.dumps(line) + "\n")
    with AnswerJournal(tmp_path / "j.jsonl") as journal:
        assert journal.answer("a") == Answer("ans = 1", "stop", "m", 1, 0, 9)


def test_reading_only_makes_no_file_and_leaves_a_torn_line(tmp_path: Path) -> None:
    assert len(AnswerJournal(tmp_path / "none" / "j.jsonl").read()) == 0
    assert not (tmp_path / "none").exists()
    (tmp_path / "j.jsonl").write_bytes(b'{"key": "a", "te')
    assert len(AnswerJournal(tmp_path / "j.jsonl").read()) == 0
    assert (tmp_path / "j.jsonl").read_bytes() == b'{"key": "a", "te'


def test_a_full_disk_is_one_line_and_tears_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with AnswerJournal(path) as journal:
        journal.add_answer("a", ANSWER)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        try:
            with pytest.raises(UserError, match="cannot be written"):
                journal.add_answer("b", ANSWER)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        journal.add_answer("c", ANSWER)
    with AnswerJournal(path) as journal:
        assert len(journal) == 2 and journal.answer("c") == ANSWER and journal.damaged_lines == 0


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'{"key": "x"}', b'{"text": "x"}', b"\xff\xfe", b'{"key": []}', b"7", b'{"key": "x", "run": 1}'],
)
def test_a_damaged_line_is_counted_and_costs_no_other(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j.jsonl"
    with AnswerJournal(path) as journal:
        journal.add_answer("a", ANSWER)
    path.write_bytes(line + b"\n" + path.read_bytes())
    with AnswerJournal(path) as journal:
        assert journal.answer("a") == ANSWER and journal.damaged_lines == 1


def test_two_runs_cannot_write_to_one_journal(tmp_path: Path) -> None:
    with (
        AnswerJournal(tmp_path / "j.jsonl"),
        pytest.raises(UserError, match="another run"),
        AnswerJournal(tmp_path / "j.jsonl"),
    ):
        pass
    with AnswerJournal(tmp_path / "j.jsonl"):
        pass


def test_the_key_follows_everything_that_shapes_the_reply_and_nothing_else() -> None:
    assert request_key(REQUEST) == request_key(dict(reversed(REQUEST.items())))
    changed = [
        REQUEST | {"model": "gpt-5-mini"},
        REQUEST | {"temperature": 0.0},
        REQUEST | {"messages": [{"role": "user", "content": "how  much?"}]},
    ]
    assert len({request_key(request) for request in [REQUEST, *changed]}) == 4
    assert request_key(REQUEST) == request_key(REQUEST | {"max_completion_tokens": 101})
