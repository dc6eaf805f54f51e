"""Root runs the attack suites again as an ordinary user: once as the system is, once where it forbids namespaces.

The suites run in place. What lies in a folder that only root may enter (an interpreter in root's home, say) is bound
to the same path in a mount namespace of the child's own, where the way to it is open.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from attacking import needs_filter

from finqa.runtime.paths import REPOSITORY

pytestmark = [
    needs_filter,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="not root: the suites run as a user"),
]

ORDINARY_USER = 65534
NO_MOUNT = 42
SUITES = ("test_sandbox_attacks.py", "test_sandbox_hostile_results.py")
RUN_PYTEST = (
    "import os, sys, pytest\n"
    f"assert os.getresuid() == ({ORDINARY_USER},) * 3, os.getresuid()\n"
    "sys.exit(pytest.main(sys.argv[1:]))\n"
)
FORBID_NAMESPACES = (
    "import errno, pyseccomp\n"
    "rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)\n"
    "for name in ('unshare', 'chroot', 'capset'):\n"
    "    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)\n"
    "rules.load()\n"
)


@pytest.mark.parametrize("before", ["", FORBID_NAMESPACES], ids=["as the system is", "namespaces forbidden"])
def test_the_attacks_are_stopped_for_an_ordinary_user(tmp_path: Path, before: str):
    flags = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--color=no"]
    suites = [str(Path(__file__).with_name(name)) for name in SUITES]
    command = [sys.executable, "-B", "-c", before + RUN_PYTEST, *flags, *suites]
    done = subprocess.run(
        as_ordinary_user(command, tmp_path), cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    if done.returncode == NO_MOUNT or done.stderr.startswith("unshare:"):
        pytest.skip(f"this system lets root mount nothing: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^=+ (\d+) passed in ", done.stdout, re.MULTILINE), done.stdout


def as_ordinary_user(command: list[str], work: Path) -> list[str]:
    """The command that runs `command` as an ordinary user, with the project and its interpreter within reach."""
    command = ["setpriv", f"--reuid={ORDINARY_USER}", f"--regid={ORDINARY_USER}", "--clear-groups", *command]
    needed = {Path(path).resolve() for path in (REPOSITORY, sys.prefix, sys.base_prefix)}
    closed = {folder: door for folder in sorted(needed) if (door := closed_door(folder))}
    if not closed:
        return command
    hold, bind, back = shlex.quote(str(work)), [], []
    for number, folder in enumerate(map(shlex.quote, map(str, closed))):
        bind.append(f"mkdir {hold}/{number} && mount --bind {folder} {hold}/{number}")
        back.append(f"mkdir -p {folder} && mount --bind {hold}/{number} {folder}")
    over = [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(door))}" for door in sorted(set(closed.values()))]
    steps = " && ".join([*bind, *over, *back])
    script = f"{{ {steps}; }} || exit {NO_MOUNT}\nexec {shlex.join(command)}"
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]


def closed_door(folder: Path) -> Path | None:
    """The first folder on the way from the root that only its owner may enter."""
    return next((door for door in reversed([folder, *folder.parents]) if not door.stat().st_mode & 0o001), None)
