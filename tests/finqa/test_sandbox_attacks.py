"""Hostile programs: whatever they try, this process, the helper and the next program go on as if nothing had been."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finqa.sandbox import ERROR_KINDS, Run, Sandbox, SandboxLimits, read_reply
from finqa.sandbox_filter import compiled_filter
from finqa.sandbox_helper import FROM_HELPER, FROM_PROGRAM, RESULT_FD

QUICK = SandboxLimits(cpu_s=0.3, wall_s=2.0)
HARMLESS = "ans = 6 * 7"

needs_filter = pytest.mark.skipif(not compiled_filter(RESULT_FD), reason="no seccomp on this system")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(QUICK, workers=1) as opened:
        yield opened


def helper_ids(sandbox: Sandbox) -> list[int]:
    return [helper._process.pid for helper in sandbox._helpers]


def attack(sandbox: Sandbox, code: str) -> Run:
    """The attack's own result, once the same helper has run the next program as if nothing had been."""
    before = helper_ids(sandbox)
    run, after = sandbox.run_many([code, HARMLESS])
    assert after == Run(42.0, None, "")
    assert helper_ids(sandbox) == before
    return run


STOPPED = {
    # files and folders
    "read a file": ("ans = open('/etc/passwd').read()", "runtime"),
    "read a file without Python's open": ("import os\nans = os.open('/etc/passwd', os.O_RDONLY)", "runtime"),
    "read the parent's environment": ("ans = open('/proc/self/environ').read()", "runtime"),
    "list a folder": ("import os\nans = len(os.listdir('/'))", "runtime"),
    "learn where it is": ("import os\nans = os.getcwd()", "runtime"),
    "make a folder": ("import os\nos.mkdir('here')\nans = 1", "forbidden"),
    "remove a file": ("import os\nos.unlink('/etc/hostname')\nans = 1", "forbidden"),
    "map memory to run": ("import ctypes\nctypes.CDLL(None).mmap(0, 4096, 7, 34, -1, 0)\nans = 1", "forbidden"),
    # processes and the network
    "fork": ("import os\nos.fork()\nans = 1", "forbidden"),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "forbidden"),
    "thread bomb": ("import _thread\nwhile True:\n    _thread.start_new_thread(input, ())", "forbidden"),
    "run a shell": ("import os\nos.execv('/bin/sh', ['sh'])", "forbidden"),
    "os.system": ("import os\nos.system('true')\nans = 1", "forbidden"),
    "kill the helper": ("import os\nos.kill(os.getppid(), 9)\nans = 1", "forbidden"),
    "kill the first process": ("import os\nos.kill(1, 9)\nans = 1", "forbidden"),
    "kill everything": ("import os\nos.kill(-1, 9)\nans = 1", "forbidden"),
    "trace another process": ("import ctypes\nctypes.CDLL(None).ptrace(16, 1, 0, 0)\nans = 1", "forbidden"),
    "open a socket": ("import ctypes\nctypes.CDLL(None).socket(2, 1, 0)\nans = 1", "forbidden"),
    "import sockets": ("import socket", "runtime"),
    "become another user": ("import os\nos.setuid(1)\nans = 1", "forbidden"),
    "a new namespace": ("import ctypes\nctypes.CDLL(None).unshare(0x10000000)\nans = 1", "forbidden"),
    # time
    "endless loop": ("while True:\n    pass", "cpu-time"),
    "endless loop that catches everything": (
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "cpu-time",
    ),
    "endless loop in C": ("ans = sum(iter(int, 1))", "cpu-time"),
    "one endless operation": ("ans = 10 ** 10 ** 9", "cpu-time"),
    "catastrophic regular expression": ("import re\nre.match('(a+)+b', 'a' * 40)\nans = 1", "cpu-time"),
    "ignore the limit's signal": ("import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\nans = 1", "forbidden"),
    "stop the limit's timer": ("import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nans = 1", "forbidden"),
    "raise the limit": ("import resource\nresource.setrlimit(0, (99, 99))\nans = 1", "forbidden"),
    "sleep": ("import time\ntime.sleep(60)\nans = 1", "forbidden"),
    "wait for ever": ("import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()", "wall-time"),
    # memory and recursion
    "a huge text": ("ans = 'x' * 10**10", "memory"),
    "a growing list": ("a = []\nwhile True:\n    a.append('x' * 10**6)", "memory"),
    "the memory stays full": (
        "a = []\ntry:\n    while True:\n        a.append(b'x' * 9_999)\nfinally:\n    b = a",
        "memory",
    ),
    "deep recursion": ("def f():\n    return f()\nf()", "runtime"),
    "recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n    def __getattr__(self, name):\n        return getattr(self, name + 'x')\nA().b",
        "crashed",
    ),
    "nested brackets": ("(" * 100_000, "syntax"),
    "nested operators": ("ans = " + "-" * 100_000 + "1", "memory"),
    "read address 0": ("import ctypes\nctypes.string_at(0)", "crashed"),
    # the end of the process
    "os._exit": ("import os\nans = 1\nos._exit(0)", "crashed"),
    "os.abort": ("import os\nos.abort()", "forbidden"),
    "close every descriptor": ("import os\nos.closerange(0, 100)\nwhile True:\n    pass", "forbidden"),
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
        'import os\nos.write(3, b\'{"error_kind": "crashed", "message": ""}\\n\')',
        "crashed",
    ),
    "an error that is no text": ('import os\nos.write(3, b\'{"error_kind": [], "message": 1}\\n\')', "crashed"),
    "a message of the helper": ("import os\nos.write(3, b'h\\0\\0\\0\\x10' + b'{\"answer\": 9}   \\n')", "crashed"),
    "write to every descriptor": (
        "import os\nfor fd in range(20):\n    try:\n        os.write(fd, b'forged')\n"
        "    except OSError:\n        pass\nans = 1",
        "crashed",
    ),
    # values and errors that bite
    "__float__ of its own": (
        "class F(float):\n    def __float__(self):\n        return 7.0\nans = F(3)",
        "bad-answer",
    ),
    "a text of its own": ("class S(str):\n    pass\nans = S('x')", "bad-answer"),
    "__class__ that lies": ("class F:\n    __class__ = float\nans = F()", "bad-answer"),
    "an error whose text ends the process": (
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit\nraise E",
        "runtime",
    ),
    "an error whose text never ends": (
        "class E(Exception):\n    def __str__(self):\n        while True:\n            pass\nraise E",
        "cpu-time",
    ),
    "the object graph": (
        "loader = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'BuiltinImporter'][0]\n"
        "ans = loader.load_module('posix').getpid()",
        "forbidden",
    ),
}


