"""The process in which untrusted programs run: started clean by `finqa.sandbox.running`, it forks once a program.

    python -s -S -P -B finqa/sandbox/helper.py '<settings as JSON>'

It is run as a file and imports the standard library alone, so that it stays small: forking it costs a fraction of
starting an interpreter. The environment is empty but for a fixed hash seed, which is gone before a program runs.

Reads from stdin one request a program: a header (`HEADER`: tag, length), then the source in UTF-8. Writes to
stdout one reply each: a header, then JSON. The tag of a reply says who wrote it, since only one of them is to be
trusted: `FROM_HELPER` (this process: what it is protected by, or how the program ended) or `FROM_PROGRAM` (the
process that the program ran in: untrusted bytes, at most `LONGEST_REPLY`).
"""

from __future__ import annotations

import ctypes
import decimal
import fractions
import functools
import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
import types
import warnings
from collections.abc import Callable

HEADER = struct.Struct("!cI")
REQUEST, FROM_HELPER, FROM_PROGRAM = b"q", b"h", b"p"
LONGEST_REPLY = 65_536
"""Bytes that a program's process may send back."""
LONGEST_TEXT = 4_000
"""Characters of an answer that is a string; JSON makes at most twelve bytes of one."""
LONGEST_MESSAGE = 500
RESULT_FD = 3
"""The only descriptor that a program's process has: the writing end of its own pipe."""
PROGRAM_FILE = "<program>"
PRELOADED = (
    "cmath statistics numbers datetime calendar _strptime re string collections itertools operator bisect heapq copy "
    "enum typing dataclasses"
)
"""What a program can import beside `random` and the modules above. Nothing is read from disk once programs run."""

SYSTEM_CALLS = "system calls"
"""The name of the protection that matters most."""
PROTECTIONS = (
    "user namespace",
    "pid namespace",
    "network namespace",
    "ipc namespace",
    "mount namespace",
    "empty root folder",
    "no capabilities",
    "no new privileges",
    "end with the helper",
    "cpu time",
    "memory",
    "file size",
    "core dumps",
    "processes",
    "open files",
    SYSTEM_CALLS,
)
"""All there are; `empty folder` stands in for the empty root folder where chroot is not allowed."""

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_NAMESPACES = {  # the user namespace comes first: it gives the right to make the others
    "user namespace": 0x10000000,
    "pid namespace": 0x20000000,
    "network namespace": 0x40000000,
    "ipc namespace": 0x08000000,
    "mount namespace": 0x00020000,
}
_NUMBERS = (int, float, decimal.Decimal, fractions.Fraction)
_NOTHING = object()
_OUT_OF_MEMORY = b'{"error_kind": "memory", "message": "MemoryError: the program needs too much memory"}\n'

Step = tuple[str, Callable[[], None]]
"""A protection: its name, and what the program's process does to put it on (OSError, ValueError: not here)."""


def main() -> int:
    settings = json.loads(sys.argv[1])
    import_random()
    for name in PRELOADED.split():
        importlib.import_module(name)
    sys.path.clear()
    sys.path_importer_cache.clear()
    warnings.simplefilter("ignore")
    os.environ.clear()
    take_default_signals()
    size_b = own_size_b()
    shared = shut_in(settings["folder"])
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

    On import it asks to be seeded anew in every fork, a tenth of what a program costs: here it is not heard.
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


