"""The OpenAI teacher through the Batch API: submit, status, and a fetch that is a teacher like any other."""

from __future__ import annotations

from collections.abc import Sequence

from finqa.runtime.errors import UserError
from finqa.task.records import Question
from preprocessing.teacher.batch.batches import FINISHED, REQUESTS_A_BATCH, Batches, reason, under_way
from preprocessing.teacher.conversation import Conversation, Wanted
from preprocessing.teacher.openai_teacher import OpenAITeacher
from preprocessing.teacher.teachers import Reply

FINAL = ("teacher-bad-request",)
"""Failures that sending a request again cannot mend."""


class BatchTeacher(OpenAITeacher):
    """Called with questions it fetches: it takes what finished batches gave, and replies from the journal.

    Raises UserError while a batch is under way.
    """

    batch = True

    def submit(self, questions: Sequence[Question], most_requests: int = REQUESTS_A_BATCH) -> str:
        """Send what is missing and in no batch; returns a line about it."""
        with self.open_journal() as journal, self.conversation(journal) as talk:
            batches = Batches(self.config, journal)
            batches.find_unnamed()
            waiting = under_way(batches.path)
            wanted = [step for step in _missing(questions, talk).values() if step.key not in waiting]
            if not wanted:
                return f"nothing to submit; {len(waiting)} requests are under way in batches"
            planned = self.plan(talk, questions, leave_out=waiting)
            print(f"estimate: {planned}", flush=True)
            self._check_money(planned.dollars or 0.0, planned.requests, len(waiting))
            made = batches.submit(wanted, most_requests)
        return f"{len(wanted)} requests submitted as {', '.join(record.id for record in made)} ({batches.path})"

    def status(self) -> str:
        """A line for each batch whose answers are not taken yet."""
        with self.open_journal() as journal:
            looked = Batches(self.config, journal).look()
        lines = []
        for _, batch in looked:
            counts = batch.request_counts
            done = f", {counts.completed} of {counts.total} done, {counts.failed} failed" if counts else ""
            lines.append(f"{reason(batch)}{done}")
        return "; ".join(lines) or "no batch is under way"

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        with self.open_journal() as journal, self.conversation(journal) as talk:
            batches = Batches(self.config, journal)
            if not batches.records and _missing(questions, talk):
                raise UserError(f"no batch was submitted for {journal.path}; begin with --batch submit")
            self.count_settled(talk, questions)
            running = []
            for record, batch in batches.look():
                if batch.status not in FINISHED:
                    running.append(f"{record.id} is {batch.status}")
                    continue
                if batch.status != "completed":
                    print(reason(batch), flush=True)
                for answer in batches.take(record, batch):
                    self.spending.add(answer)
            if running:
                raise UserError(
                    f"{', '.join(running)}: the output is written by the fetch after the last batch has finished; what "
                    "has finished is in the journal"
                )
            left = [step for step in _missing(questions, talk).values() if not _is_final(step, talk)]
            if left:
                self.stopped = (
                    f"{len(left)} requests are still wanted (failed, expired, cut off, or a next attempt); send them "
                    "with --batch submit, or by the same command without --batch"
                )
            return self.replies(talk, questions)

    def _check_money(self, dollars: float, requests: int, waiting: int) -> None:
        most, expected = self.config.max_cost, self.spending.total + dollars * (requests + waiting) / requests
        if most is not None and expected > most:
            raise UserError(
                f"about ${expected:.2f} would be spent, with earlier runs and batches under way, more than --max-cost "
                f"{most:g}, and a batch cannot be ended in time; submit fewer rows with --limit"
            )


def _missing(questions: Sequence[Question], talk: Conversation) -> dict[str, Wanted]:
    steps = (talk.next_step(question) for question in questions)
    return {step.key: step for step in steps if isinstance(step, Wanted)}


def _is_final(step: Wanted, talk: Conversation) -> bool:
    failure = talk.journal.failure(step.key)
    return failure is not None and failure.kind in FINAL
