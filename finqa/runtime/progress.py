"""How far a long stage is: a plain line now and then under nohup, one line that is rewritten in a terminal."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

PLAIN_EVERY_S = 15.0
TERMINAL_EVERY_S = 0.2
STEPS_EVERY_S = 10.0


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
        self.out.write(f"\r\033[K{line}" if self.terminal else f"{line}\n")
        self.out.flush()

    def close(self) -> None:
        """Clear the terminal's line; the summary of the stage follows."""
        if self.terminal:
            self.out.write("\r\033[K")
            self.out.flush()


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
            print(f"step {step} of {self._total}: {figures}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