def own_size_b() -> int:
    """Address space of this process in bytes, which a program's process starts with; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as pages:  # noqa: PTH123  pathlib would make every fork dearer
            return int(pages.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


# The protections that helper and programs share


def shut_in(folder: str) -> list[str]:
    """Give up what this process and its programs never need. Returns the names of what the system allowed."""
    os.chdir(folder)
    if sys.platform != "linux":
        return ["empty folder"]
    libc = ctypes.CDLL(None, use_errno=True)
    names = [name for name, flag in _NAMESPACES.items() if libc.unshare(flag) == 0]
    if "pid namespace" in names:
        become_first_process(libc)
    try:
        os.chroot(".")
        names.append("empty root folder")
    except PermissionError:
        names.append("empty folder")
    version_3_of_this_process = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if libc.capset(version_3_of_this_process, (ctypes.c_uint32 * 6)()) == 0:
        names.append("no capabilities")
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        names.append("no new privileges")
    return names


def become_first_process(libc: ctypes.CDLL) -> None:
    """Go on as the first process of the new pid namespace; the old process stays outside and waits for it.

    When the first process ends, the kernel ends every other process of the namespace.
    """
    first = os.fork()
    if first == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    os.close(0)
    os.close(1)  # else finqa.sandbox.running would not see that the first process is gone
    _, status = os.waitpid(first, 0)
    os._exit(min(abs(os.waitstatus_to_exitcode(status)), 255))


# The protections that each program's process puts on


def protections(settings: dict, size_b: int) -> list[Step]:
    """What a program's process does before it runs the program; the system-call filter closes the door, so last."""
    cpu_s, memory_b = settings["cpu_s"], settings["memory_mb"] * 1_048_576
    lower_cpu = lowering(resource.RLIMIT_CPU, math.ceil(cpu_s) + 1)  # for a program that stops the timer

    def limit_cpu() -> None:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # exact; SIGPROF ends the process
        lower_cpu()

    steps: list[Step] = [
        ("cpu time", limit_cpu),
        ("memory", lowering(resource.RLIMIT_AS, size_b + memory_b)),
        ("file size", lowering(resource.RLIMIT_FSIZE, 0)),
        ("core dumps", lowering(resource.RLIMIT_CORE, 0)),
        ("processes", lowering(resource.RLIMIT_NPROC, 0)),
        ("open files", lowering(resource.RLIMIT_NOFILE, 0)),
    ]
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        steps.insert(0, ("end with the helper", lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)))
    if settings["filter"]:
        steps.append((SYSTEM_CALLS, system_call_filter(bytes.fromhex(settings["filter"]))))
    return steps


def lowering(limit: int, value: int) -> Callable[[], None]:
    """The step that lowers a limit to `value`, or to the highest that this process may have."""
    _, highest = resource.getrlimit(limit)
    if highest != resource.RLIM_INFINITY:
        value = min(value, highest)
    return functools.partial(resource.setrlimit, limit, (value, value))


def system_call_filter(instructions: bytes) -> Callable[[], None]:
    """The step that installs the compiled filter (an array of struct sock_filter, eight bytes each)."""

    class FilterProgram(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    program = FilterProgram(len(instructions) // 8, instructions)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)

    def install() -> None:
        if prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses the system-call filter")

    return install


def try_out(steps: list[Step]) -> list[str]:
    """Names of the steps that work here, found out in a process of its own; none if it did not live through them."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        keep_only(writing)
        active = []
        for name, step in steps:
            try:
                step()
                active.append(name)
            except (OSError, ValueError):
                pass
        if outcome(b"ans = 1") == answer_line(1):
            os.write(RESULT_FD, json.dumps(active).encode())
        os._exit(0)
    os.close(writing)
    reply = os.read(reading, LONGEST_REPLY)
    os.close(reading)
    os.waitpid(child, 0)
    return json.loads(reply) if reply else []


# Serving


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


# In the program's process


class Discard:
    """Where print goes."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


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
        return failure("syntax", f"{type(error).__name__}: {error.msg}{where}")
    except (ValueError, OverflowError, RecursionError) as error:
        return failure("syntax", describe(error, None))
    variables = module.__dict__
    try:
        exec(program, variables)
        answer = variables.get("ans", _NOTHING)  # in here: a key of the program's own may compare as it likes
    except MemoryError:
        variables.clear()
        raise
    except BaseException as error:  # noqa: BLE001  whatever it raises is the program's result
        return failure("runtime", describe(error, line_of(sys.exc_info()[2])))
    if answer is _NOTHING:
        return failure("no-answer", "the program does not set ans")
    return answer_line(answer)


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


if __name__ == "__main__":
    sys.exit(main())
