"""Hostile programs against Python's part: forged results, values and errors that bite, tricks with the interpreter."""

from __future__ import annotations

import pytest
from attacking import HARMLESS, assert_stopped, attack, needs_filter, sandbox

from finqa.sandbox.helper import FROM_HELPER, FROM_PROGRAM
from finqa.sandbox.results import ERROR_KINDS, Run, read_reply
from finqa.sandbox.running import Sandbox

__all__ = ["sandbox"]

HOSTILE_METACLASS = (
    "class M(type):\n    @property\n    def __name__(self):\n        raise SystemExit\n"
    "    def __eq__(self, other):\n        return True\n    __hash__ = None\n"
)

STOPPED = {
    # the end of the process
    "os._exit": ("import os\nans = 1\nos._exit(0)", "crashed"),
    "os.abort": ("import os\nos.abort()", "forbidden crashed"),
    "sys.exit": ("import sys\nans = 1\nsys.exit(1)", "runtime"),
    "SystemExit": ("ans = 1\nraise SystemExit(1)", "runtime"),
    "an exit code that imitates 0": (
        "class Z(int):\n    def __eq__(self, other):\n        return True\nans = 1\nraise SystemExit(Z(3))",
        "runtime",
    ),
    "KeyboardInterrupt": ("ans = 1\nraise KeyboardInterrupt", "runtime"),
    "BaseException": ("ans = 1\nraise BaseException", "runtime"),
    "a group of errors": ("ans = 1\nraise BaseExceptionGroup('x', [KeyboardInterrupt()])", "runtime"),
    "close every descriptor": ("import os\nos.closerange(0, 100)\nwhile True:\n    pass", "forbidden cpu-time"),
    "close the pipe and go on": ("import os\nos.close(3)\nwhile True:\n    pass", "cpu-time"),
    # the pipe of the result
    "flood the pipe": ("import os\nwhile True:\n    os.write(3, b'x' * 10_000)", "crashed"),
    "two results": ('import os\nos.write(3, b\'{"answer": 1}\\n{"answer": 2}\\n\')\nans = 3', "crashed"),
    "half a result": ("import os\nos.write(3, b'{\"answer\": 1')\nos._exit(0)", "crashed"),
    "infinity as JSON": ("import os\nos.write(3, b'{\"answer\": 1e999}\\n')", "crashed"),
    "NaN as JSON": ("import os\nos.write(3, b'{\"answer\": NaN}\\n')", "crashed"),
    "nested JSON": ("import os\nos.write(3, b'[' * 60_000 + b'\\n')", "crashed"),
    "a long number as JSON": ("import os\nos.write(3, b'{\"answer\": ' + b'9' * 60_000 + b'}\\n')", "crashed"),
    "an error only the helper reports": (
        'import os\nos.write(3, b\'{"error_kind": "cpu-time", "message": ""}\\n\')',
        "crashed",
    ),
    "an error that is no text": ('import os\nos.write(3, b\'{"error_kind": [], "message": 1}\\n\')', "crashed"),
    "a message of the helper": ("import os\nos.write(3, b'h\\0\\0\\0\\x10' + b'{\"answer\": 9}   \\n')", "crashed"),
    "write to every descriptor": (
        "import os\nfor fd in range(20):\n    try:\n        os.write(fd, b'forged')\n"
        "    except OSError:\n        pass\nans = 1",
        "crashed",
    ),
    # values that bite
    "__float__ of its own": (
        "class F(float):\n    def __float__(self):\n        return 7.0\nans = F(3)",
        "bad-answer",
    ),
    "__float__ that raises": ("class F:\n    def __float__(self):\n        raise SystemExit\nans = F()", "bad-answer"),
    "__str__ that ends the process": (
        "import os\nclass F:\n    def __str__(self):\n        os._exit(0)\n    __repr__ = __str__\nans = F()",
        "bad-answer",
    ),
    "__eq__ and __hash__ that never end": (
        "class F:\n    def __eq__(self, other):\n        while True:\n            pass\n"
        "    __hash__ = __bool__ = __eq__\nans = F()",
        "bad-answer",
    ),
    "a text of its own": ("class S(str):\n    pass\nans = S('x')", "bad-answer"),
    "an int of its own": ("class N(int):\n    pass\nans = N(1)", "bad-answer"),
    "__class__ that lies": ("class F:\n    __class__ = float\nans = F()", "bad-answer"),
    "__class__ that raises": ("class F:\n    __class__ = property(lambda self: 1 / 0)\nans = F()", "bad-answer"),
    "a class equal to every class": (
        HOSTILE_METACLASS + "class A(metaclass=M):\n    __float__ = int\nans = A()",
        "bad-answer",
    ),
    "a class as the answer": (HOSTILE_METACLASS + "class ans(metaclass=M):\n    pass", "bad-answer"),
    "a class with a name of ten million letters": ("ans = type('x' * 10**7, (), {})()", "bad-answer"),
    "a Fraction that was tampered with": (
        "from fractions import Fraction\nclass E:\n    def __int__(self):\n        raise SystemExit\n"
        "ans = Fraction(1, 2)\nans._numerator = E()",
        "bad-answer",
    ),
    "a list that holds itself": ("ans = []\nans.append(ans)", "bad-answer"),
    "an int of a hundred million digits": ("ans = 1 << 330_000_000", "bad-answer"),
    "a text of ten million letters": ("ans = 'x' * 10**7", "bad-answer"),
    "a name that compares as it likes": (
        "class K(str):\n    def __hash__(self):\n        return hash('ans')\n"
        "    def __eq__(self, other):\n        raise SystemExit\nglobals()[K('x')] = 1",
        "runtime",
    ),
    # errors that bite
    "an error whose text ends the process": (
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit\nraise E",
        "runtime",
    ),
    "an error whose text never ends": (
        "class E(Exception):\n    def __str__(self):\n        while True:\n            pass\nraise E",
        "cpu-time",
    ),
    "an error whose text is its own kind of text": (
        "class S(str):\n    def __getitem__(self, key):\n        raise SystemExit\n    __format__ = None\n"
        "class E(Exception):\n    def __str__(self):\n        return S('x')\nraise E",
        "runtime",
    ),
    "an error whose class has no name": (
        HOSTILE_METACLASS + "class E(Exception, metaclass=M):\n    pass\nraise E",
        "runtime",
    ),
    "an error that hides its trace": (
        "class E(Exception):\n    __traceback__ = __class__ = property(lambda self: 1 / 0)\nraise E",
        "runtime",
    ),
    "a text of an error of a hundred million letters": ("raise ValueError('x' * 10**7)", "runtime"),
    # the way to modules
    "the object graph": (
        "loader = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'BuiltinImporter'][0]\n"
        "ans = loader.load_module('posix').getpid()",
        "forbidden",
    ),
    "the globals of a library's function": (
        "import statistics\nsys = statistics.mean.__globals__['__builtins__']['__import__']('sys')\n"
        "sys.modules['os'].fork()\nans = 1",
        "forbidden",
    ),
    "the helper's frames": (
        "import sys\nframe = sys._getframe()\nwhile 'run_program' not in frame.f_globals:\n    frame = frame.f_back\n"
        "frame.f_globals['os'].kill(1, 9)\nans = 1",
        "forbidden",
    ),
    "a module from elsewhere": ("import sys\nsys.path.append('/usr/lib/python3')\nimport this_is_not_there", "runtime"),
}


