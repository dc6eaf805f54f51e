"""Errors that a user can act on, and how a script reports them."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there, then run the command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may use, or change its rights"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "move what is in the way"),
}
"""What a user can do about an OSError of the system, by its number."""


class UserError(Exception):
    """Bad input or a missing piece: the message is one line with what is wrong, where, and the remedy."""


def report_errors(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and turn a `UserError` into one line on stderr.

    So is an OSError that names a file and that the user can mend: no room, no right, something in the way.
    Returns the exit code: what `main` returned (None is 0), 1 after such an error, 130 after Ctrl-C. Any other
    exception is a defect of ours and keeps its traceback.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None or error.errno not in REMEDIES:
            raise
        print(f"error: {error.filename}: {error.strerror}; {REMEDIES[error.errno]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
