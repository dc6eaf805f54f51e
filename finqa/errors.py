"""Errors that a user can act on, and how a script reports them."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or a missing piece: the message is one line with what is wrong, where, and the remedy."""


def report_errors(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and turn a `UserError` into one line on stderr.

    Returns the exit code: what `main` returned (None is 0), 1 after a UserError, 130 after Ctrl-C. Any other
    exception is a defect of ours and keeps its traceback.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
