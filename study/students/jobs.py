"""Commands that run beside each other on the GPUs of one machine, each with a log; a killed run goes on.

A job starts when the jobs before it are done and a GPU has the memory that it asks for. What was done by the same
command is not done again. A job that fails is tried once more (two engines that start on one GPU can disturb each
other); if it fails again, what needs it is left out, the others go on, and the end says so. A job that ends, or is
ended, leaves no process behind that would hold memory of its GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finqa.runtime.commands import failure, last_line, start_into, told_to_end
from finqa.runtime.errors import UserError

TRIES = 2
PAUSE_S = 5.0
"""Before a job is tried again."""
POLL_S = 0.2
PATIENCE_S = 20.0
"""For jobs that were told to end, before they are killed."""
SHARE = "{share}"
"""Stands in a command for the part of its GPU's memory that the job was given."""


@dataclass(frozen=True)
class Job:
    """One command of the project."""

    name: str
    command: str
    """Without `python` before it."""
    gb: float
    """Memory of a GPU that it may take, in 1e9 bytes."""
    after: tuple[str, ...] = ()
    """Names of the jobs that must be done."""


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """Which jobs of a study, and --list."""
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="beginnings of names of jobs (default: all)")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")


def print_jobs(jobs: Sequence[Job]) -> None:
    """The commands for a GPU of their own, and what must come before each."""
    for job in jobs:
        after = f" (after {', '.join(job.after)})" if job.after else ""
        print(f"{job.name}{after}\n    python {job.command.replace(SHARE, '0.9')}")


@dataclass
class Gpu:
    """A GPU, or the machine itself where there is none."""

    number: int | None
    gb: float
    jobs: list[Job] = field(default_factory=list)

    def taken(self) -> float:
        """Memory that its jobs may take, in 1e9 bytes."""
        return sum(job.gb for job in self.jobs)

    def takes(self, job: Job) -> bool:
        """A job that asks for more than the whole GPU runs alone on it."""
        return not self.jobs or self.taken() + job.gb <= self.gb


def gpus_of_this_machine() -> list[Gpu]:
    """Every GPU that nvidia-smi names, of those in CUDA_VISIBLE_DEVICES where that is set.

    Without one, the machine as a whole, which takes a job at a time.
    """
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = None if visible is None else [name.strip() for name in visible.split(",")]
    gpus = []
    for number, uuid, mib in (line.split(", ") for line in lines if line.count(", ") == 2):
        if chosen is None or number in chosen or any(name and uuid.startswith(name) for name in chosen):
            # A twentieth is left for what the driver and every process take beside what they ask for. A GPU that
            # shares the machine's memory names none ("[N/A]"): it takes a job at a time.
            gpus.append(Gpu(int(number), 0.95 * int(mib) * 2**20 / 1e9 if mib.isdigit() else 0.0))
    return gpus or [Gpu(None, 0.0)]


def run_jobs(jobs: Sequence[Job], logs: Path, gpus: Sequence[Gpu]) -> None:
    """Run what is not done yet; a line at the start and the end of each job.

    Where this process is interrupted or told to end, so is what runs, and all that that started. Raises UserError at
    the end where a job failed twice, or was never run because one that it needs is not there; and at once where
    another process runs jobs with the same logs.
    """
    with locked(logs):
        _run_jobs(jobs, logs, gpus)


def _run_jobs(jobs: Sequence[Job], logs: Path, gpus: Sequence[Gpu]) -> None:
    waiting = [job for job in jobs if not is_done(job, logs)]
    done = {job.name for job in jobs} - {job.name for job in waiting}
    if done:
        print(f"{len(done)} of {len(jobs)} jobs are done already", flush=True)
    failed: list[str] = []
    running: list[Running] = []
    with told_to_end(), ended_at_last(running):
        while waiting or running:
            for job in [one for one in waiting if done.issuperset(one.after)]:
                if gpu := next((one for one in sorted(gpus, key=Gpu.taken) if one.takes(job)), None):
                    waiting.remove(job)
                    gpu.jobs.append(job)
                    running.append(Running(job, gpu, start(job, logs, gpu)))
                    print(f"{job.name}: started", flush=True)
            if not running:
                break
            time.sleep(POLL_S)
            for one in [one for one in running if one.process.poll() is not None]:
                job, log = one.job, logs / f"{one.job.name}.log"
                send(one, signal.SIGKILL)  # to what it left behind
                if one.process.returncode and one.tries < TRIES:
                    time.sleep(PAUSE_S)
                    one.process, one.tries = start(job, logs, one.gpu), one.tries + 1
                    continue
                running.remove(one)
                one.gpu.jobs.remove(job)
                if one.process.returncode:
                    failed.append(failure(job.name, one.process.returncode, log))
                    print(f"{job.name}: failed", flush=True)
                else:
                    (logs / f"{job.name}.done").write_text(job.command)
                    done.add(job.name)
                    print(f"{job.name}: {time.monotonic() - one.started:.0f} s; {last_line(log)}", flush=True)
    if failed or waiting:
        left_out = f"left out: {', '.join(job.name for job in waiting)}" if waiting else ""
        raise UserError("\n\n".join(filter(None, [*failed, left_out])))


@dataclass
class Running:
    """A job that is under way."""

    job: Job
    gpu: Gpu
    process: subprocess.Popen[bytes]
    tries: int = 1
    started: float = field(default_factory=time.monotonic)


def start(job: Job, logs: Path, gpu: Gpu) -> subprocess.Popen[bytes]:
    """Start a job's command on a GPU."""
    command = job.command.replace(SHARE, f"{min(0.9, job.gb / gpu.gb):.3f}" if gpu.gb else "0.9")
    environment = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}  # models come from the Hub
    if gpu.number is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu.number)
        # Several jobs with a thread for every core each would wait for one another's threads.
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 8)))
    return start_into(logs / f"{job.name}.log", command, environment=environment, own_group=True)


@contextlib.contextmanager
def locked(logs: Path) -> Iterator[None]:
    """Two studies would take the memory of the same GPUs, and write to the same folders."""
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "study.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another study runs its jobs in {logs}; wait for its end, or end it") from None
        yield


@contextlib.contextmanager
def ended_at_last(running: Sequence[Running]) -> Iterator[None]:
    """At the end of the block, however it comes, jobs that still run are told to end; then they are killed."""
    try:
        yield
    finally:
        for one in running:
            send(one, signal.SIGTERM)
        until = time.monotonic() + PATIENCE_S
        try:
            while any(one.process.poll() is None for one in running) and time.monotonic() < until:
                time.sleep(POLL_S)
        finally:  # at once where this process is told to end again
            for one in running:
                send(one, signal.SIGKILL)


def send(one: Running, number: int) -> None:
    """Send a signal to a job and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, number)


def is_done(job: Job, logs: Path) -> bool:
    """Whether the very command of a job has been run to its end."""
    path = logs / f"{job.name}.done"
    return path.exists() and path.read_text() == job.command
