"""What the teacher costs: estimated before, counted while, ended in time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_fixture import the_one_line
from made_up_rows import raw_row
from teacher_server import TeacherServer
from teaching import Teach, only_for, write_clean

from finqa.chat.answer_journal import Answer
from finqa.chat.prices import Price, Spending, estimate, price_of
from finqa.runtime.errors import UserError

USAGE = {
    "prompt_tokens": 2_000,
    "completion_tokens": 800,
    "prompt_tokens_details": {"cached_tokens": 1_500},
    "completion_tokens_details": {"reasoning_tokens": 700},
}
A_REPLY = (500 * 1.25 + 1_500 * 0.125 + 800 * 10) / 1e6
"""Dollars for a reply with USAGE at gpt-5's list price."""


def test_tokens_are_counted_in_the_manifest(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    teacher_server.usage = USAGE
    done = teach()
    manifest = teach.manifest()
    assert manifest["prompt_tokens"] == questions * 2_000 and manifest["cached_tokens"] == questions * 1_500
    assert manifest["completion_tokens"] == questions * 800 and manifest["reasoning_tokens"] == questions * 700
    assert manifest["dollars"] == pytest.approx(questions * A_REPLY)
    assert f"22,000 tokens read (16,500 cached), 8,800 written (7,700 reasoning), ${questions * A_REPLY:.2f}" in (
        done.stdout
    )
    assert manifest["config"]["model"] == "gpt-5" and manifest["config"]["hint"] is True


def test_the_estimate_comes_before_the_first_request(teach: Teach, questions: int) -> None:
    done = teach()
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"estimate: {questions} requests, about ")
    assert "1,000 a reply, assumed" in first and "at most $" in first and "to be checked" in first


