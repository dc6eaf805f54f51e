"""The project's commands: as text that a user can paste, and run with a log of their own, as the demo and the study run
them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY, Folders

CROSSCODER_FOLDER = REPOSITORY / "crosscoder-model-diff"
LOG_LINES_SHOWN = 15


def typed(script: str, *words: str, folders: Folders | None = None) -> str:
    """A command as it is typed in the current folder, so that a remedy can be pasted.

    Args:
        script: Path of a script in the repository, or `-m` and a module.
        words: What follows it, quoted where the shell asks for it.
        folders: Gives --data-dir where that is not the default.
    """
    if not script.startswith("-m "):
        here, path = Path.cwd(), REPOSITORY / script
        near = here in path.parents or REPOSITORY in (here, *here.parents)
        script = shlex.quote(os.path.relpath(path, here) if near else str(path))
    said = [f"python {script}", *words]
    if folders and folders.data.resolve() != Folders().data:
        said += ["--data-dir", shlex.quote(str(folders.data))]
    return " ".join(said)


def make_data(folders: Folders) -> str:
    """`make data` as it is typed in the current folder."""
    here = Path.cwd()
    where = "" if here == REPOSITORY else f"-C {shlex.quote(os.path.relpath(REPOSITORY, here))} "
    data = folders.data.resolve()
    return f"make {where}data" + ("" if data == Folders().data else f" DATA_DIR={shlex.quote(str(data))}")


def run_into(log: Path, name: str, command: str, folder: Path = REPOSITORY) -> float:
    """Run a command with this Python, offline, its output in `log`; returns the seconds it took.

    Raises UserError with the end of the log where it fails.
    """
    started = time.perf_counter()
    with told_to_end():
        process = start_into(log, command, folder)
        try:
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise UserError(failure(name, process.returncode, log))
    return time.perf_counter() - started


@contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM, and SIGHUP where it is not ignored, end the block as Ctrl-C does: by an exception."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_into(
    log: Path,
    command: str,
    folder: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
    own_group: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a command as `run_into` runs it; `environment` adds to this process's variables.

    With `own_group` a signal can be sent to it and all that it starts, by its process id.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    offline = {"WANDB_MODE": os.environ.get("WANDB_MODE", "offline"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=folder,
            env=os.environ | offline | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0 if own_group else None,
        )


def failure(name: str, exit_code: int, log: Path) -> str:
    """The message about a command that failed: its exit code and the end of its log."""
    with log.open(errors="replace") as lines:
        end = "".join(deque(lines, LOG_LINES_SHOWN))
    return f"{name} failed (exit code {exit_code}); the end of {log}:\n{end}"


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
