"""The system calls that an untrusted program may make, as a compiled seccomp filter."""

from __future__ import annotations

import errno
import functools
import tempfile

COMPUTING = (
    "brk munmap mremap madvise futex sched_yield restart_syscall "
    "clock_gettime gettimeofday time getrandom close exit exit_group"
)
"""Memory, locks, the clock, random numbers, the end. mmap, mprotect and write are let through in part, see below."""

BY_NAME = (
    "open openat stat lstat fstat newfstatat statx access faccessat readlink readlinkat getcwd getdents64 lseek ioctl"
)
"""Looking at files fails with PermissionError: Python does so in passing (a traceback looks for source lines)."""

_PROT_EXEC = 4
_PROT_ARGUMENT = 2  # of mmap and mprotect


@functools.cache
def compiled_filter(result_fd: int) -> bytes:
    """An array of struct sock_filter for the machine's own architecture; empty where there is no seccomp.

    Everything that is not named ends the process. Memory never becomes executable, and `result_fd` is the only
    descriptor that can be written to. Compiled once, here, because libseccomp takes longer than a whole program.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError):  # not installed; no libseccomp on this system
        return b""
    rules = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS)
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for name in COMPUTING.split():
        rules.add_rule(pyseccomp.ALLOW, name)
    for name in BY_NAME.split():
        rules.add_rule(pyseccomp.ERRNO(errno.EACCES), name)
    not_executable = pyseccomp.Arg(_PROT_ARGUMENT, pyseccomp.MASKED_EQ, _PROT_EXEC, 0)
    for name in ("mmap", "mprotect"):
        rules.add_rule(pyseccomp.ALLOW, name, not_executable)
    rules.add_rule(pyseccomp.ALLOW, "write", pyseccomp.Arg(0, pyseccomp.EQ, result_fd))
    rules.add_rule(pyseccomp.ERRNO(errno.EBADF), "write", pyseccomp.Arg(0, pyseccomp.NE, result_fd))
    with tempfile.TemporaryFile() as compiled:
        rules.export_bpf(compiled)
        compiled.seek(0)
        return compiled.read()
