"""More than one try: what the teacher is shown of its failed program, which program becomes the row."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from teacher_server import TeacherServer
from teaching import Teach, number_in

from finqa.chat.answer_journal import Answer, AnswerJournal
from finqa.sandbox.results import Run
from finqa.task.records import read_questions
from preprocessing.teacher.config import OpenAITeacherConfig
from preprocessing.teacher.conversation import Conversation, Wanted


def failing_until(good_turn: int, bad: str = "ans = 41"):
    """A teacher whose programs are wrong before the given turn of a talk."""
    return lambda question, gold, turn: gold if turn >= good_turn else bad


def test_a_question_is_asked_once_unless_told_otherwise(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(3)
    teacher_server.program = failing_until(2)
    teach()
    assert set(teacher_server.asked.values()) == {1}
    assert {row.generated_code for row in teach.rows} == {"ans = 41"}


def test_the_first_program_that_gives_the_label_is_the_row(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(3)
    teacher_server.program = failing_until(3)

    teach("--attempts", "5")

    assert set(teacher_server.asked.values()) == {3}
    assert all(row.actual_answer == "2256.7" for row in teach.rows)
    assert teach.manifest()["rows_by_attempt"] == {"3": 3}


def test_the_last_attempt_is_the_row_where_none_is_right(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(2)
    teacher_server.program = lambda question, gold, turn: f"ans = {40 + turn}"
    teach("--attempts", "3")
    assert [row.actual_answer for row in teach.rows] == ["43.0", "43.0"]
    assert set(teacher_server.asked.values()) == {3}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("ans = 41", "The program gives 41.0, which is not the right answer"),
        ("ans = 1 / 0", "ZeroDivisionError"),
        ("x = 1", "does not run (no-answer"),
    ],
)
def test_the_teacher_sees_its_program_and_what_it_gave_and_never_the_label(
    teach: Teach, teacher_server: TeacherServer, bad: str, says: str
) -> None:
    teach.clean_rows(1)
    teacher_server.program = failing_until(2, bad)

    teach("--attempts", "2", "--no-hint")

    first, second = (body["messages"] for body in teacher_server.bodies)
    *talk, program, complaint = second
    assert talk == first
    assert program == {"role": "assistant", "content": bad}
    assert complaint["role"] == "user" and says in complaint["content"]
    label = read_questions(teach.command.data_dir / "clean/FinQA/train.csv")[0].answer
    assert label == "2256.7" and not any(label in message["content"] for message in second)


def test_a_reply_without_a_program_is_not_asked_again_in_other_words(
    teach: Teach, teacher_server: TeacherServer
) -> None:
    teach.clean_rows(2)
    teacher_server.fault = lambda question, nth: ["filtered", "empty"][number_in(question)]
    teach("--attempts", "4", "--max-failed-share", "1")
    assert set(teacher_server.asked.values()) == {1}


def test_more_attempts_go_on_from_the_journal(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(4)
    teacher_server.program = lambda question, gold, turn: gold if turn > 1 or number_in(question) == 0 else "ans = 41"
    teach()
    teach("--attempts", "3")
    assert sorted(teacher_server.asked.values()) == [1, 2, 2, 2]
    assert all(row.actual_answer == "2256.7" for row in teach.rows)


def test_an_attempt_that_cannot_be_had_leaves_the_program_before_it(
    teach: Teach, teacher_server: TeacherServer
) -> None:
    teach.clean_rows(1)
    teacher_server.program = failing_until(2)
    teacher_server.fault = lambda question, nth: 400 if nth > 1 else None
    teach("--attempts", "2")
    assert teach.rows[0].generated_code == "ans = 41"

    teacher_server.fault = lambda question, nth: None
    teach("--attempts", "2")
    assert teach.rows[0].actual_answer == "2256.7"


def test_what_a_program_gave_once_is_not_found_out_again(teach: Teach, tmp_path: Path) -> None:
    """A program whose result depends on the machine (a time limit, say) must not change the talk when it is resumed."""
    teach.clean_rows(1)
    question = read_questions(teach.command.data_dir / "clean/FinQA/train.csv")[0]
    config = OpenAITeacherConfig(attempts=2)
    with AnswerJournal(tmp_path / "j.jsonl") as journal:
        ran: list[str] = []
        talk = Conversation(config, (), "strict", journal, lambda code: ran.append(code) or Run(7.0, None, ""))
        opening = talk.next_step(question)
        assert isinstance(opening, Wanted)
        journal.add_answer(opening.key, Answer("ans = 7", "stop", "m", limit=config.max_completion_tokens))
        followed = talk.next_step(question)
        assert ran == ["ans = 7"]
    with AnswerJournal(tmp_path / "j.jsonl") as journal:
        talk = Conversation(config, (), "strict", journal, lambda code: Run(None, "cpu-time", "slow today"))
        assert talk.next_step(question) == followed


@pytest.mark.slow
def test_killed_between_attempts_it_goes_on_where_it_was(teach: Teach, teacher_server: TeacherServer) -> None:
    teach.clean_rows(24)
    teacher_server.program = failing_until(3, "ans = 1 / 0")
    teacher_server.delay_s = 0.02
    for kill in range(2):
        process = teach.start("--attempts", "3", "--max-concurrent", "4")
        while not teach.journal.exists() or teach.journal.read_bytes().count(b"\n") < 28 * (kill + 1):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()

    done = teach("--attempts", "3", "--max-concurrent", "4")

    assert done.returncode == 0, done.stderr
    assert all(row.actual_answer == "2256.7" for row in teach.rows)
    assert 24 * 3 <= len(teacher_server.bodies) <= 24 * 3 + 2 * 4
    sent = len(teacher_server.bodies)
    before = teach.output.read_bytes()
    teach("--attempts", "3")
    assert len(teacher_server.bodies) == sent and teach.output.read_bytes() == before
