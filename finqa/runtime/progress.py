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
STEPS_EVERY_S = 10.0
SILENT_S = 25.0
"""Seconds without output, after which the last line is printed again."""


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
    """Within the block, print the last line again, with its age, whenever nothing was printed for `every_s` seconds.

    A line without its line break (a bar, a stage's name) is left as it is: it shows what is under way.
    """
    if os.environ.get("RANK", "0") != "0":  # of several processes only the first one prints
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
    """Counts progress towards `total`, and shows it with rate and time left: a bar in a terminal, lines in a log."""

    what: str
    total: int
    out: TextIO = field(default_factory=lambda: sys.stderr)
    done: int = 0
    every_s: float = field(default_factory=lambda: PLAIN_EVERY_S)
    """Seconds between two lines in a log."""

    def __post_init__(self) -> None:
        self.started = self.last_said = time.monotonic()
        self._before = self.done
        self._bar: Any = None
        if self.out.isatty():
            from tqdm import tqdm

            bar: Any = {"dynamic_ncols": True, "leave": False}
            self._bar = tqdm(desc=self.what, total=self.total, initial=self.done, file=self.out, **bar)

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` follows the figures, e.g. tokens so far."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self.last_said >= self.every_s:
            self.say(note)

    def say(self, note: str = "") -> None:
        self.last_said = time.monotonic()
        rate = (self.done - self._before) / max(self.last_said - self.started, 1e-9)
        left = f", {(self.total - self.done) / rate:,.0f} s left" if rate else ""
        pace = f"{rate:,.{1 if rate < 100 else 0}f} a second"
        line = f"{self.what}: {self.done:,} of {self.total:,}, {pace}{left}{', ' + note if note else ''}"
        print(time.strftime("%H:%M:%S"), line, file=self.out, flush=True)

    def close(self) -> None:
        """Clear the terminal's line; the summary of the stage follows."""
        if self._bar is not None:
            self._bar.close()


def told(what: str, parts: Iterable[Part], total: int) -> Iterator[Part]:
    """Yield the parts, and show progress: each counts by its length towards `total`. Silent where `what` is empty."""
    progress = Progress(what, total) if what else None
    for part in parts:
        yield part
        if progress:
            progress.advance(len(part))
    if progress:
        progress.close()


class StepProgress(Progress):
    """Progress of a training run; a log has lines for the first and the last step too."""

    def __init__(self, total: int, initial: int = 0) -> None:
        super().__init__("steps", total, sys.stdout, initial, STEPS_EVERY_S)
        self.last_said = float("-inf")

    def show(self, step: int, figures: str) -> None:
        if step == self.total:
            self.last_said = float("-inf")
        self.advance(step - self.done, figures)

    def say(self, note: str = "") -> None:
        self.last_said = time.monotonic()
        say(f"step {self.done:,} of {self.total:,}: {note}")
