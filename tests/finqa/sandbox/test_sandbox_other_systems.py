"""Without seccomp, and on macOS, programs run all the same, and one line names what does not protect there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from finqa.sandbox.protections import PROTECTIONS

PROGRAMS = {
    "ans = 6 * 7": "(42.0, None)",
    "while True: pass": "(None, 'cpu-time')",
    "open('/etc/passwd')": "(None, 'runtime')",
    "open('written', 'w').write('x')": "(None, 'runtime')",
    "import os; os._exit(0)": "(None, 'crashed')",
    "ans = None": "(None, 'bad-answer')",
    "x = (": "(None, 'syntax')",
    "ans = 1": "(1.0, None)",
}
RUN_TWICE = f"""
from finqa.sandbox.running import Sandbox, SandboxLimits
for _ in range(2):
    with Sandbox(SandboxLimits(cpu_s=0.3), workers=1) as opened:
        for run in opened.run_many({list(PROGRAMS)}):
            print((run.answer, run.error_kind))
        print(*opened.missing, sep=", ")
"""

NO_SECCOMP = "import sys\nsys.modules['pyseccomp'] = None\n"

LIKE_MACOS = """
import builtins, ctypes, os, resource, sys
sys.platform = "darwin"
for name in ("sched_getaffinity", "unshare", "prlimit"):
    vars(os).pop(name, None)

def open_without_proc(path, *args, open=open, **more):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return open(path, *args, **more)

def setrlimit_without_memory(limit, values, setrlimit=resource.setrlimit):
    if limit == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    setrlimit(limit, values)

def no_library(*_, **__):
    raise AssertionError("asks the C library for what it does not have")

builtins.open, resource.setrlimit, ctypes.CDLL = open_without_proc, setrlimit_without_memory, no_library
"""
"""As far as Linux can be like it: no /proc, no CPU affinity, no memory limit, nothing of Linux in the C library."""


def output_of(script: str) -> tuple[list[str], str]:
    """Lines on stdout, and stderr."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines(), done.stderr


def assert_works_and_says_once(lines: list[str], stderr: str) -> list[str]:
    """Returns the names of the protections that it says are missing."""
    expected = list(PROGRAMS.values())
    assert len(lines) == 2 * (len(expected) + 1)
    assert lines[: len(expected)] == lines[len(expected) + 1 : -1] == expected
    assert len(stderr.splitlines()) == 1
    assert "isolation is weaker" in stderr
    missing = stderr.strip().partition("Missing: ")[2].split(", ")
    assert lines[-1] == ", ".join(missing)
    return missing


def test_without_seccomp():
    missing = assert_works_and_says_once(*output_of(NO_SECCOMP + RUN_TWICE))
    assert "system calls" in missing
    assert {"cpu time", "open files", "file size"}.isdisjoint(missing)


def test_on_macos(tmp_path: Path):
    """The helper is a process of its own: what stands in for its interpreter makes that one like macOS, too."""
    like_macos = tmp_path / "like_macos.py"
    like_macos.write_text(
        f"{LIKE_MACOS}\ncode, sys.argv, sys.orig_argv = sys.argv[1], ['-c', *sys.argv[2:]], []\nexec(code)\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -s -S -P -B {like_macos} "$6" "$7" "$8"\n')
    python.chmod(0o755)
    script = f"{NO_SECCOMP}{LIKE_MACOS}sys.executable = {str(python)!r}\n{RUN_TWICE}"
    missing = assert_works_and_says_once(*output_of(script))
    active = {"cpu time", "file size", "core dumps", "processes", "open files"}
    assert missing == [name for name in PROTECTIONS if name not in active]
