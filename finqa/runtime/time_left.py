"""How long a long measurement will take: printed once its first part has been timed, then now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]
FIRST_S, EVERY_S = 2.0, 30.0
"""Seconds until the first line, and between two lines; a measurement that ends before the first prints none."""


class TimeLeft:
    """Tells `say` how long `total` units of work will take; `what` names them, as "828 cells on 40 documents"."""

    def __init__(self, what: str, total: float, say: Say):
        self._what, self._total, self._say = what, total, say
        self._done = 0.0
        self._started = time.monotonic()
        self._next = self._started + FIRST_S
        self._first = True

    def add(self, done: float) -> None:
        """So many more units are done."""
        self._done += done
        now = time.monotonic()
        if now < self._next or self._done >= self._total:
            return
        left = (now - self._started) * (self._total - self._done) / self._done
        if self._first:
            self._say(f"about {duration(now - self._started + left)} for {self._what}")
        else:
            self._say(f"{self._done / self._total:.0%} of {self._what}, about {duration(left)} left")
        self._first, self._next = False, now + EVERY_S


def duration(seconds: float) -> str:
    """A time in words: 40 seconds, 11 minutes, 2.5 hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} second{'s' if round(seconds) > 1 else ''}"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
