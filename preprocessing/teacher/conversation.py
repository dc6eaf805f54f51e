"""What to ask next about a question, which follows from the journal alone.

So a run that was killed continues every question where it was, and batches, single requests and the table at the end
agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from finqa.chat import chat_request
from finqa.chat.answer_journal import Answer, AnswerJournal, request_key
from finqa.chat.chat_request import Request, how_it_ended, next_limit, one_line, request_of
from finqa.sandbox.results import Run
from finqa.task.answers import Rule, match
from finqa.task.prompts import extract_code, teacher_messages
from finqa.task.records import Question
from finqa.task.worked_examples import WorkedExample
from preprocessing.run_programs import answer_text
from preprocessing.teacher.config import OpenAITeacherConfig
from preprocessing.teacher.teachers import Reply


@dataclass(frozen=True)
class Wanted(chat_request.Wanted):
    """A request about a question that the journal holds no answer to yet."""

    so_far: Reply | None = None
    """What the question has come to if this is never answered: its cut reply, or the attempt before."""


class Conversation:
    """Conducts the conversation about each question.

    With `attempts` above 1 a program that does not run, or does not give the label, goes back to the teacher as its own
    turn, followed by the error, or by what it gave and that this is not the right answer. The label is never shown, not
    even beside the hint: a program that only assigns it would pass the filter and teach nothing. What the teacher does
    learn from the label is one bit an attempt, that it was missed. So without the hint many attempts come to guessing
    until the filter is content, and the programs that pass are less to be trusted than those of a first attempt; the
    manifest counts them by attempt.

    A reply without a program (cut off, refused, empty) is not asked again with other words.

    The `examples` are shown before each question, `rule` says when a program's result is the label, and `run` runs a
    program in the sandbox, which is asked for where `attempts` is above 1.
    """

    def __init__(
        self,
        config: OpenAITeacherConfig,
        examples: tuple[WorkedExample, ...],
        rule: Rule,
        journal: AnswerJournal,
        run: Callable[[str], Run],
    ) -> None:
        self.config = config
        self.examples = examples
        self.rule: Rule = rule
        self.journal = journal
        self._run_program = run

    def first_request(self, question: Question) -> Request:
        """The request that opens the conversation about a question; without its limit."""
        return request_of(self.config, self._opening(question))

    def opening_answer(self, question: Question) -> Answer | None:
        """The answer to that."""
        return self.journal.answer(request_key(self.first_request(question)))

    def next_step(self, question: Question) -> Reply | Wanted:
        """What became of the question, or what is to be asked next."""
        messages, so_far = self._opening(question), None
        for attempt in range(1, self.config.attempts + 1):
            request = request_of(self.config, messages)
            key = request_key(request)
            answer = self.journal.answer(key)
            limit = next_limit(answer, self.config.max_completion_tokens)
            if answer is None or limit:
                so_far = reply_from(answer, attempt) if answer else so_far
                return Wanted(key, request | {"max_completion_tokens": limit}, answer, so_far)
            reply = so_far = reply_from(answer, attempt)
            if not reply.code or attempt == self.config.attempts:
                return reply
            run = self._run(key, reply.code)
            if run.error_kind is None and match(run.answer, question.answer, self.rule):
                return reply
            messages += [
                {"role": "assistant", "content": reply.code},
                {"role": "user", "content": complaint(run)},
            ]
        raise AssertionError("the last attempt always returns")

    def outcome(self, question: Question) -> Reply:
        """The row of the question as things stand: what it has come to, or why there is no more of it."""
        step = self.next_step(question)
        if isinstance(step, Reply):
            return step
        if step.so_far is not None:
            return step.so_far
        failure = self.journal.failure(step.key)
        if failure is None:
            return Reply(error_kind="teacher-not-asked", error_message="the run ended before this question was asked")
        return Reply(error_kind=failure.kind, error_message=failure.message)

    def _opening(self, question: Question) -> list[dict[str, str]]:
        return teacher_messages(question, self.examples, hint=self.config.hint)

    def _run(self, key: str, code: str) -> Run:
        """What the program gave; from the journal where it ran before, so that the conversation takes one course."""
        run = self.journal.run(key)
        if run is None:
            run = self._run_program(code)
            if self.journal.is_open:
                self.journal.add_run(key, run)
        return run


def reply_from(answer: Answer, attempt: int = 1) -> Reply:
    """The program in an answer. A reply that was cut off or refused has none, whatever its text looks like."""
    reply = Reply(finish_reason=answer.finish_reason, model=answer.model, attempts=attempt)
    reason = how_it_ended(answer)
    if reason != "stop":
        message = f"finish_reason is {reason}, at most {answer.limit} tokens: {one_line(answer.text)[-200:]}"
        return replace(reply, error_kind=f"teacher-{reason}", error_message=message)
    code = extract_code(answer.text)
    if not code.strip():
        return replace(reply, error_kind="teacher-empty", error_message="the reply holds no program")
    return replace(reply, code=code)


def complaint(run: Run) -> str:
    """What the teacher is told about a program that failed. The label is not in it."""
    if run.error_kind is not None:
        return f"The program does not run ({run.error_kind}: {run.message}). Write the whole program again."
    return f"The program gives {answer_text(run.answer)}, which is not the right answer. Write the whole program again."
