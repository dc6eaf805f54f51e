"""How the OpenAI teacher is asked, and the flags that say so."""

from __future__ import annotations

from dataclasses import dataclass

from finqa.chat.config import ChatConfig
from finqa.runtime.command_line import flag

NO_KEY = ", or compile the gold programs with --teacher program"
"""The other way of the user who has no key."""


@dataclass(frozen=True)
class OpenAITeacherConfig(ChatConfig):
    """How to ask for programs. Both fields shape the replies."""

    hint: bool = flag(True, both_ways=True, shown="--hint")
    """Whether the prompt ends with the question's gold program."""
    attempts: int = flag(1, least=1)
    """Times a question is put to the teacher, with what its last program gave, until the program gives the label.

    Once by default, as in the published run: with the hint most programs that miss the label meet a doubtful label,
    and without it more attempts cost more and keep programs that came out right by luck (see Conversation)."""
