"""The sandbox's own processes: they are replaced when they die, end when they should, and say what protects them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finqa.runtime.errors import UserError
from finqa.sandbox.filter import compiled_filter
from finqa.sandbox.program import RESULT_FD
from finqa.sandbox.running import Sandbox, SandboxLimits

QUICK = SandboxLimits(cpu_s=0.3, wall_s=2.0)
HARMLESS = "ans = 6 * 7"

needs_filter = pytest.mark.skipif(not compiled_filter(RESULT_FD), reason="no seccomp on this system")
needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc on this system")


def helper_ids(sandbox: Sandbox) -> list[int]:
    return [helper._process.pid for helper in sandbox._helpers]


def kill_when_busy(sandbox: Sandbox, times: int) -> threading.Thread:
    """Kill the only helper, as the system would when it is out of memory, each time it has run a program a while."""

    def kill() -> None:
        for _ in range(times):
            pid = helper_ids(sandbox)[0]
            time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
            while helper_ids(sandbox) == [pid] or sandbox._helpers[0].program is None:
                time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


BUSY = "ans = 0\nfor n in range(3_000_000):\n    ans += 1"


def test_a_helper_that_dies_is_replaced_and_its_program_run_again():
    with Sandbox(SandboxLimits(cpu_s=20), workers=1) as opened:
        killer = kill_when_busy(opened, times=1)
        assert [run.answer for run in opened.run_many([BUSY, HARMLESS])] == [3_000_000.0, 42.0]
        killer.join()


def test_a_program_whose_helper_dies_twice_is_given_up_and_the_others_run():
    with Sandbox(SandboxLimits(cpu_s=20), workers=1) as opened:
        killer = kill_when_busy(opened, times=2)
        given_up, after = opened.run_many(["while True: pass", BUSY])
        killer.join()
    assert (given_up.answer, given_up.error_kind) == (None, "crashed")
    assert after.answer == 3_000_000.0


def first_process(pid: int) -> int:
    """The process that serves: the child of the one started where there is a pid namespace, else that one itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return int(children.read_text().split()[0]) if children.exists() and children.read_text().strip() else pid


def alive(pid: int) -> bool:
    """Neither gone nor waiting to be reaped."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


@needs_proc
@pytest.mark.parametrize("which", [lambda pid: pid, first_process], ids=["the process started", "the one that serves"])
def test_helpers_killed_amid_many_programs_lose_no_result(which: Callable[[int], int]):
    codes = [f"ans = {n} + sum(range(60_000)) - sum(range(60_000))" for n in range(60)]
    struck: list[int | None] = []

    def kill_another(done: int, total: int) -> None:
        """Every fourth time, kill a helper at work, never twice under the same program."""
        busy = [h for h in opened._helpers if h.program is not None and h.program not in struck]
        if done % 4 == 0 and busy:
            struck.append(busy[-1].program)
            pid = which(busy[-1]._process.pid)
            os.kill(pid, signal.SIGKILL)
            while alive(pid):
                time.sleep(0.001)

    with Sandbox(SandboxLimits(cpu_s=20), workers=3) as opened:
        runs = opened.run_many(codes, progress=kill_another)
        after = opened.run(HARMLESS)
    assert [run.answer for run in runs] == [float(n) for n in range(60)]
    assert after.answer == 42.0
    assert len(struck) >= 5  # fewer where other work shares the cores


def test_a_program_that_kills_its_helper_each_time_is_the_only_one_without_an_answer():
    guilty, stop = 5, threading.Event()
    codes = ["while True: pass" if n == guilty else f"ans = {n} + sum(range(300_000)) * 0" for n in range(24)]

    def kill_its_helper() -> None:
        while not stop.wait(0.02):
            for helper in opened._helpers:
                if helper.program == guilty:
                    helper._process.send_signal(signal.SIGKILL)

    with Sandbox(SandboxLimits(cpu_s=20), workers=3) as opened:
        killer = threading.Thread(target=kill_its_helper)
        killer.start()
        runs = opened.run_many(codes)
        stop.set()
        killer.join()
    assert (runs[guilty].answer, runs[guilty].error_kind) == (None, "crashed")
    assert [run.answer for n, run in enumerate(runs) if n != guilty] == [float(n) for n in range(24) if n != guilty]


def test_a_helper_that_dies_between_calls_is_replaced():
    with Sandbox(QUICK, workers=1) as opened:
        os.kill(helper_ids(opened)[0], signal.SIGKILL)
        assert opened.run(HARMLESS).answer == 42.0


def processes_with(word: str) -> list[Path]:
    """Processes whose command line has `word` in it."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in file.read_text():
                found.append(file)
    return found


