from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from finqa.errors import UserError
from preprocessing.journal import Answer, Journal, request_key

ANSWER = Answer("ans = 1  # naïve \U0001f9fe \n", "stop", "gpt-5-dated", 100, 10)
REQUEST = {"model": "gpt-5", "messages": [{"role": "user", "content": "how much?"}], "max_completion_tokens": 100}


def test_an_answer_is_read_back_as_it_was(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add("a", ANSWER)
    with Journal(tmp_path / "j.jsonl") as journal:
        assert journal.get("a") == ANSWER and journal.get("b") is None


def test_an_answer_is_in_the_file_when_add_returns(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add("a", ANSWER)
        assert (tmp_path / "j.jsonl").read_bytes().count(b"\n") == 1


def test_a_torn_last_line_is_cut_off_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.add("a", ANSWER)
        journal.add("b", ANSWER)
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for length in range(first, len(content)):
        path.write_bytes(content[:length])
        with Journal(path) as journal:
            assert journal.get("a") == ANSWER and journal.get("b") is None and journal.damaged_lines == 0
            journal.add("c", ANSWER)
        with Journal(path) as journal:
            assert journal.get("c") == ANSWER and len(journal) == 2


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"key": "x"}', b'{"text": "x"}', b"\xff\xfe", b'{"key": []}', b"7"])
def test_a_damaged_line_is_counted_and_costs_no_other(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.add("a", ANSWER)
    path.write_bytes(line + b"\n" + path.read_bytes())
    with Journal(path) as journal:
        assert journal.get("a") == ANSWER and journal.damaged_lines == 1


def test_two_runs_cannot_write_to_one_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl"), pytest.raises(UserError, match="another run"), Journal(tmp_path / "j.jsonl"):
        pass
    with Journal(tmp_path / "j.jsonl"):
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


@pytest.mark.parametrize(
    ("finish_reason", "limit", "needs"), [("length", 101, True), ("length", 100, False), ("stop", 101, False)]
)
def test_only_what_a_smaller_limit_cut_off_is_needed_again(
    tmp_path: Path, finish_reason: str, limit: int, needs: bool
) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add("a", replace(ANSWER, finish_reason=finish_reason, limit=100))
        assert journal.needs("a", limit) == needs and journal.needs("b", limit)
