"""Where a training run's figures go: a JSONL file, a progress line or bar, and a wandb run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from finqa.runtime.journal import Journal
from finqa.runtime.paths import json_line
from finqa.runtime.progress import StepProgress


class StepRecord(NamedTuple):
    """What a logged step looked like; every figure is of that step's batch."""

    step: int
    """Counted from 1."""
    tokens: int
    """Read so far."""
    loss: float
    reconstruction: float
    auxiliary: float
    explained_variance: tuple[float, ...]
    """Explained variance of the instruct and the fine-tuned model, or of their difference alone, on the training batch
    (losses.batch_explained_variance)."""
    explained_variance_published: tuple[float, ...]
    """The published run's figure (losses.published_explained_variance)."""
    dead_share: float
    """Latents not selected for a window of tokens."""
    never_positive_share: float
    drawn_anew: int
    """Latents re-initialised so far."""
    threshold: float | None
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    l0: float = 0.0
    """Mean active latents a token."""
    explained_variance_of_difference: float | None = None
    """Explained variance of fine-tuned less instruct, in the models' own units; None for the SAEs, of one input."""
    difference: float = 0.0
    """The difference term and the L1 penalty, before their weights; 0 where they are off."""
    l1: float = 0.0
    stage: int | None = None
    """The model that a stagewise SAE reads at this step, whose the explained variance then is; None for others."""


class RunLog:
    """Context manager that takes step records: one JSON line each, and a line or bar of progress.

    A resumed run logs some steps again; the file keeps the latest record of a step and is in the order of steps.
    """

    def __init__(self, path: Path):
        self.wandb_run: Any = None
        """Where records go besides the file (finqa.runtime.tracking.wandb_run); None is nowhere."""
        self._path = path
        self.records = Journal(path).read().records
        """All records of the run, those before an interruption included."""
        self._mended = False
        self._started = time.monotonic()
        self._first_tokens: int | None = None
        self.tokens_per_second = 0.0
        """From the first record of this start of the run to the last one."""
        self._progress: StepProgress | None = None

    def start_progress(self, total_steps: int) -> None:
        """Begin to show progress: a bar in a terminal, else a line now and then."""
        self._started = time.monotonic()
        self._progress = StepProgress(total_steps)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()

    @property
    def seconds(self) -> float:
        """Since the log was opened: the time of this start of the run."""
        return time.monotonic() - self._started

    def add(self, record: StepRecord) -> None:
        """Take one record."""
        values = record._asdict()
        before = [old for old in self.records if old["step"] < record.step]
        lost = len(before) < len(self.records) or not self._mended
        self.records, self._mended = [*before, values], True
        if lost:
            Journal(self._path).rewrite(self.records)
        else:
            with self._path.open("a") as file:
                file.write(json_line(values))
        if self.wandb_run is not None:
            self.wandb_run.log(_flat(values), step=record.step)
        if self._first_tokens is None:
            self._first_tokens, self._started, speed = record.tokens, time.monotonic(), None
        else:
            speed = self.tokens_per_second = (record.tokens - self._first_tokens) / max(self.seconds, 1e-9)
        if self._progress is not None:
            self._progress.show(record.step, progress_line(record, speed))


def progress_line(record: StepRecord, tokens_per_second: float | None) -> str:
    """Loss, explained variance (of both models, or of their difference), dead share and speed of a logged step."""
    explained = " and ".join(f"{value:.4f}" for value in record.explained_variance)
    speed = "" if tokens_per_second is None else f", {tokens_per_second:,.0f} tokens/s"
    return (
        f"loss {record.loss:.4g}, explained variance {explained}, L0 {record.l0:.1f}, "
        f"dead {record.dead_share:.1%}{speed}"
    )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """A record with one entry a number: what was measured of each input is named after it."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            of: tuple[str, ...] = ("instruct", "fine_tuned")
            if len(value) == 1:
                of = ("difference",) if values["stage"] is None else (of[values["stage"]],)
            flat |= {f"{name}/{part}": number for part, number in zip(of, value, strict=True)}
        else:
            flat[name] = value
    return flat
