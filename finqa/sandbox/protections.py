"""What holds a program in: given up by the helper and its programs alike, or put on by each program's process."""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable

from finqa.sandbox.program import LONGEST_REPLY, RESULT_FD, answer_line, keep_only, outcome

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

Step = tuple[str, Callable[[], None]]
"""A protection: its name, and what the program's process does to put it on (OSError, ValueError: not here)."""


def own_size_b() -> int:
    """Address space of this process in bytes, which a program's process starts with; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as pages:  # noqa: PTH123  pathlib would make every fork dearer
            return int(pages.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


# Shared by helper and programs


def shut_in() -> list[str]:
    """Give up what this process and its programs never need, all folders but the empty one that it was started in.

    Returns the names of what the system allowed.
    """
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


# Put on by each program's process


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
