"""Programs give their answers or say what is wrong with them, in order, whatever happens to the helper processes."""

from __future__ import annotations

import csv
import math
import os
import sys
import threading
from pathlib import Path

import pytest

from finqa.sandbox.results import ERROR_KINDS, Run
from finqa.sandbox.running import LONGEST_PROGRAM, Sandbox, SandboxLimits

QUICK = SandboxLimits(cpu_s=0.3, wall_s=2.0)
HARMLESS = "ans = 6 * 7"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(QUICK, workers=1) as opened:
        yield opened


# Ordinary programs

ORDINARY = {
    "division": ("a = 3\nb = 4\nans = (b - a) / a", 1 / 3),
    "an int becomes a float": ("ans = 2", 2.0),
    "negative": ("ans = -5.9", -5.9),
    "every digit of a float comes through": ("ans = 0.1 + 0.2", 0.1 + 0.2),
    "a tiny float": ("ans = 5e-324", 5e-324),
    "bool": ("ans = 3 > 2", True),
    "text": ("ans = 'yes' if 1 > 2 else 'no'", "no"),
    "text beyond ASCII": ("ans = 'é € \\n \"'", 'é € \n "'),
    "Decimal": ("from decimal import Decimal\nans = Decimal('1.5') * 2", 3.0),
    "Fraction": ("from fractions import Fraction\nans = Fraction(3, 4)", 0.75),
    "statistics": ("import statistics\nans = statistics.mean([1, 2, 6])", 3.0),
    "math": ("import math\nans = math.sqrt(16)", 4.0),
    "re": ("import re\nans = float(re.sub('[^0-9.]', '', '$ 1,234.5'))", 1234.5),
    "dates": ("from datetime import datetime\nans = datetime.strptime('2009-03-01', '%Y-%m-%d').year", 2009.0),
    "functions see the globals": ("rate = 2\ndef f(x):\n    return x * rate\nans = f(4)", 8.0),
    "comprehensions see the globals": ("base = 10\nans = sum([x * base for x in [1, 2]])", 30.0),
    "global statement": ("def f():\n    global ans\n    ans = 7\nf()", 7.0),
    "classes": ("class Row:\n    def __init__(self, v):\n        self.v = v\nans = Row(5).v", 5.0),
    "dataclasses": ("import dataclasses\n@dataclasses.dataclass\nclass Row:\n    v: int\nans = Row(5).v", 5.0),
    "__name__ is __main__": ("if __name__ == '__main__':\n    ans = 1", 1.0),
    "print goes nowhere": ("import sys\nprint('x')\nprint('y', file=sys.stderr, flush=True)\nans = 1", 1.0),
    "warnings go nowhere": ("import warnings\nwarnings.warn('x')\nans = 1", 1.0),
    "an error that is caught": ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    ans = 0", 0.0),
    "an import that is missing and caught": ("try:\n    import numpy\nexcept ImportError:\n    ans = 2", 2.0),
    "CRLF": ("a = 1\r\nans = a\r\n", 1.0),
    "a coding line changes nothing": ("# -*- coding: no-such-coding -*-\nans = 'é'", "é"),
    "names beyond ASCII": ("coût = 5\nΔ = 2\n收入 = 3\nans = coût + Δ + 收入", 10.0),
    "a name in two spellings": ("\ufb01nal = 5\nans = final", 5.0),
    "a character by its name": ('ans = "\\N{EURO SIGN}"', "€"),
    "unicodedata": ("import unicodedata\nans = unicodedata.numeric('½')", 0.5),
    "sys.exit(0)": ("import sys\nans = 5\nsys.exit(0)", 5.0),
    "sys.exit()": ("import sys\nans = 5\nif ans:\n    sys.exit()\nans = 6", 5.0),
    "exit()": ("ans = 5\nexit()", 5.0),
    "quit in a function": ("def main():\n    global ans\n    ans = 5\n    quit()\nmain()", 5.0),
    "SystemExit": ("ans = 1\nraise SystemExit", 1.0),
    "annotations are not those of the helper": ("def f(x: int): pass\nans = f.__annotations__['x'] is int", True),
}


@pytest.mark.parametrize(("code", "answer"), ORDINARY.values(), ids=ORDINARY.keys())
def test_an_ordinary_program_gives_its_answer(sandbox: Sandbox, code: str, answer: float | str | bool):
    run = sandbox.run(code)
    assert run == Run(answer, None, "")
    assert type(run.answer) is type(answer)


