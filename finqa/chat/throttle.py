"""How many requests are under way at a time: what the server takes, up to a limit, with one pause for all.

Additive increase, multiplicative decrease: an answer raises the limit a little (by one for each full round of
answers), a 429 halves it and holds every new request back for as long as the server says, or longer each time where it
says nothing. Requests that were under way together count as one 429.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row (from 1): doubled each time, with jitter of a half."""
    wait = min(FIRST_WAIT_S * 2 ** min(failures - 1, 30), LONGEST_WAIT_S)
    return wait * random.uniform(0.5, 1.0)


class Stopped(Exception):
    """No more requests are to be sent."""


class Throttle:
    """Lets requests in.

    Args:
        most: Requests under way at a time, at most.
        allows: Whether one more may be sent while so many are under way; with none under way, False means never.
    """

    def __init__(self, most: int, allows: Callable[[int], bool] = lambda under_way: True) -> None:
        self.most = most
        self.allows = allows
        self.limit = float(most)
        self.under_way = 0
        self.stopping = False
        self._paused_until = 0.0
        self._last_cut = 0.0
        self._cuts_in_a_row = 0
        self._changed = asyncio.Event()

    async def enter(self) -> float:
        """Wait for a place; returns the time, for `slow_down`. `leave` must follow. Raises Stopped."""
        while True:
            if self.stopping:
                raise Stopped
            pause = self._paused_until - time.monotonic()
            if pause <= 0:
                if self.under_way < int(self.limit) and self.allows(self.under_way):
                    self.under_way += 1
                    return time.monotonic()
                if not self.under_way:
                    raise Stopped
            await self._wait(pause if pause > 0 else None)

    def leave(self) -> None:
        self.under_way -= 1
        self._changed.set()

    def speed_up(self) -> None:
        """After an answer."""
        self.limit = min(float(self.most), self.limit + 1 / self.limit)
        self._cuts_in_a_row = 0

    def slow_down(self, entered: float, retry_after_s: float | None) -> None:
        """After a 429 to a request that was let in at `entered`."""
        now = time.monotonic()
        if entered > self._last_cut:
            self.limit = max(1.0, self.limit / 2)
            self._last_cut = now
            self._cuts_in_a_row += 1
        wait = backoff_s(self._cuts_in_a_row) if retry_after_s is None else retry_after_s * random.uniform(1.0, 1.1)
        self._paused_until = max(self._paused_until, now + wait)

    def stop(self) -> None:
        """Let nobody in from now on, and end all waiting."""
        self.stopping = True
        self._changed.set()

    async def sleep(self, seconds: float) -> None:
        """Wait outside, unless it is stopped; raises Stopped."""
        until = time.monotonic() + seconds
        while not self.stopping and (left := until - time.monotonic()) > 0:
            await self._wait(left)
        if self.stopping:
            raise Stopped

    async def _wait(self, seconds: float | None) -> None:
        """Until something changes, or the time is over."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def __str__(self) -> str:
        return f"slowed to {int(self.limit)} at a time" if int(self.limit) < self.most else ""
