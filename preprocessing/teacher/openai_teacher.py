"""A model behind an OpenAI-compatible server as the teacher.

Questions are sent as chat messages (finqa.task.prompts.teacher_messages), many at once. What comes back goes to the
journal first; the rows are then made from the journal, in the order of the questions. The key is read from
OPENAI_API_KEY and kept nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from finqa.chat.answer_journal import AnswerJournal
from finqa.chat.asking import ask_all
from finqa.chat.chat_request import shown
from finqa.chat.config import api_key
from finqa.chat.prices import Estimate, estimate, spending_of
from finqa.runtime.errors import UserError
from finqa.sandbox.results import Run
from finqa.sandbox.running import Sandbox
from finqa.task.answers import Rule
from finqa.task.records import Question
from finqa.task.worked_examples import WorkedExample
from preprocessing.teacher.batch.batches import batches_file, under_way
from preprocessing.teacher.config import NO_KEY, OpenAITeacherConfig
from preprocessing.teacher.conversation import Conversation, Wanted
from preprocessing.teacher.teachers import Reply, Teacher


class OpenAITeacher(Teacher):
    """Asks the model for what the journal does not hold yet.

    `rule` says when a program's result is the label, for a second attempt. The answers in the journals `paid_in` count
    against `max_cost` beside those in its own.

    Raises UserError where `max_cost` is set and the model's price is unknown.
    """

    batch = False
    """Whether the requests go through the Batch API, which has prices of its own."""

    def __init__(
        self,
        config: OpenAITeacherConfig,
        examples: tuple[WorkedExample, ...],
        journal_path: Path,
        rule: Rule = "strict",
        paid_in: Iterable[Path] = (),
    ) -> None:
        self.config = config
        self.examples = examples
        self.journal_path = journal_path
        self.rule: Rule = rule
        self.spending = spending_of(config, {journal_path, *paid_in})
        self.price = self.spending.price
        self.from_journal = 0
        self._attempts: Counter[int] = Counter()
        self._models: Counter[str] = Counter()

    @property
    def settings(self) -> dict[str, object]:
        return {"teacher": "openai", **asdict(self.config), **({"batch": True} if self.batch else {})}

    def usage(self) -> str:
        rows = f"{self.spending.answers} replies paid for, {self.from_journal} rows from the journal"
        in_all = f" (${self.spending.total:.2f} with earlier runs)" if self.spending.spent_before else ""
        return f"{rows}, {self.spending}{in_all}"

    def facts(self) -> dict[str, object]:
        """Tokens, dollars, the rows by the attempt that they are of, and by the model as the server names it."""
        attempts = {str(attempt): rows for attempt, rows in sorted(self._attempts.items())}
        return {
            **self.spending.facts(),
            "dollars_with_earlier_runs": self.spending.total if self.price else None,
            "rows_from_journal": self.from_journal,
            "rows_by_attempt": attempts,
            "rows_by_model": dict(self._models.most_common()),
        }

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        self.stopped = ""
        with self.open_journal() as journal, self.conversation(journal) as talk:
            missing = self.count_settled(talk, questions)
            if missing:
                self._check_no_batch(talk, missing)
                api_key(NO_KEY)  # Before the estimate is worth reading.
                planned = self.plan(talk, questions)
                print(f"estimate: {planned}{self._more_attempts()}", flush=True)
                self.spending.assumed_dollars = (planned.dollars or 0.0) / max(1, planned.requests)
                answered_before = any(talk.opening_answer(question) for question in questions)
                asyncio.run(self._ask_all(missing, talk, answered_before))
            return self.replies(talk, questions)

    def count_settled(self, talk: Conversation, questions: Sequence[Question]) -> list[Question]:
        """Count the rows that the journal settles as it is, and return the questions that it does not."""
        missing = [question for question in questions if isinstance(talk.next_step(question), Wanted)]
        self.from_journal += len(questions) - len(missing)
        return missing

    def replies(self, talk: Conversation, questions: Sequence[Question]) -> list[Reply]:
        """What the journal says about each question."""
        replies = [talk.outcome(question) for question in questions]
        self._attempts.update(reply.attempts for reply in replies)
        self._models.update(reply.model for reply in replies if reply.model)
        return replies

    def dry_run(self, questions: Sequence[Question], show_prompt: bool = True) -> str:
        """The first prompt and the estimate. Sends and writes nothing, and needs no key."""
        with self.conversation(AnswerJournal(self.journal_path).read()) as talk:
            steps = (talk.next_step(question) for question in questions)
            first = next((step for step in steps if isinstance(step, Wanted)), None)
            planned = self.plan(talk, questions)
        if first is None:
            return "nothing is to be asked: the journal has every answer"
        said = f"estimate: {planned}{self._more_attempts()}"
        if not show_prompt:
            return said
        return f"{shown(first.request, self.config.limit_name)}\n\n{said}"

    def plan(self, talk: Conversation, questions: Sequence[Question], leave_out: Collection[str] = ()) -> Estimate:
        """What is to be asked next of the questions, equal ones once, without those in a batch already."""
        steps = [talk.next_step(question) for question in questions]
        wanted = {step.key: step for step in steps if isinstance(step, Wanted) and step.key not in leave_out}
        openings = [
            (Wanted("", talk.first_request(question)).characters, talk.opening_answer(question))
            for question in questions
        ]
        answered = [(characters, answer) for characters, answer in openings if answer is not None]
        return estimate([(step.characters, step.limit) for step in wanted.values()], answered, self.price, self.batch)

    def _check_no_batch(self, talk: Conversation, questions: Sequence[Question]) -> None:
        waiting = under_way(batches_file(self.journal_path))
        steps = (talk.next_step(question) for question in questions) if waiting else ()
        paid = sum(isinstance(step, Wanted) and step.key in waiting for step in steps)
        if paid:
            raise UserError(
                f"{paid} of the questions are in batches under way ({batches_file(self.journal_path)}) and would be "
                "paid for twice; take their answers first with --batch fetch"
            )

    @contextlib.contextmanager
    def open_journal(self) -> Iterator[AnswerJournal]:
        with AnswerJournal(self.journal_path) as journal:
            if journal.damaged_lines:
                print(f"{journal.path}: {journal.damaged_lines} damaged lines left out", flush=True)
            yield journal

    @contextlib.contextmanager
    def conversation(self, journal: AnswerJournal) -> Iterator[Conversation]:
        """The conversation about each question; with a sandbox where programs decide whether to ask again."""
        with contextlib.ExitStack() as stack:
            sandbox = stack.enter_context(Sandbox(workers=1)) if self.config.attempts > 1 else None

            def run(code: str) -> Run:
                assert sandbox is not None, "programs are run only between attempts"
                return sandbox.run(code)

            yield Conversation(self.config, self.examples, self.rule, journal, run)

    async def _ask_all(self, questions: Sequence[Question], talk: Conversation, answered_before: bool) -> None:
        """Fill the journal with what the questions need, `max_concurrent` requests at a time."""

        given_up = await ask_all(
            questions, talk.next_step, self.config, talk.journal, self.spending, "teacher", answered_before
        )
        steps = (talk.next_step(question) for question in questions)
        unasked = sum(isinstance(step, Wanted) and step.key not in given_up for step in steps)
        self.stopped = self.spending.used_up(unasked, len(questions), "rows") if unasked else ""

    def _more_attempts(self) -> str:
        return f"; up to {self.config.attempts} attempts a question, of which this is the next" * (
            self.config.attempts > 1
        )