@needs_filter
@pytest.mark.parametrize(("code", "kinds"), STOPPED.values(), ids=STOPPED.keys())
def test_the_attack_is_stopped(sandbox: Sandbox, code: str, kinds: str):
    assert_stopped(attack(sandbox, code), kinds)


HARMS_ITSELF_ALONE = {
    "a gigabyte of print": "for _ in range(1000):\n    print('x' * 10**6)\nans = 1",
    "print that imitates a result": "print('{\"answer\": 9}', flush=True)\nans = 1",
    "stderr that imitates a result": "import sys\nsys.stderr.write('{\"answer\": 9}\\n')\nans = 1",
    "the stdout behind stdout": "import sys\nsys.__stdout__.buffer.write(b'p\\0\\0\\0\\x0e{\"answer\": 9}')\nans = 1",
    "override the builtins": "import builtins\nfor name in dir(builtins):\n    setattr(builtins, name, None)",
    "override json and os": "import json, os\njson.dumps = json.loads = os.write = lambda *_: 1 / 0\nans = 1",
    "override __import__": "import builtins\nbuiltins.__import__ = lambda *_: 1 / 0\nans = 1",
    "empty sys.modules": "import sys\nsys.modules.clear()\nans = 1",
    "change a class of the library": "import fractions\nfractions.Fraction.__float__ = lambda self: 9\nans = 1",
    "rewrite the helper's frames": (
        "import sys\nframe = sys._getframe()\nwhile frame := frame.f_back:\n"
        "    for name in list(frame.f_globals):\n        frame.f_globals[name] = None\nans = 1"
    ),
    "trace the helper": "import sys\nsys.settrace(lambda *_: 1 / 0)\nans = 1",
    "an audit hook": "import sys\nsys.addaudithook(lambda *_: 1 / 0)\nans = 1",
    "empty every dict there is": (
        "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, dict):\n        thing.clear()\nans = 1"
    ),
    "an import hook": "import sys\nsys.meta_path.insert(0, None)\nsys.path_hooks.append(exit)\nans = 1",
    "atexit": "import atexit\natexit.register(lambda: 1 / 0)\nans = 1",
    "__del__ that never ends": "class A:\n    def __del__(self):\n        while 1:\n            pass\na = A()\nans = 1",
    "__del__ that ends the process": "import os\nclass A:\n    def __del__(self):\n        os._exit(0)\nA()\nans = 1",
    "a result ahead of time": "import os\nos.write(3, b'{\"answer\": 9}\\n')\nwhile True:\n    pass",
}


