"""Steps that can be killed and started again, and the commands that they run.

A step writes its results under a temporary name and renames them, so what is there is whole. It prints one line: what
it is, how long it took, its main figure.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from finqa.runtime.commands import run_into
from finqa.runtime.paths import REPOSITORY, Folders
from study.pocket.plan import SHIPPED_KINDS, Plan


@dataclass(frozen=True)
class Work:
    """Where one length of the study keeps what it makes."""

    plan: Plan
    given: Folders
    """What the user gave; a fine-tune that is there with the same settings is taken from it."""
    output: Path
    """Tables and figures."""

    @property
    def folders(self) -> Folders:
        """Data and results folder of the study's own: its test split has more families than the shipped one."""
        return Folders(self.given.data / self.plan.name, self.given.results / self.plan.name)

    def rows_folders(self, kinds: str) -> Folders:
        """Where the training rows of these kinds of family are."""
        own = self.folders
        return own if kinds == SHIPPED_KINDS else Folders(own.data / kinds.replace(",", "-"), own.results)

    def log(self, name: str) -> Path:
        return self.folders.results / "logs" / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.log"

    def dictionary(self, name: str) -> Path:
        return self.folders.data / "models" / "crosscoders" / name

    def measure(self, name: str) -> Path:
        """The measures of one dictionary, a JSON file a measure."""
        return self.folders.results / "measures" / name


@contextmanager
def step(name: str) -> Iterator[Callable[[str], None]]:
    """Print a step's line; the block says the main figure by calling what it is given."""
    print(f"{name:<44}", end="", flush=True)
    started = time.perf_counter()
    said: list[str] = []
    try:
        yield said.append
    except BaseException:
        print(f"{time.perf_counter() - started:6.0f} s  not done", flush=True)
        raise
    print(f"{time.perf_counter() - started:6.0f} s  {said[-1] if said else ''}", flush=True)


def run(work: Work, name: str, command: str, folder: Path = REPOSITORY) -> Path:
    """Run a command of the project with this Python, its output in the log of this name; returns the log.

    Raises UserError with the end of the log where it fails.
    """
    log = work.log(name)
    run_into(log, name, command, folder)
    return log


def in_parallel(
    work: Work,
    what: str,
    job: Callable[[Work, Any], dict[str, Any]],
    over: Sequence[Any],
    figure: Callable[[dict[str, Any]], str],
) -> None:
    """Run `job` on everything of `over`, each with a `name`; a line for each that is done, as they end."""
    if min(n_workers(), len(over)) <= 1:
        for one in over:
            with step(f"{what}: {one.name}") as say:
                say(figure(job(work, one)))
        return
    pool = _pool()
    running = {pool.submit(job, work, one): one for one in over}
    try:
        for done in as_completed(running):
            found = done.result()
            line = f"{what}: {running[done].name}"
            print(f"{line:<44}{found['seconds']:6.0f} s  {figure(found)}", flush=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _pool.cache_clear()
        raise


@lru_cache
def _pool() -> ProcessPoolExecutor:
    """One pool for all steps: its processes import torch once, not once a step."""
    return ProcessPoolExecutor(n_workers(), get_context("spawn"), _one_thread)


def n_workers() -> int:
    """Processes that work at once: the cores this one may use, or one where a GPU does the work."""
    import torch

    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that this process runs


def folder_flags(folders: Folders) -> str:
    return f"--data-dir {shlex.quote(str(folders.data))} --results-dir {shlex.quote(str(folders.results))}"


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