@needs_proc
def test_no_process_outlives_the_sandbox():
    with Sandbox(SandboxLimits(cpu_s=7.125), workers=2) as opened:
        opened.run_many([HARMLESS] * 4)
        assert processes_with('"cpu_s": 7.125')
    assert not processes_with('"cpu_s": 7.125')


@needs_proc
def test_no_process_outlives_a_killed_parent():
    script = (
        "from finqa.sandbox.running import *\n"
        "with Sandbox(SandboxLimits(cpu_s=50.125)) as opened:\n"
        "    print('ready', flush=True)\n"
        "    opened.run_many(['while True: pass'] * 2)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        time.sleep(0.3)
        parent.kill()
    deadline = time.monotonic() + 5
    while processes_with('"cpu_s": 50.125') and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_with('"cpu_s": 50.125')


# The sandbox itself


@pytest.mark.parametrize(
    "values", [{"cpu_s": 0}, {"memory_mb": -1}, {"memory_mb": 1.5}, {"wall_s": math.nan}, {"cpu_s": 5, "wall_s": 2}]
)
def test_limits_check_themselves(values: dict[str, float]):
    with pytest.raises(UserError, match=f"SandboxLimits.({'|'.join(values)})"):
        SandboxLimits(**values)  # pyright: ignore[reportArgumentType]


def test_a_sandbox_needs_a_worker():
    with pytest.raises(UserError, match="at least one worker"):
        Sandbox(workers=0)


def test_an_interpreter_that_does_not_start_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho cannot load libpython >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(UserError, match="does not start: cannot load libpython"), Sandbox():
        pass


def test_memory_is_limited_on_top_of_the_interpreter():
    with Sandbox(SandboxLimits(memory_mb=64), workers=1) as opened:
        assert opened.run("x = b'x' * (48 * 2**20)\nans = 1").answer == 1.0
        assert opened.run("x = b'x' * (80 * 2**20)\nans = 1").error_kind == "memory"


@needs_filter
def test_the_limits_are_active():
    with Sandbox(QUICK, workers=1) as opened:
        assert {"cpu time", "memory", "open files", "file size", "processes", "system calls"} <= set(opened.protections)


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)


@needs_filter
def test_where_namespaces_are_forbidden_the_filter_still_holds():
    done = run_python(
        "import errno, pyseccomp\n"
        "rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)\n"
        "for name in ('unshare', 'chroot', 'capset'):\n"
        "    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)\n"
        "rules.load()\n"
        "from finqa.sandbox.running import *\n"
        "with Sandbox(workers=1) as opened:\n"
        "    print([name for name in opened.protections if 'namespace' in name or 'root' in name])\n"
        "    print('system calls' in opened.protections)\n"
        "    codes = ['ans = 6 * 7', 'import os; os.fork()', 'open(\"/etc/passwd\")', 'ans = 1']\n"
        "    print([(run.answer, run.error_kind) for run in opened.run_many(codes)])\n"
    )
    assert done.stdout == "[]\nTrue\n[(42.0, None), (None, 'forbidden'), (None, 'runtime'), (1.0, None)]\n"
    assert done.stderr == ""


def test_importing_it_loads_nothing_heavy():
    done = run_python(
        "import sys, finqa.sandbox.running\n"
        "print([name for name in ('torch', 'numpy', 'pandas', 'pyseccomp') if name in sys.modules])\n"
    )
    assert done.stdout == "[]\n"
