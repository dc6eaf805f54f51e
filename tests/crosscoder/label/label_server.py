"""A chat-completions server that names latents by rule: the teacher's server with other questions.

In these tests a latent fires on one sign wherever it stands, so the right label is the sign, and a passage is one on
which it fires where it holds the sign.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from teacher_server import Fault, TeacherServer


def named(asked: str) -> str:
    """The sign that is marked most often."""
    signs = re.findall("<<(.)>>", asked)
    return f"Label: the sign {max(set(signs), key=signs.count)}"


def judged(asked: str) -> str:
    """Yes where a passage holds the sign that the description ends with."""
    sign, *passages = passages_in(asked)
    return verdicts(sign[-1] in passage for passage in passages)


def passages_in(asked: str) -> list[str]:
    """What stands before the first passage, and the passages."""
    return [part.strip() for part in re.split(r"Passage \d+: ", asked)]


def verdicts(said: Any) -> str:
    return "\n".join(f"{i}: {'yes' if each else 'no'}" for i, each in enumerate(said, start=1))


class LabelServer(TeacherServer):
    def __init__(self) -> None:
        super().__init__()
        self.name: Callable[[str], str] = named
        self.judge: Callable[[str], str] = judged

    def asked_about(self, body: dict[str, Any]) -> tuple[Any, str, int]:
        """The passages that are asked about, and the turn (from 1) of the talk."""
        users = [message["content"] for message in body["messages"] if message["role"] == "user"][1:]
        return SimpleNamespace(question=users[0]), "", len(users)

    def completion(self, body: dict[str, Any], fault: Fault) -> dict[str, Any]:
        asked, _, turn = self.asked_about(body)
        rule = self.judge if asked.question.startswith("Description: ") else self.name
        said = rule(asked.question) if turn == 1 or rule is not self.name else named(asked.question)
        message = {"role": "assistant", "content": said}
        choices = [{"index": 0, "message": message, "finish_reason": "length" if fault == "length" else "stop"}]
        return {"model": body["model"], "choices": choices, "usage": self.usage}
