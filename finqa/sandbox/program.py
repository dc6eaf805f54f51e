"""What a program's process does: run the program, and put its result in a line of JSON."""

from __future__ import annotations

import decimal
import fractions
import io
import json
import math
import os
import sys
import types

LONGEST_REPLY = 65_536
"""Bytes that a program's process may send back."""
LONGEST_TEXT = 4_000
"""Characters of an answer that is a string; JSON makes at most twelve bytes of one."""
LONGEST_MESSAGE = 500
RESULT_FD = 3
"""The only descriptor that a program's process has: the writing end of its own pipe."""
PROGRAM_FILE = "<program>"
_NUMBERS = (int, float, decimal.Decimal, fractions.Fraction)
_NOTHING = object()
_OUT_OF_MEMORY = b'{"error_kind": "memory", "message": "MemoryError: the program needs too much memory"}\n'


class Discard(io.TextIOBase):
    """Where print goes."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)


def keep_only(writing: int) -> None:
    """Close every descriptor but `writing`, which becomes RESULT_FD."""
    os.dup2(writing, RESULT_FD)
    os.closerange(0, RESULT_FD)
    os.closerange(RESULT_FD + 1, writing + 1)


def outcome(code: bytes) -> bytes:
    """Run the program and put its result in a line of JSON: {"answer"} or {"error_kind", "message"}."""
    try:
        return compute(code)
    except MemoryError:
        return _OUT_OF_MEMORY


def compute(code: bytes) -> bytes:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [PROGRAM_FILE]
    sys.stdin, sys.stdout, sys.stderr = None, Discard(), Discard()
    try:
        program = compile(code.decode("utf-8", "surrogatepass"), PROGRAM_FILE, "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f" (line {error.lineno})" if error.lineno else ""
        newer = "; Python 3.12 allows more inside an f-string" if "f-string" in error.msg else ""
        newer = newer if sys.version_info < (3, 12) else ""
        return failure("syntax", f"{type(error).__name__}: {error.msg}{where}{newer}")
    except (ValueError, OverflowError, RecursionError) as error:
        return failure("syntax", describe(error, None))
    variables = module.__dict__
    try:
        exec(program, variables)
    except MemoryError:
        variables.clear()
        raise
    except BaseException as error:  # noqa: BLE001  whatever it raises is the program's result
        if not is_success(error):
            return failure("runtime", describe(error, line_of(sys.exc_info()[2])))
    try:
        answer = variables.get("ans", _NOTHING)
    except BaseException as error:  # noqa: BLE001  a key of the program's own may compare as it likes
        return failure("runtime", describe(error, line_of(sys.exc_info()[2])))
    if answer is _NOTHING:
        return failure("no-answer", "the program does not set ans")
    return answer_line(answer)


def is_success(error: BaseException) -> bool:
    """Whether a program ended itself with exit code 0, as `sys.exit()` does: what it set before counts."""
    return type(error) is SystemExit and (error.code is None or (type(error.code) in (int, bool) and error.code == 0))


def answer_line(answer: object) -> bytes:
    """The answer's line. Only exact types count, compared by identity: a class may redefine everything else."""
    if type(answer) is str:
        if len(answer) > LONGEST_TEXT:
            return failure("bad-answer", f"ans is a text of {len(answer):,} characters")
    elif any(type(answer) is kind for kind in _NUMBERS):
        try:
            number = float(answer)  # pyright: ignore[reportArgumentType]
        except MemoryError:
            raise
        except BaseException:  # noqa: BLE001  above 1.8e308; a signalling NaN; a Fraction that was tampered with
            number = math.nan
        if not math.isfinite(number):
            return failure("bad-answer", "ans is not a finite number")
        return b'{"answer": %s}\n' % float.__repr__(number).encode()
    elif type(answer) is not bool:
        return failure("bad-answer", f"ans is of type {class_name(type(answer))}")
    return b'{"answer": %s}\n' % json.dumps(answer).encode()


def describe(error: BaseException, line: int | None) -> str:
    """Name, text and line of an error. Class and text may be the program's own: what they raise leaves the text out."""
    try:
        text = str.__getitem__(str(error), slice(LONGEST_MESSAGE))  # never a str of the program's own class
    except BaseException:  # noqa: BLE001
        text = ""
    where = f" (line {line})" if line else ""
    return f"{class_name(type(error))}{': ' if text else ''}{text}{where}"


def class_name(kind: type) -> str:
    """A class's name, asked of `type` itself: a metaclass may have a __name__ of its own."""
    return type.__dict__["__name__"].__get__(kind)[:LONGEST_MESSAGE]


def line_of(trace: types.TracebackType | None) -> int | None:
    """The last line of the program's own that an error passed through."""
    line = None
    while trace:
        if trace.tb_frame.f_code.co_filename == PROGRAM_FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def failure(error_kind: str, message: str) -> bytes:
    return json.dumps({"error_kind": error_kind, "message": message}).encode() + b"\n"
