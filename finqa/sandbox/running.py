"""Run untrusted programs: what a language model wrote is never run in this process.

    with Sandbox(SandboxLimits(cpu_s=2)) as sandbox:
        run = sandbox.run("ans = 1 + 1")            # Run(answer=2.0, error_kind=None, message="")
        runs = sandbox.run_many(codes)              # in order, on all cores

A few helper processes (`finqa.sandbox.helper`) start clean: an interpreter of their own with no environment, no
descriptors of ours, no torch. For every program a helper forks a process, which gives up what it does not need and
runs the program in it: one set of globals, print goes nowhere, the value of `ans` is the result. The kernel, not
Python, holds it in:

- limits on CPU time, memory, open files (0), file size (0), processes (0);
- a filter that lets through the few system calls that computing needs. Opening a file by name raises
  PermissionError; any other call ends the process;
- its own user, pid, network, ipc and mount namespaces, an empty folder as root, no capabilities, where the system
  allows it. `Sandbox.protections` says what is active.

The result comes back as one line of JSON through a pipe of that program's own, is at most 64 KiB, and is checked here
as untrusted text. The same program gives the same answer every time: hash and random seeds are fixed.

What this does not cover:

- A program runs in the process that reports its result, so it can report any result it likes, or none. That is worth
  nothing to it: it could as well set `ans`. It cannot touch the result of another program.
- Side channels: a program can read the clock and measure the machine. It has no way to tell anyone.
- A hole in the kernel behind the calls that remain, or in the processor.
- CPU and memory up to the limits, once a worker.
- A program can find out where the interpreter and its standard library lie, and nothing else of the machine's paths.
- Without seccomp (macOS, or pyseccomp missing) a program is held by the limits and what namespaces there are. The
  limits keep every file closed, but without an empty root folder it could remove files of its user, and without a pid
  namespace send signals and, as root, leave processes behind. macOS has none of the namespaces and does not keep the
  memory limit: there a program may take what memory it can fill in its CPU time. Which protections are missing is
  said once on stderr (`Sandbox.missing`).
- Without the namespaces alone (many containers forbid them) the filter still stops all of the above.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finqa.runtime.errors import UserError
from finqa.sandbox.filter import compiled_filter
from finqa.sandbox.helper import HEADER, REQUEST
from finqa.sandbox.program import RESULT_FD
from finqa.sandbox.protections import PROTECTIONS, SYSTEM_CALLS
from finqa.sandbox.results import Run, read_reply

DEFAULT_WORKERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
LONGEST_PROGRAM = 1_000_000
"""Characters of source; a longer program is not run, its error kind is memory."""
_GRACE_S = 30.0
_TRIES = 2
_MODULES = ("program", "protections", "helper")
"""What the helper is made of, in the order in which they import each other."""
_START_HELPER = """
import json, sys, types
for name, source in json.loads(sys.stdin.buffer.readline()).items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
sys.exit(module.main(sys.argv[1]))
"""
"""The helper gets its source, and not the folder where it lies, so that no program can read that anywhere in it."""


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may use."""

    cpu_s: float = 2.0
    """CPU time in seconds: the limit that counts, since it does not depend on how busy the machine is."""
    memory_mb: int = 256
    """Address space in MiB, over the 20 or so of the interpreter."""
    wall_s: float = 60.0
    """Elapsed time in seconds: a backstop for programs that wait without computing."""

    def __post_init__(self) -> None:
        if not float(self.memory_mb).is_integer():
            raise UserError(f"SandboxLimits.memory_mb must be a whole number, not {self.memory_mb}")
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"SandboxLimits.{name} must be above 0, not {value}")
        if self.wall_s < self.cpu_s:
            raise UserError(f"SandboxLimits.wall_s ({self.wall_s:g}) must not be under cpu_s ({self.cpu_s:g})")


_TOO_LONG = Run(None, "memory", f"the program is longer than {LONGEST_PROGRAM:,} characters")