@pytest.mark.parametrize("code", HARMS_ITSELF_ALONE.values(), ids=HARMS_ITSELF_ALONE.keys())
def test_the_attack_harms_itself_alone(sandbox: Sandbox, code: str):
    attack(sandbox, code)


@pytest.mark.parametrize("name", [name for name in HARMS_ITSELF_ALONE if "imitates" in name])
def test_what_is_printed_is_no_result(sandbox: Sandbox, name: str):
    assert attack(sandbox, HARMS_ITSELF_ALONE[name]) == Run(1.0, None, "")


def test_a_runtime_error_starts_with_its_name(sandbox: Sandbox):
    codes = ("1 / 0", "x", "raise SystemExit(1)", "class Mine(Exception): pass\nraise Mine('a')", "import numpy")
    names = [run.message.partition(":")[0].partition(" ")[0] for run in sandbox.run_many(codes)]
    assert names == ["ZeroDivisionError", "NameError", "SystemExit", "Mine", "ModuleNotFoundError"]


def test_a_text_with_terminal_codes_is_one_printable_line(sandbox: Sandbox):
    message = attack(sandbox, r"raise ValueError('a\nb\x1b[31m\ud800' + 'x' * 10_000)").message
    assert message.startswith("ValueError: a b?[31m?xxx")
    assert message.isprintable()
    assert len(message) < 600


def test_an_answer_can_be_written_to_a_file(sandbox: Sandbox):
    assert sandbox.run(r"ans = 'x\ud800'").answer == "x?"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"3\n",
        b"{}\n",
        b"{\n",
        b"\xff\n",
        b'{"error_kind": "syntax"}\n',
        b'{"answer": null}\n',
        b'{"answer": {}}\n',
    ],
)
def test_a_reply_that_makes_no_sense_is_an_error_of_its_program(content: bytes):
    assert read_reply(FROM_PROGRAM, content).error_kind == "crashed"


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_the_helper_may_report_every_kind(kind: str):
    content = f'{{"error_kind": "{kind}", "message": "m"}}'.encode()
    assert read_reply(FROM_HELPER, content) == Run(None, kind, "m")


def test_all_attacks_in_one_call_leave_every_other_program_its_answer(sandbox: Sandbox):
    attacks = [code for code, _ in STOPPED.values()] + list(HARMS_ITSELF_ALONE.values())
    with Sandbox(sandbox.limits, workers=3) as opened:
        runs = opened.run_many([code for hostile in attacks for code in (hostile, HARMLESS)])
    assert runs[1::2] == [Run(42.0, None, "")] * len(attacks)
