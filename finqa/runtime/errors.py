"""Errors that a user can act on, and how a script reports them."""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import NoReturn

from finqa.runtime.progress import never_silent

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    **dict.fromkeys(NO_ROOM, "make room there, then run the command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may use, or change its rights"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "move what is in the way"),
}
"""What a user can do about an OSError of the system, by its number."""
LOST = re.compile(r"connection (was likely )?(closed|reset)|broken pipe|socket closed|remote process exit", re.I)
"""How gloo, NCCL and torch's store say that the process at the other end is gone."""
GOES_ON = "the same command goes on from what is kept"


class UserError(Exception):
    """Bad input or a missing piece: the message is one line with what is wrong, where, and the remedy."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone."""
        return [f"error: {self}"]


def nearest(word: str, known: Iterable[str]) -> str:
    """` (do you mean X?)` with the one of the known words that is most like `word`; empty where none is like it."""
    by_lower = {name.lower(): name for name in known if name != word}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (do you mean {by_lower[found[0]]}?)" if found else ""


def report_errors(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and turn a `UserError` into one line on stderr.

    So is an OSError that names a file and that the user can mend: no room, no right, something in the way.
    Returns the exit code: what `main` returned (None is 0), 1 after such an error, 130 after Ctrl-C. Any other
    exception is a defect of ours and keeps its traceback. `main` is never silent for long.

    Of several processes that a launcher started, the one that fails says why, and those that end because of it say
    nothing. Where it was killed, one of them says that it is gone. A process that fails ends here.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        _tell_of_the_end()
    try:
        with never_silent():
            return main() or 0
    except (Exception, KeyboardInterrupt) as error:
        code, line = 130 if isinstance(error, KeyboardInterrupt) else 1, _line(error, several)
        if several:
            _tell_and_end(line or traceback.format_exc().rstrip(), code)
        if line is None:
            raise
    print(line, file=sys.stderr)
    return code


def _line(error: BaseException, several: bool) -> str | None:
    """What is said of an error; None where it is a defect of ours."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {GOES_ON}"
    if isinstance(error, OSError) and error.errno in REMEDIES and (error.filename or error.errno in NO_ROOM):
        where = error.filename or "what this command prints or writes"
        return f"error: {where}: {error.strerror}; {REMEDIES[error.errno]}"
    if several and isinstance(error, RuntimeError) and LOST.search(str(error)):
        return f"error: another process of this run is gone (killed, or its machine is out of reach); {GOES_ON}"
    return None


def _tell_of_the_end() -> None:
    """From now on a process that its launcher ends says so, even while it waits for another one in a library."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writing)
    os.register_at_fork(after_in_child=_forget_the_end)  # else the end of a child would be taken for this one's

    def watch() -> None:
        while os.read(reading, 1)[0] != signal.SIGTERM:
            pass
        _tell_and_end(f"error: ended by the launcher, as another process of this run or it was; {GOES_ON}", 143)

    threading.Thread(target=watch, daemon=True).start()


def _forget_the_end() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _tell_and_end(line: str, code: int) -> NoReturn:
    """Say why this process ends, unless another one has, and end it at once.

    What runs at the end of a Python program would wait for the group of processes, and so for those that wait for
    this one.
    """
    if _is_first_to_tell():
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_first_to_tell() -> bool:
    """Asks the launcher's store, which outlives the processes; whoever cannot reach it tells."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"told in attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except RuntimeError:
        return True