def test_later_estimates_are_measured(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(6)
    teacher_server.usage = USAGE
    teach("--limit", "4")
    done = teach("--dry-run")
    assert "estimate: 2 requests" in done.stdout and "(800 a reply, the mean of 4 so far)" in done.stdout


def test_an_estimate_of_questions_like_the_answered_ones_is_what_they_cost() -> None:
    price = Price(1.0, 0.5, 4.0, batch=0.5)
    answers = [(700, Answer("", "stop", "m", 200, 50)), (900, Answer("", "stop", "m", 300, 150))]
    planned = estimate([(700, 1_000), (900, 1_000)], answers, price)
    assert (planned.requests, planned.prompt_tokens, planned.completion_tokens) == (2, 500, 200)
    assert planned.dollars == pytest.approx(sum(price.of(answer) for _, answer in answers))
    batched = estimate([(700, 1_000), (900, 1_000)], answers, price, batch=True)
    assert batched.dollars == pytest.approx(planned.dollars / 2)


def test_a_dry_run_prints_the_first_prompt_needs_no_key_and_leaves_nothing(
    teach: Teach, questions: int, teacher_server: TeacherServer
) -> None:
    done = teach("--dry-run", "--no-hint", key="")
    assert done.returncode == 0, done.stderr
    assert "[system]\nYou write short Python programs" in done.stdout
    assert "what does MADE/train/add come to?" in done.stdout and "MADE/train/subtract" not in done.stdout
    assert f"estimate: {questions} requests" in done.stdout
    assert not teacher_server.bodies and not teach.output.parent.exists()


def test_the_progress_line_has_tokens_and_dollars(
    teach: Teach, questions: int, teacher_server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finqa.runtime.progress.PLAIN_EVERY_S", 0.0)
    teacher_server.usage = USAGE
    said = (line[9:] for line in teach().stderr.splitlines())  # after the time of day
    lines = [line for line in said if line.startswith("teacher: ")]
    assert len(lines) == questions
    assert lines[-1].startswith(f"teacher: {questions} of {questions}, ")
    assert "22,000 tokens read (16,500 cached), 8,800 written" in lines[-1]
    assert f"${questions * A_REPLY:.2f}, 0 failed" in lines[-1]


def test_max_cost_ends_the_run_in_time_and_says_how_to_go_on(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(40)
    teacher_server.usage, teacher_server.delay_s = USAGE, 0.02
    most = 10.5 * A_REPLY

    line = the_one_line(teach("--max-cost", str(most), "--max-concurrent", "4"))

    assert "--max-cost" in line and "30 of 40 rows are not settled" in line and "a larger --max-cost" in line
    assert len(teacher_server.bodies) == 10 and teach.manifest()["dollars"] <= most
    assert [bool(row.actual_answer) for row in teach.rows].count(True) == len(teacher_server.bodies)
    assert {row.error_kind for row in teach.rows} == {"", "teacher-not-asked"}


def test_max_cost_counts_what_earlier_runs_paid(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(12)
    teacher_server.usage = USAGE
    teach("--max-cost", str(5.5 * A_REPLY), "--max-concurrent", "1")
    assert len(teacher_server.bodies) == 5

    line = the_one_line(teach("--max-cost", str(5.5 * A_REPLY), "--max-concurrent", "1"))
    assert len(teacher_server.bodies) == 5 and "by earlier runs" in line

    done = teach("--max-cost", "5", "--max-concurrent", "1")
    assert done.returncode == 0 and len(teacher_server.bodies) == 12
    assert "7 replies paid for, 5 rows from the journal" in done.stdout


def test_max_cost_counts_the_journals_of_all_chosen_splits(teach: Teach, teacher_server: TeacherServer) -> None:
    write_clean(teach.command.data_dir, train=[raw_row("a")], dev=[raw_row("b")])
    teacher_server.usage = USAGE

    line = the_one_line(teach("--split", "all", "--max-cost", str(A_REPLY * 0.9)))

    assert len(teacher_server.bodies) == 1 and "finqa_dev_generated.csv" in line


def test_each_earlier_answer_counts_at_the_price_of_its_own_model(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(4)
    teacher_server.usage = USAGE
    teach("--model", "mine")
    teach("--model", "gpt-5")

    done = teach("--model", "gpt-5-mini", "--max-cost", str(4 * A_REPLY * 1.3))

    # gpt-5-mini costs a fifth of gpt-5; the model without a price costs nothing that is known.
    assert done.returncode == 0, done.stderr
    assert teach.manifest()["dollars_with_earlier_runs"] == pytest.approx(4 * A_REPLY * 1.2)
    assert teach.manifest()["rows_by_model"] == {"gpt-5-mini-dated": 4}


def test_max_cost_needs_a_price(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    line = the_one_line(teach("--model", "mine", "--max-cost", "5"))
    assert "'mine'" in line and "--prices" in line and not teacher_server.bodies


def test_max_cost_cannot_be_kept_by_a_server_that_counts_nothing(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(4)
    teacher_server.fault = lambda question, nth: "no-usage"
    line = the_one_line(teach("--max-cost", "5", "--max-concurrent", "1"))
    assert "usage" in line and len(teacher_server.bodies) == 1


def test_a_model_without_a_price_is_counted_in_tokens(teach: Teach, questions: int) -> None:
    done = teach("--model", "mine")
    assert done.returncode == 0 and "no price is known" in done.stdout
    assert teach.manifest()["dollars"] is None and teach.manifest()["prompt_tokens"] == questions * 100


def test_prices_add_a_model_and_override_a_field(teach: Teach, questions: int, tmp_path: Path) -> None:
    table = tmp_path / "mine.json"
    table.write_text(json.dumps({"models": {"mine": {"input": 10, "output": 100}, "gpt-5": {"output": 20}}}))
    teach("--model", "mine", "--prices", str(table), "--max-cost", "5")
    assert teach.manifest()["dollars"] == pytest.approx(questions * (100 * 10 + 10 * 100) / 1e6)
    assert price_of("gpt-5", table) == Price(1.25, 0.125, 20, 0.5)
    assert price_of("mine", table) == Price(10, 10, 100, 1.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no table"),
        ("[]", "no table"),
        ('{"models": {"m": {"input": "1", "output": 1}}}', "input of 'm'"),
        ('{"models": {"m": {"input": 1, "output": -1}}}', "output of 'm'"),
        ('{"models": {"m": {"input": 1}}}', "lacks output"),
        ('{"models": {"m": {"in": 1}}}', "unknown field 'in'"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_table_of_prices_is_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        price_of("m", path)


def test_a_dated_name_has_the_price_of_its_model_and_a_longer_one_has_none() -> None:
    assert price_of("gpt-5-2025-08-07") == price_of("gpt-5") != None  # noqa: E711
    assert price_of("gpt-5-mini") != price_of("gpt-5")
    assert price_of("gpt-5-unheard-of") is None


def test_a_batched_answer_costs_half_and_reasoning_is_not_counted_twice() -> None:
    price = price_of("gpt-5")
    answer = Answer("", "stop", "gpt-5", 2_000, 800, cached_tokens=1_500, reasoning_tokens=700)
    batched = Answer(**{**vars(answer), "batch": "batch_1"})
    assert price is not None
    assert price.of(answer) == pytest.approx(A_REPLY) and price.of(batched) == pytest.approx(A_REPLY / 2)


def test_spending_lets_in_what_the_mean_reply_says_is_affordable() -> None:
    spending = Spending(Price(0, 0, 1e6), max_cost=10.0)
    spending.assumed_dollars = 2.0
    assert spending.allows(0) and spending.allows(4) and not spending.allows(5)
    spending.add(Answer("", "stop", "m", 1, 4))
    assert spending.allows(0) and not spending.allows(1)
    spending.add(Answer("", "stop", "m", 1, 6))
    assert not spending.allows(0)


def test_a_reply_that_was_cut_off_is_paid_for_too(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(2)
    teacher_server.usage, teacher_server.fault = USAGE, only_for("1", "length", times=1)
    teach()
    assert teach.manifest()["dollars"] == pytest.approx(3 * A_REPLY)


def test_limit_does_not_replace_a_longer_output(teach: Teach, questions: int, teacher_server: TeacherServer) -> None:
    done = teach("--limit", "3")
    assert "only the first 3 of 11 rows (--limit)" in done.stdout and teach.manifest()["only_the_first_of"] == 11
    teach()
    teacher_server.bodies.clear()

    line = the_one_line(teach("--limit", "3", "--temperature", "1"))

    assert "has 11 rows" in line and "--limit" in line
    assert len(teach.rows) == 11 and not teacher_server.bodies and "only_the_first_of" not in teach.manifest()