FAILING = {
    "unclosed bracket": ("x = (", "syntax", "SyntaxError: '(' was never closed (line 1)"),
    "indentation": ("a = 1\n  b = 2", "syntax", "IndentationError: unexpected indent (line 2)"),
    "a null byte": ("ans = 1\0", "syntax", None),
    "a lone surrogate": ("ans = '\ud800'", "syntax", None),
    "division by zero": ("a = 1\nans = a / 0", "runtime", "ZeroDivisionError: division by zero (line 2)"),
    "the line is the program's own, not a library's": (
        "import statistics\n\nstatistics.mean([])",
        "runtime",
        "StatisticsError: mean requires at least one data point (line 3)",
    ),
    "unknown name": ("ans = x", "runtime", "NameError: name 'x' is not defined (line 1)"),
    "no numpy": ("import numpy", "runtime", "ModuleNotFoundError: No module named 'numpy' (line 1)"),
    "no text of an error": ("raise KeyboardInterrupt", "runtime", "KeyboardInterrupt (line 1)"),
    "an exit code": ("ans = 1\nraise SystemExit(2)", "runtime", "SystemExit: 2 (line 2)"),
    "an exit with a message": ("ans = 1\nexit('no data')", "runtime", "SystemExit: no data (line 2)"),
    "an exit before ans": ("import sys\nsys.exit(0)\nans = 1", "no-answer", "the program does not set ans"),
    "input": ("ans = input()", "runtime", None),
    "no ans": ("answer = 3", "no-answer", "the program does not set ans"),
    "an empty program": ("", "no-answer", None),
    "None": ("ans = None", "bad-answer", "ans is of type NoneType"),
    "list": ("ans = [1]", "bad-answer", "ans is of type list"),
    "complex": ("ans = 1j", "bad-answer", "ans is of type complex"),
    "long text": ("ans = 'x' * 5000", "bad-answer", "ans is a text of 5,000 characters"),
    "NaN": ("ans = float('nan')", "bad-answer", None),
    "infinity": ("ans = 1e999", "bad-answer", None),
    "an int above every float": ("ans = 10**400", "bad-answer", None),
    "a Decimal above every float": ("from decimal import Decimal\nans = Decimal('1e999')", "bad-answer", None),
    "a signalling NaN": ("from decimal import Decimal\nans = Decimal('sNaN')", "bad-answer", None),
}


@pytest.mark.parametrize(("code", "kind", "message"), FAILING.values(), ids=FAILING.keys())
def test_a_failing_program_says_why(sandbox: Sandbox, code: str, kind: str, message: str | None):
    run = sandbox.run(code)
    assert (run.answer, run.error_kind) == (None, kind)
    assert run.message if message is None else run.message == message


def test_an_f_string_that_only_python_3_12_reads_says_so(sandbox: Sandbox):
    run = sandbox.run("d = {'a': '7'}\nans = f\"{d[\"a\"]}\"")
    if sys.version_info >= (3, 12):
        assert run.answer == "7"
    else:
        assert run.error_kind == "syntax" and "(line 2); Python 3.12 allows more inside an f-string" in run.message


def test_the_kinds_of_error_are_these_and_no_other():
    expected = "syntax runtime no-answer bad-answer cpu-time wall-time memory forbidden crashed"
    assert " ".join(ERROR_KINDS) == expected


def test_the_same_program_gives_the_same_answer_in_every_helper(sandbox: Sandbox):
    code = "import random\nans = str({'a', 'b', 'c', 'd', 'e'}) + str(random.random())"
    with Sandbox(QUICK, workers=1) as another:
        assert sandbox.run(code) == sandbox.run(code) == another.run(code)


def test_a_program_sees_nothing_of_the_one_before(sandbox: Sandbox):
    assert (
        sandbox.run_many(["import math\nmath.pi = 3\nx = ans = 1", "import math\nans = math.pi"])[1].answer == math.pi
    )
    assert sandbox.run("ans = x").error_kind == "runtime"


# Many programs


def test_results_come_in_order(sandbox: Sandbox):
    codes = [f"x = sum(range({20_000 if n % 7 == 0 else 1}))\nans = {n}" for n in range(60)]
    with Sandbox(QUICK, workers=3) as opened:
        assert [run.answer for run in opened.run_many(codes)] == [float(n) for n in range(60)]


def test_no_program_is_no_work(sandbox: Sandbox):
    assert sandbox.run_many([]) == []


def test_progress_counts_to_the_end(sandbox: Sandbox):
    seen = []
    sandbox.run_many([HARMLESS] * 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_interrupted_call_leaves_a_usable_sandbox(sandbox: Sandbox):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with Sandbox(QUICK, workers=2) as opened:
        with pytest.raises(KeyboardInterrupt):
            opened.run_many(["ans = 1", "while True: pass", "ans = 3"], progress=interrupt)
        assert [run.answer for run in opened.run_many([f"ans = {n}" for n in range(4)])] == [0.0, 1.0, 2.0, 3.0]


def test_threads_share_a_sandbox(sandbox: Sandbox):
    answers = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: sandbox.run(f"ans = {n}").answer})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: float(n) for n in range(8)}


def test_a_program_that_is_too_long_is_not_run(sandbox: Sandbox):
    runs = sandbox.run_many(["#" * (LONGEST_PROGRAM + 1), HARMLESS])
    assert [run.error_kind for run in runs] == ["memory", None]


def test_a_long_program_runs(sandbox: Sandbox):
    assert sandbox.run("# " + "x" * 900_000 + "\nans = 1").answer == 1.0


def test_the_recorded_teacher_programs_give_their_recorded_answers():
    """FINQA_ROWS names a folder with teacher_code.csv (columns generated_code, actual_answer)."""
    path = Path(os.environ.get("FINQA_ROWS", "")) / "teacher_code.csv"
    if not os.environ.get("FINQA_ROWS") or not path.exists():
        pytest.skip("set FINQA_ROWS to a folder with teacher_code.csv")
    csv.field_size_limit(10**9)
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    with Sandbox() as opened:
        runs = opened.run_many([row["generated_code"] for row in rows])
    wrong = [
        (number, row["actual_answer"], run)
        for number, (row, run) in enumerate(zip(rows, runs, strict=True))
        if not (
            float(row["actual_answer"]) == run.answer
            if type(run.answer) is float
            else row["actual_answer"] == str(run.answer)
        )
    ]
    assert rows
    assert not wrong
