"""Errors that a user can act on, and how a script reports them."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Iterable

from finqa.runtime.progress import never_silent

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    **dict.fromkeys(NO_ROOM, "make room there, then run the command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may use, or change its rights"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "move what is in the way"),
}
"""What a user can do about an OSError of the system, by its number."""


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
    """
    try:
        with never_silent():
            return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in REMEDIES or (error.filename is None and error.errno not in NO_ROOM):
            raise
        where = error.filename or "what this command prints or writes"
        print(f"error: {where}: {error.strerror}; {REMEDIES[error.errno]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is kept", file=sys.stderr)
        return 130