class Sandbox:
    """Runs untrusted programs, up to `workers` at a time, while its with block is open.

    May be used from several threads: their calls wait for each other. Raises UserError where the helper process
    cannot be started at all.
    """

    def __init__(self, limits: SandboxLimits = SandboxLimits(), workers: int = DEFAULT_WORKERS) -> None:
        if workers < 1:
            raise UserError(f"a sandbox needs at least one worker, not {workers}")
        self.limits = limits
        self.workers = workers
        self._helpers: list[_Helper] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Sandbox:
        self._helpers = [_Helper(self.limits)]
        if SYSTEM_CALLS in self.missing:
            _say_once(
                "sandbox: isolation is weaker, since this system lacks the system-call filter (Linux has it with "
                f"libseccomp2 and `pip install pyseccomp`). Missing: {', '.join(self.missing)}"
            )
        return self

    def __exit__(self, *_: object) -> None:
        for helper in self._helpers:
            helper.stop()
        self._helpers = []

    @property
    def protections(self) -> tuple[str, ...]:
        """Names of the protections that are active on this system."""
        return self._helpers[0].protections

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the protections that this system does not have."""
        return tuple(name for name in PROTECTIONS if name not in self.protections)

    def run(self, code: str) -> Run:
        """Run one program."""
        return self.run_many([code])[0]

    def run_many(self, codes: Sequence[str], progress: Callable[[int, int], None] | None = None) -> list[Run]:
        """Run every program; the results are in the order of `codes`.

        progress(done, total) is called after each program, in the calling thread. If it raises, or on Ctrl-C, running
        programs are stopped and the sandbox stays usable.
        """
        if not self._helpers:
            raise RuntimeError("a Sandbox runs programs inside its with block")
        runs = {number: _TOO_LONG for number, code in enumerate(codes) if len(code) > LONGEST_PROGRAM}
        waiting = deque(number for number in range(len(codes)) if number not in runs)
        deaths = [0] * len(codes)
        with self._lock, self._idle_helpers():
            while len(self._helpers) < min(self.workers, len(codes)):
                self._helpers.append(_Helper(self.limits))
            while len(runs) < len(codes):
                for helper in self._helpers:
                    if waiting and helper.program is None:
                        number = waiting.popleft()
                        helper.start_program(number, codes[number])
                for helper in self._answered():
                    number, run = helper.take_result()
                    if run is None:
                        helper.restart()
                        deaths[number] += 1
                        if deaths[number] < _TRIES:
                            waiting.appendleft(number)
                            continue
                        run = Run(None, "crashed", "the sandbox's helper process died while the program ran")
                    runs[number] = run
                    if progress is not None:
                        progress(len(runs), len(codes))
        return [runs[number] for number in range(len(codes))]

    def _answered(self) -> list[_Helper]:
        """The helpers with something to read, waiting for one; all busy ones, ended, if that takes far too long."""
        busy = {helper.fileno(): helper for helper in self._helpers if helper.program is not None}
        poll = select.poll()
        for descriptor in busy:
            poll.register(descriptor, select.POLLIN)
        ready = [busy[descriptor] for descriptor, _ in poll.poll((self.limits.wall_s + _GRACE_S) * 1000)]
        if ready:
            return ready
        for helper in busy.values():
            helper.kill()
        return list(busy.values())

    @contextlib.contextmanager
    def _idle_helpers(self) -> Iterator[None]:
        """Start, and end, with helpers that run nothing, also where a call was interrupted, even in here."""
        self._restart_busy()
        try:
            yield
        finally:
            self._restart_busy()

    def _restart_busy(self) -> None:
        for helper in self._helpers:
            if helper.program is not None:
                helper.restart()


class _Helper:
    """One helper process, and the number of the program that it runs now."""

    def __init__(self, limits: SandboxLimits) -> None:
        self._limits = limits
        self.program: int | None = None
        self._start()

    def _start(self) -> None:
        system_calls = compiled_filter(RESULT_FD).hex()
        with tempfile.TemporaryDirectory(prefix="finqa-sandbox-") as folder, tempfile.TemporaryFile() as errors:
            settings = json.dumps({**asdict(self._limits), "filter": system_calls})
            # The interpreter itself, and not the link to it in an environment that may lie in a user's folder.
            interpreter = os.path.realpath(sys.executable)
            self._process = subprocess.Popen(
                [interpreter, "-s", "-S", "-P", "-B", "-c", _START_HELPER, settings],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                close_fds=True,
                start_new_session=True,  # Ctrl-C is for us alone
                env={"PYTHONHASHSEED": "0"},
            )
            assert self._process.stdin is not None and self._process.stdout is not None
            self._requests, self._replies = self._process.stdin, self._process.stdout
            first = self._receive() if self._send(_helper_source()) else None
            if first is None:
                self.kill()
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines() or ["(it says nothing)"]
                raise UserError(f"the sandbox's helper process ({interpreter}) does not start: {lines[-1]}")
            # The folder goes now. The helper stays in it, and nothing can be made in a folder that is gone.
        self.protections: tuple[str, ...] = tuple(json.loads(first[1])["protections"])

    def fileno(self) -> int:
        return self._replies.fileno()

    def start_program(self, number: int, code: str) -> None:
        """Hand over a program. A helper found dead is replaced: this program had no part in that."""
        source = code.encode("utf-8", "surrogatepass")
        request = HEADER.pack(REQUEST, len(source)) + source
        if self._process.poll() is not None or not self._send(request):
            self.restart()
            self._send(request)
        self.program = number

    def _send(self, request: bytes) -> bool:
        """Whether the helper took the request; if not, it is dead, as take_result will see."""
        data = memoryview(request)
        try:
            while data:
                data = data[os.write(self._requests.fileno(), data) :]
        except BrokenPipeError:
            return False
        return True

    def take_result(self) -> tuple[int, Run | None]:
        """Number and result of the program that was started; no result when the helper has died."""
        assert self.program is not None
        reply = None if self._replies.closed else self._receive()
        number, self.program = self.program, None
        return number, None if reply is None else read_reply(*reply)

    def _receive(self) -> tuple[bytes, bytes] | None:
        """Tag and content of a message; None when the helper has died."""
        header = self._read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        tag, size = HEADER.unpack(header)
        content = self._read(size)
        return (tag, content) if len(content) == size else None

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (part := os.read(self.fileno(), size - len(data))):
            data += part
        return data

    def restart(self) -> None:
        self.kill()
        self._start()
        self.program = None

    def stop(self) -> None:
        """Hang up, whereupon the helper ends its program and itself."""
        self._requests.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._replies.close()


@functools.cache
def _helper_source() -> bytes:
    """A line of JSON: the modules of the helper, by name."""
    here = Path(__file__).parent
    sources = {f"finqa.sandbox.{name}": (here / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES}
    return json.dumps({"finqa": "", "finqa.sandbox": "", **sources}).encode() + b"\n"


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)
