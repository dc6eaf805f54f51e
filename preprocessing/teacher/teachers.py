"""Who writes the programs that the student learns from.

A teacher takes questions and gives one `Reply` for each, in their order. There are two: `ProgramTeacher` here
compiles the gold programs (no network, no cost), `OpenAITeacher` in preprocessing.teacher.openai_teacher asks a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finqa.task.program_compiler import ProgramStyle, to_python
from finqa.task.programs import ProgramError
from finqa.task.records import Question


@dataclass(frozen=True)
class Reply:
    """What a teacher made of one question. Either `code` holds a program, or `error_kind` says why there is none."""

    code: str = ""
    finish_reason: str = ""
    """Why the model stopped writing (`stop`, `length`, `content_filter`, ...); empty from the program teacher."""
    error_kind: str = ""
    """Starts with `teacher-`, so that it is told from what went wrong in the sandbox; empty where there is code."""
    error_message: str = ""
    model: str = ""
    """As the server names it; empty from the program teacher."""
    attempts: int = 1
    """Times the teacher was asked, the last of which this reply is."""


class Teacher(Protocol):
    """Called with questions; gives a reply for each, in order.

    A question without a program is a reply with an error kind, never an exception. Raises UserError for what would
    spoil every reply alike: a missing or wrong key, an unknown model, a server that is not there.
    """

    @property
    def settings(self) -> dict[str, object]:
        """What the run manifest says about this teacher. Holds no key."""
        ...

    stopped: str = ""
    """Why the last call ended before all questions were asked, and how to go on; empty where it did not."""

    def __call__(self, questions: Sequence[Question]) -> list[Reply]: ...

    def usage(self) -> str:
        """What the calls so far cost, for the summary line; empty where they cost nothing."""
        return ""

    def facts(self) -> dict[str, object]:
        """What the calls so far cost, for the manifest."""
        return {}

    def dry_run(self, questions: Sequence[Question], show_prompt: bool = True) -> str:
        """What a call would do and cost, with the first prompt; does nothing of it."""
        ...


class ProgramTeacher(Teacher):
    """Compiles the gold program of each question to Python (finqa.task.program_compiler.to_python)."""

    def __init__(self, style: ProgramStyle = "plain"):
        self.style: ProgramStyle = style

    @property
    def settings(self) -> dict[str, object]:
        return {"teacher": "program", "style": self.style}

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        return [self._reply(question) for question in questions]

    def dry_run(self, questions: Sequence[Question], show_prompt: bool = True) -> str:
        return f"{len(questions)} gold programs to compile; no request, no cost"

    def _reply(self, question: Question) -> Reply:
        if not question.program:
            return Reply(error_kind="teacher-program", error_message="the question has no gold program")
        try:
            code = to_python(question.program, question.table, question.question, question.passage, self.style)
            return Reply(code=code)
        except ProgramError as error:
            return Reply(error_kind="teacher-program", error_message=str(error))
