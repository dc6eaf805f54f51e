"""What the attack suites share: a sandbox of one worker, and the proof that the next program is unharmed."""

from __future__ import annotations

import pytest

from finqa.sandbox.filter import compiled_filter
from finqa.sandbox.program import RESULT_FD
from finqa.sandbox.results import Run
from finqa.sandbox.running import Sandbox, SandboxLimits

QUICK = SandboxLimits(cpu_s=0.5, memory_mb=64, wall_s=8.0)
"""So much time that a program gets its half second of CPU where other work shares the cores."""
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


def assert_stopped(run: Run, kinds: str) -> None:
    """There is no answer, and one printable line says why. `kinds`: one, or several that depend on the interpreter."""
    assert run.answer is None
    assert run.error_kind in kinds.split()
    assert run.message
    assert run.message.isprintable()


def libc(call: str) -> str:
    """A program that makes a system call through the C library."""
    return f"import ctypes\nctypes.CDLL(None).{call}\nans = 1"