@needs_filter
@pytest.mark.parametrize(("code", "kind"), STOPPED.values(), ids=STOPPED.keys())
def test_the_attack_is_stopped(sandbox: Sandbox, code: str, kind: str):
    run = attack(sandbox, code)
    assert (run.answer, run.error_kind) == (None, kind)
    assert run.message
    assert run.message.isprintable()


HARMS_ITSELF_ALONE = {
    "a gigabyte of print": "for _ in range(1000):\n    print('x' * 10**6)\nans = 1",
    "override the builtins": "import builtins\nfor name in dir(builtins):\n    setattr(builtins, name, None)",
    "override json and os": "import json, os\njson.dumps = json.loads = os.write = lambda *_: 1 / 0\nans = 1",
    "empty sys.modules": "import sys\nsys.modules.clear()\nans = 1",
    "rewrite the helper's frames": (
        "import sys\nframe = sys._getframe()\nwhile frame := frame.f_back:\n"
        "    for name in list(frame.f_globals):\n        frame.f_globals[name] = None\nans = 1"
    ),
    "trace the helper": "import sys\nsys.settrace(lambda *_: 1 / 0)\nans = 1",
    "empty every dict there is": (
        "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, dict):\n        thing.clear()\nans = 1"
    ),
    "an import hook": "import sys\nsys.meta_path.insert(0, None)\nsys.path_hooks.append(exit)\nans = 1",
    "atexit": "import atexit\natexit.register(lambda: 1 / 0)\nans = 1",
    "__del__ that never ends": "class A:\n    def __del__(self):\n        while 1:\n            pass\na = A()\nans = 1",
    "a result ahead of time": "import os\nos.write(3, b'{\"answer\": 9}\\n')\nwhile True:\n    pass",
}


@pytest.mark.parametrize("code", HARMS_ITSELF_ALONE.values(), ids=HARMS_ITSELF_ALONE.keys())
def test_the_attack_harms_itself_alone(sandbox: Sandbox, code: str):
    attack(sandbox, code)


def test_no_file_is_written(sandbox: Sandbox, tmp_path: Path):
    target = tmp_path / "written"
    for code in (f"open({str(target)!r}, 'w').write('x')", f"import os\nos.mkdir({str(target)!r})"):
        attack(sandbox, code)
    assert not list(tmp_path.iterdir())


def test_the_environment_is_empty(sandbox: Sandbox):
    assert sandbox.run("import os\nans = len(os.environ)").answer == 0.0


@needs_filter
def test_no_descriptor_is_open_but_the_pipe(tmp_path: Path):
    inherited = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    count_the_closed = (
        "import os\nans = 0\nfor fd in range(256):\n    if fd != 3:\n"
        "        try:\n            os.close(fd)\n        except OSError:\n            ans += 1"
    )
    try:
        with Sandbox(QUICK, workers=1) as opened:
            assert opened.run(count_the_closed).answer == 255.0
    finally:
        os.close(inherited)


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
