"""Hostile programs against the kernel's part: whatever they try, the helper and the next program go on unharmed.

The answers, messages and Python tricks of hostile programs are in test_sandbox_hostile_results.py. Both suites are
run as an ordinary user, too, by test_sandbox_ordinary_user.py.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
from attacking import QUICK, assert_stopped, attack, helper_ids, libc, needs_filter, sandbox

from finqa.runtime.paths import REPOSITORY
from finqa.sandbox.running import Sandbox

__all__ = ["sandbox"]

STOPPED = {
    # files and folders
    "read a file": ("ans = open('/etc/passwd').read()", "runtime"),
    "read a file without Python's open": ("import os\nans = os.open('/etc/passwd', os.O_RDONLY)", "runtime"),
    "read a file through the C library": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.fopen.restype = ctypes.c_void_p\n"
        "if not libc.fopen(b'/etc/passwd', b'r'):\n    raise PermissionError",
        "runtime",
    ),
    "open a file by a newer call": (libc("syscall(437, -100, b'/etc/passwd', 0, 0)"), "forbidden"),
    "read its own environment": ("ans = open('/proc/self/environ').read()", "runtime"),
    "read the first process's environment": ("ans = open('/proc/1/environ').read()", "runtime"),
    "read its own memory": ("ans = open('/proc/self/mem', 'rb').read(1)", "runtime"),
    "list a folder": ("import os\nans = len(os.listdir('/'))", "runtime"),
    "learn where it is": ("import os\nans = os.getcwd()", "runtime"),
    "go elsewhere": ("import os\nos.chdir('/')\nans = 1", "forbidden"),
    "make a folder": ("import os\nos.mkdir('here')\nans = 1", "forbidden"),
    "remove a file": ("import os\nos.unlink('/etc/hostname')\nans = 1", "forbidden"),
    "make a link": ("import os\nos.symlink('/etc/passwd', 'here')\nans = 1", "forbidden"),
    "make a device": ("import os\nos.mknod('here', 0o600)\nans = 1", "forbidden"),
    "mount a folder": (libc("mount(b'/', b'/', None, 4096, None)"), "forbidden"),
    "a file in memory": ("import os\nos.memfd_create('x')\nans = 1", "forbidden"),
    "a pipe of its own": ("import os\nos.pipe()\nans = 1", "forbidden"),
    "a second descriptor of the pipe": ("import os\nos.dup2(3, 0)\nans = 1", "forbidden"),
    "map memory to run": (libc("mmap(0, 4096, 7, 34, -1, 0)"), "forbidden"),
    # processes and signals
    "fork": ("import os\nos.fork()\nans = 1", "forbidden"),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "forbidden"),
    "fork that catches everything": ("import os\ntry:\n    os.fork()\nexcept BaseException:\n    ans = 1", "forbidden"),
    "vfork": (libc("vfork()"), "forbidden"),
    "fork by the number of another architecture": (libc("syscall(0x40000000 + 57)"), "forbidden"),
    "thread bomb": ("import _thread\nwhile True:\n    _thread.start_new_thread(input, ())", "forbidden"),
    "run a shell": ("import os\nos.execv('/bin/sh', ['sh'])", "forbidden"),
    "start a shell": ("import os\nos.posix_spawn('/bin/sh', ['sh'], {})\nans = 1", "forbidden"),
    "os.system": ("import os\nos.system('true')\nans = 1", "forbidden"),
    "os.popen": ("import os\nans = os.popen('id').read()", "runtime"),
    "import subprocess": ("import subprocess\nans = 1", "runtime"),
    "kill the helper": ("import os\nos.kill(os.getppid(), 9)\nans = 1", "forbidden"),
    "stop the helper": (libc("kill(1, 19)"), "forbidden"),
    "kill the first process": ("import os\nos.kill(1, 9)\nans = 1", "forbidden"),
    "kill everything": ("import os\nos.kill(-1, 9)\nans = 1", "forbidden"),
    "kill its process group": ("import os\nos.killpg(0, 9)\nans = 1", "forbidden"),
    "trace another process": (libc("ptrace(16, 1, 0, 0)"), "forbidden"),
    "read another process's memory": (libc("process_vm_readv(1, 0, 0, 0, 0, 0)"), "forbidden"),
    "become another user": ("import os\nos.setuid(1)\nans = 1", "forbidden"),
    "a new namespace": (libc("unshare(0x10000000)"), "forbidden"),
    "load code into the kernel": (libc("syscall(321, 0, 0, 0)"), "forbidden"),
    "calls by a ring": (libc("syscall(425, 1, 0)"), "forbidden"),
    # the network
    "a TCP socket": (libc("socket(2, 1, 0)"), "forbidden"),
    "a UDP socket": (libc("socket(2, 2, 0)"), "forbidden"),
    "a Unix socket": (libc("socket(1, 1, 0)"), "forbidden"),
    "a pair of sockets": (libc("socketpair(1, 1, 0, (ctypes.c_int * 2)())"), "forbidden"),
    "import sockets": ("import socket", "runtime"),
    # time
    "endless loop": ("while True:\n    pass", "cpu-time"),
    "endless loop that catches everything": (
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "cpu-time",
    ),
    "endless loop in C": ("ans = sum(iter(int, 1))", "cpu-time"),
    "endless import": (
        "import sys\nclass F:\n    def find_spec(self, *_):\n        while True:\n            pass\n"
        "sys.meta_path.insert(0, F())\nimport nothing",
        "cpu-time",
    ),
    "one endless operation": ("ans = 10 ** 10 ** 9", "cpu-time"),
    "a factorial": ("import math\nans = math.factorial(10 ** 7)", "cpu-time"),
    "catastrophic regular expression": ("import re\nre.match('(a+)+b', 'a' * 40)\nans = 1", "cpu-time"),
    "ignore the limit's signal": ("import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\nans = 1", "forbidden"),
    "stop the limit's timer": ("import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nans = 1", "forbidden"),
    "raise the limit": ("import resource\nresource.setrlimit(0, (99, 99))\nans = 1", "forbidden"),
    "sleep": ("import time\ntime.sleep(60)\nans = 1", "forbidden"),
    "wait for events": ("import select\nselect.select([], [], [])\nans = 1", "forbidden"),
    "wait for ever": ("import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()", "wall-time"),
    # memory and recursion
    "a huge text": ("ans = 'x' * 10**10", "memory"),
    "a text that doubles": ("x = 'x'\nwhile True:\n    x += x", "memory"),
    "a huge width": ("ans = '%1000000000d' % 1", "memory"),
    "a huge int": ("ans = 1 << 33 * 10 ** 8", "memory"),
    "an int of too many digits": ("ans = int('9' * 10 ** 7)", "runtime"),
    "a growing list": ("a = []\nwhile True:\n    a.append('x' * 10**6)", "memory"),
    "an endless list": ("import itertools\nans = list(itertools.count())", "memory"),
    "much from the random device": ("import os\nos.getrandom(10 ** 10)\nans = 1", "memory"),
    "the memory stays full": (
        "a = []\ntry:\n    while True:\n        a.append(b'x' * 9_999)\nfinally:\n    b = a",
        "memory",
    ),
    "deep recursion": ("def f():\n    return f()\nf()", "runtime"),
    "recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n    def __eq__(self, other):\n        return [self] == [other]\nA() == A()",
        "crashed memory runtime",
    ),
    "nested brackets": ("(" * 100_000, "syntax"),
    "nested operators": ("ans = " + "-" * 100_000 + "1", "memory syntax"),
    # the interpreter's own memory
    "read address 0": ("import ctypes\nctypes.string_at(0)", "crashed"),
    "overwrite an int": ("import ctypes\nctypes.memset(id(1), 255, 64)\nans = 1", "crashed"),
    "byte code that makes no sense": (
        "def f():\n    pass\nf.__code__ = f.__code__.replace(co_consts=(), co_code=b'd\\xff' * 20)\nf()",
        "crashed",
    ),
}


@needs_filter
@pytest.mark.parametrize(("code", "kinds"), STOPPED.values(), ids=STOPPED.keys())
def test_the_attack_is_stopped(sandbox: Sandbox, code: str, kinds: str):
    assert_stopped(attack(sandbox, code), kinds)


@pytest.mark.parametrize("whose", ["this process", "the helper"])
def test_the_environment_of_a_parent_cannot_be_read(sandbox: Sandbox, whose: str):
    pid = os.getpid() if whose == "this process" else helper_ids(sandbox)[0]
    for name in ("environ", "cmdline", "mem", "root/etc/passwd", "fd/0"):
        run = attack(sandbox, f"ans = open('/proc/{pid}/{name}', 'rb').read(1)")
        assert_stopped(run, "runtime")


def test_its_own_environment_is_empty(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hidden")
    in_c = (
        "import ctypes\nget = ctypes.CDLL(None).getenv\nget.restype = ctypes.c_char_p\n"
        "ans = get(b'OPENAI_API_KEY') is None"
    )
    with Sandbox(QUICK, workers=1) as opened:
        assert opened.run("import os\nans = len(os.environ)").answer == 0.0
        assert opened.run(in_c).answer is True


READS_PATHS = {
    "command line": "import sys\nans = repr((sys.orig_argv, sys.argv, sys.path, sys.executable, sys.prefix))",
    "frames": (
        "import sys\nframe, found = sys._getframe(), []\nwhile frame:\n"
        "    found.append((frame.f_code.co_filename, frame.f_globals.get('__file__')))\n    frame = frame.f_back\n"
        "ans = repr(found)"
    ),
    "modules": "import sys\nans = repr([name for name in sys.modules if 'finqa' in name])",
    "stack": (  # the name of the executable stands at its top, above the command line and the environment
        "import ctypes\nget = ctypes.CDLL(None).getauxval\nget.restype = ctypes.c_ulong\ntop = get(31)\n"
        "raw = (ctypes.string_at(top - 20_000, 20_000) + ctypes.string_at(top)).decode('latin-1')\n"
        "ans = repr([text for text in raw.split('\\0') if '/' in text])[:4000]"
    ),
}


@needs_filter
@pytest.mark.parametrize("code", READS_PATHS.values(), ids=READS_PATHS.keys())
def test_no_path_of_the_machine_but_the_interpreters_can_be_read(sandbox: Sandbox, code: str):
    found = attack(sandbox, code).answer
    assert isinstance(found, str)
    mine = {str(REPOSITORY), str(Path.cwd()), str(Path.home()), tempfile.gettempdir(), "finqa-sandbox", sys.prefix}
    its_own = str(Path(sys.base_prefix).resolve())
    assert not [path for path in mine - {sys.base_prefix} if path in found.replace(its_own, "")]
    assert "site-packages" not in found


CHANGES_A_FILE = {
    "write": "open({0!r}, 'w').write('x')",
    "append": "open({0!r}, 'a').write('x')",
    "remove": "import os\nos.unlink({0!r})",
    "rename": "import os\nos.rename({0!r}, {0!r} + '2')",
    "cut off": "import os\nos.truncate({0!r}, 0)",
    "change its rights": "import os\nos.chmod({0!r}, 0)",
    "link": "import os\nos.link({0!r}, {0!r} + '2')",
    "remove its folder": "import os\nos.rmdir(os.path.dirname({0!r}))",
    "write beside it": "open({0!r} + '2', 'w').write('x')",
    "make a folder beside it": "import os\nos.mkdir({0!r} + '2')",
}


@needs_filter
@pytest.mark.parametrize("code", CHANGES_A_FILE.values(), ids=CHANGES_A_FILE.keys())
def test_no_file_is_changed(sandbox: Sandbox, tmp_path: Path, code: str):
    target = tmp_path / "kept"
    target.write_text("as it was")
    target.chmod(0o666)
    assert_stopped(attack(sandbox, code.format(str(target))), "runtime forbidden")
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "as it was"
    assert target.stat().st_mode & 0o777 == 0o666


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
