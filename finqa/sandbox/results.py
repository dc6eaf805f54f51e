"""What came of a program, read from what its process sent: untrusted bytes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from finqa.sandbox.helper import FROM_PROGRAM

ERROR_KINDS = (
    "syntax",  # the program does not compile
    "runtime",  # it raised: the message has the exception's name, its text and the line, in this order
    "no-answer",  # it ended without setting ans
    "bad-answer",  # ans is neither a number, a bool nor a short text, or it is NaN, infinite or too large for a float
    "cpu-time",  # it used up its CPU time
    "wall-time",  # it was not done in a time far above the CPU limit (it waits for something)
    "memory",  # it needs more memory than allowed
    "forbidden",  # it made a system call that the filter does not let through
    "crashed",  # a signal, an end without a result, garbage in the pipe, or the helper died under it, twice
)
_KINDS_OF_A_PROGRAM = ("syntax", "runtime", "no-answer", "bad-answer", "memory")


@dataclass(frozen=True)
class Run:
    """What became of a program."""

    answer: float | str | bool | None
    """The value of `ans`: every kind of number as a float; None on an error."""
    error_kind: str | None
    """One of ERROR_KINDS; None when the program gave an answer."""
    message: str
    """One line about the error; empty without one."""


def read_reply(tag: bytes, content: bytes) -> Run:
    """The result in a helper's message, of which only what the helper itself wrote can be relied on."""
    try:
        record = json.loads(content.decode("ascii"))
        if not isinstance(record, dict):
            raise ValueError("no record")
        if "answer" not in record:
            kind, message = record["error_kind"], record["message"]
            if kind not in (_KINDS_OF_A_PROGRAM if tag == FROM_PROGRAM else ERROR_KINDS):
                raise ValueError("not an error that a program's process reports")
            return Run(None, kind, _one_line(message))
        answer = record["answer"]
        if isinstance(answer, str):
            return Run(answer.encode("utf-8", "replace").decode(), None, "")
        if isinstance(answer, bool):
            return Run(answer, None, "")
        if not math.isfinite(number := float(answer)):
            raise ValueError("not finite")
        return Run(number, None, "")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return Run(None, "crashed", "the program wrote to the pipe that carries its result")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
