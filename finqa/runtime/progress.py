"""How far a long stage is: a line with the time of day now and then in a log, one that is rewritten in a terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeVar

Part = TypeVar("Part", bound=Sized)
PLAIN_EVERY_S = 15.0
TERMINAL_EVERY_S = 0.2
STEPS_EVERY_S = 10.0
SILENT_S = 25.0
"""After so long without a word it is said what is under way."""


def say(line: str) -> None:
    """Print a line of a long job; in a log with the time of day before it."""
    print(line if sys.stdout.isatty() else f"{time.strftime('%H:%M:%S')} {line}", flush=True)


@dataclass
class Heard:
    """A stream that remembers when it was written to, and its last line."""

    stream: Any
    at: float = field(default_factory=time.monotonic)
    line: str = "started"
    within_line: bool = False

    def write(self, text: str) -> int:
        self.at = time.monotonic()
        self.line = (text.strip() or self.line).splitlines()[-1]
        self.within_line = not text.endswith("\n")
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def never_silent(every_s: float = SILENT_S) -> Iterator[None]:
    """Within the block, what was said last is said again, with how long ago, whenever nothing else is.

    A line that is not ended (a bar, a stage's name) is left as it is: it says what is under way.
    """
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        yield
        return
    streams = sys.stdout, sys.stderr
    heard = Heard(sys.stdout), Heard(sys.stderr)
    sys.stdout, sys.stderr = heard
    ended = threading.Event()

    def watch() -> None:
        spoke = 0.0
        while not ended.wait(every_s / 25):
            last, now = max(heard, key=lambda one: one.at), time.monotonic()
            if now - max(last.at, spoke) >= every_s and not any(one.within_line for one in heard):
                spoke = now
                line = f"still under way, {now - last.at:.0f} s after: {last.line[:200]}"
                streams[0].write(f"{time.strftime('%H:%M:%S')} {line}\n")
                streams[0].flush()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
        sys.stdout, sys.stderr = streams


@dataclass
class Progress:
    """Counts what is done of `total` and says so, with the rate and the time left."""

    what: str
    total: int
    out: TextIO = field(default_factory=lambda: sys.stderr)
    done: int = 0

    def __post_init__(self) -> None:
        self.terminal = self.out.isatty()
        self.started = self.last_said = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` follows the figures, e.g. tokens so far."""
        self.done += count
        now = time.monotonic()
        if now - self.last_said >= (TERMINAL_EVERY_S if self.terminal else PLAIN_EVERY_S):
            self.last_said = now
            self.say(note)

    def say(self, note: str = "") -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.done else ""
        line = f"{self.what}: {self.done} of {self.total}, {rate:.1f} a second{left}{', ' + note if note else ''}"
        self.out.write(f"\r\033[K{line}" if self.terminal else f"{time.strftime('%H:%M:%S')} {line}\n")
        self.out.flush()

    def close(self) -> None:
        """Clear the terminal's line; the summary of the stage follows."""
        if self.terminal:
            self.out.write("\r\033[K")
            self.out.flush()


def told(what: str, parts: Iterable[Part], total: int) -> Iterator[Part]:
    """The parts, each counted by its length among `total` once it was used; without a `what` nothing is said."""
    progress = Progress(what, total)
    for part in parts:
        yield part
        if what:
            progress.advance(len(part))
    if what:
        progress.close()


class StepProgress:
    """Where a training run is: a bar in a terminal, else a line now and then, and one for the last step."""

    def __init__(self, total: int, initial: int = 0) -> None:
        self._total, self._said = total, float("-inf")
        self._bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True)

    def show(self, step: int, figures: str) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(figures)
        elif step == self._total or time.monotonic() - self._said > STEPS_EVERY_S:
            self._said = time.monotonic()
            say(f"step {step} of {self._total}: {figures}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
