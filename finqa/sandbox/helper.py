"""The process in which untrusted programs run: started clean by `finqa.sandbox.running`, it forks once a program.

It imports the standard library alone, so that it stays small: forking it costs a fraction of starting an interpreter.
The environment is empty but for a fixed hash seed, which is gone before a program runs.

Reads from stdin one request a program: a header (`HEADER`: tag, length), then the source in UTF-8. Writes to
stdout one reply each: a header, then JSON. The tag of a reply says who wrote it, since only one of them is to be
trusted: `FROM_HELPER` (this process: what it is protected by, or how the program ended) or `FROM_PROGRAM` (the
process that the program ran in: untrusted bytes, at most `LONGEST_REPLY`).
"""

from __future__ import annotations

import builtins
import gc
import importlib
import json
import os
import select
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable

from finqa.sandbox.program import LONGEST_REPLY, RESULT_FD, failure, keep_only, outcome
from finqa.sandbox.protections import SYSTEM_CALLS, own_size_b, protections, shut_in, try_out

HEADER = struct.Struct("!cI")
REQUEST, FROM_HELPER, FROM_PROGRAM = b"q", b"h", b"p"
PRELOADED = (
    "cmath statistics numbers datetime calendar _strptime re string collections itertools operator bisect heapq copy "
    "enum typing dataclasses unicodedata"
)
"""What a program can import beside `random` and the modules above. Nothing is read from disk once programs run.

The compiler itself needs unicodedata, for names and `\\N{...}` beyond ASCII."""


def main(given: str) -> int:
    """Serve until stdin ends; `given` are the settings, as JSON."""
    settings = json.loads(given)
    import_random()
    for name in PRELOADED.split():
        importlib.import_module(name)
    builtins.exit = builtins.quit = sys.exit  # as an interpreter with the site module has them
    for name in [name for name in sys.modules if name.partition(".")[0] == "finqa"]:
        del sys.modules[name]  # no program imports what it runs under
    sys.path.clear()
    sys.path_importer_cache.clear()
    warnings.simplefilter("ignore")
    os.environ.clear()
    take_default_signals()
    sys.orig_argv.clear()
    size_b = own_size_b()
    shared = shut_in()
    steps = protections(settings, size_b)
    active = try_out(steps) or try_out([step for step in steps if step[0] != SYSTEM_CALLS])
    if not active:
        sys.exit("no program runs under the limits of the sandbox here; are they too small?")
    send(FROM_HELPER, json.dumps({"protections": shared + active}).encode())
    serve([step for name, step in steps if name in active], settings, leftovers=SYSTEM_CALLS not in active)
    return 0


def serve(steps: list[Callable[[], None]], settings: dict, leftovers: bool) -> None:
    """Run one program a request, until stdin ends. `leftovers`: a program may leave processes behind."""
    gc.collect()
    gc.freeze()  # what is here already is never traversed, hence never copied, in a program's process
    while header := receive(HEADER.size):
        reply = run_program(receive(HEADER.unpack(header)[1]), steps, settings)
        if leftovers and os.getpid() == 1:
            end_all_others()
        send(*reply)


def import_random() -> None:
    """Seed `random` once for all programs, so that the same program gives the same answer every time.

    On import `random` registers a hook that seeds it anew in every fork, which is a tenth of what a program costs. Here
    that hook is not registered.
    """
    register = os.register_at_fork
    os.register_at_fork = lambda **_: None
    try:
        importlib.import_module("random").seed(0)
    finally:
        os.register_at_fork = register


def take_default_signals() -> None:
    """Undo what was inherited: an ignored SIGCHLD would lose exit codes, a blocked SIGPROF the CPU limit."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGCHLD, signal.SIGPROF, signal.SIGXCPU, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def receive(size: int) -> bytes:
    """Exactly `size` bytes of stdin; nothing at its end."""
    parts = []
    while size > 0:
        part = os.read(0, min(size, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(tag: bytes, content: bytes) -> None:
    data = HEADER.pack(tag, len(content)) + content
    while data:
        data = data[os.write(1, data) :]


def run_program(code: bytes, steps: list[Callable[[], None]], settings: dict) -> tuple[bytes, bytes]:
    """Run one program in a process of its own. Returns the reply: its tag and its content."""
    cpu_s, wall_s = settings["cpu_s"], settings["wall_s"]
    deadline = time.monotonic() + wall_s
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            keep_only(writing)
            for step in steps:
                step()
            os.write(RESULT_FD, outcome(code))
        finally:
            os._exit(1)
    os.close(writing)
    try:
        line, ended = read_line(reading, deadline)
    except EOFError:
        end(child)
        sys.exit(0)
    os.close(reading)
    if line.endswith(b"\n"):
        end(child)
        return FROM_PROGRAM, line
    if ended:  # nobody can write any more: the process is gone, or soon will be
        while time.monotonic() < deadline:
            pid, status, usage = os.wait4(child, os.WNOHANG)
            if pid:
                return FROM_HELPER, how_it_ended(status, usage.ru_utime + usage.ru_stime, cpu_s)
            time.sleep(0.0005)
    end(child)
    if len(line) >= LONGEST_REPLY:
        return FROM_HELPER, failure("crashed", "the program wrote to the pipe that carries its result")
    return FROM_HELPER, failure("wall-time", f"the program was not done after {wall_s:g} s")


def read_line(reading: int, deadline: float) -> tuple[bytes, bool]:
    """Read until a line or the pipe ends, too much has come, or time is up.

    Returns the bytes, and whether the pipe ended. Raises EOFError when finqa.sandbox.running has hung up.
    """
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    poll.register(0, 0)  # no event but the hang-up
    data = b""
    while len(data) < LONGEST_REPLY and not data.endswith(b"\n"):
        events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if any(descriptor == 0 for descriptor, _ in events):
            raise EOFError
        if not events:
            return data, False
        part = os.read(reading, LONGEST_REPLY)
        if not part:
            return data, True
        data += part
    return data, False


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is still its own
    os.waitpid(child, 0)


def end_all_others() -> None:
    """End what a program left behind, as the first process of a pid namespace can."""
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def how_it_ended(status: int, used_s: float, cpu_s: float) -> bytes:
    code = os.waitstatus_to_exitcode(status)
    if -code in (signal.SIGPROF, signal.SIGXCPU) or (-code == signal.SIGKILL and used_s >= cpu_s):
        return failure("cpu-time", f"the program used more than {cpu_s:g} s of CPU time")
    if -code == signal.SIGSYS:
        return failure("forbidden", "the program asked the system for something that computing does not need")
    if code < 0:
        return failure("crashed", f"the program's process ended by signal {signal.Signals(-code).name}")
    return failure("crashed", f"the program's process ended without a result (exit code {code})")
