"""Commands that run beside each other on the GPUs of one machine, each with a log; a killed run goes on.

A job starts when the jobs before it are done and a GPU has the memory that it asks for. What was done by the same
command is not done again. A job that fails is tried once more (two engines that start on one GPU can disturb each
other); if it fails again, what needs it is left out, the others go on, and the end says so.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from finqa.errors import UserError
from mini.commands import last_line, run_into

TRIES = 2
PAUSE_S = 5.0
"""Before a job is tried again."""
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


@dataclass
class Gpu:
    """A GPU, or the machine itself where there is none."""

    number: int | None
    gb: float
    jobs: list[Job] = field(default_factory=list)

    def takes(self, job: Job) -> bool:
        """A job that asks for more than the whole GPU runs alone on it."""
        return not self.jobs or sum(one.gb for one in [*self.jobs, job]) <= self.gb


def gpus_of_this_machine() -> list[Gpu]:
    """Every GPU that nvidia-smi names; without one, the machine as a whole, which takes a job at a time."""
    query = ["nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    found = [line.split(",") for line in lines]
    # A twentieth is left for what the driver and every process take beside what they ask for.
    return [Gpu(int(number), 0.95 * float(mib) * 2**20 / 1e9) for number, mib in found] or [Gpu(None, 0.0)]


def run_jobs(jobs: Sequence[Job], logs: Path, gpus: Sequence[Gpu]) -> None:
    """Run what is not done yet; a line at the start and the end of each job.

    Raises UserError at the end where a job failed twice.
    """
    waiting = [job for job in jobs if not is_done(job, logs)]
    done = {job.name for job in jobs} - {job.name for job in waiting}
    if done:
        print(f"{len(done)} of {len(jobs)} jobs are done already", flush=True)
    failed: dict[str, str] = {}
    running: dict[Future[float], tuple[Job, Gpu]] = {}
    with ThreadPoolExecutor(max_workers=len(jobs) or 1) as pool:
        while waiting or running:
            for job in [one for one in waiting if done.issuperset(one.after)]:
                gpu = next(
                    (one for one in sorted(gpus, key=lambda g: sum(j.gb for j in g.jobs)) if one.takes(job)), None
                )
                if gpu is not None:
                    waiting.remove(job)
                    gpu.jobs.append(job)
                    running[pool.submit(run_job, job, logs, gpu)] = (job, gpu)
                    print(f"{job.name}: started", flush=True)
            if not running:
                break
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                job, gpu = running.pop(ended)
                gpu.jobs.remove(job)
                try:
                    print(f"{job.name}: {ended.result():.0f} s; {last_line(logs / f'{job.name}.log')}", flush=True)
                    done.add(job.name)
                except UserError as error:
                    failed[job.name] = str(error)
                    print(f"{job.name}: failed", flush=True)
    if failed:
        left_out = [job.name for job in waiting]
        raise UserError("\n\n".join(failed.values()) + (f"\n\nleft out: {', '.join(left_out)}" if left_out else ""))


def run_job(job: Job, logs: Path, gpu: Gpu) -> float:
    """Run a job's command on a GPU; returns its seconds. Raises UserError where it fails each time."""
    command = job.command.replace(SHARE, f"{min(0.9, job.gb / gpu.gb):.3f}" if gpu.gb else "0.9")
    environment = {} if gpu.number is None else {"CUDA_VISIBLE_DEVICES": str(gpu.number)}
    for tries in range(TRIES):
        try:
            seconds = run_into(logs / f"{job.name}.log", job.name, command, environment=environment)
        except UserError:
            if tries + 1 == TRIES:
                raise
            time.sleep(PAUSE_S)
        else:
            (logs / f"{job.name}.done").write_text(job.command)
            return seconds
    raise AssertionError("unreachable")


def is_done(job: Job, logs: Path) -> bool:
    """Whether the very command of a job has been run to its end."""
    path = logs / f"{job.name}.done"
    return path.exists() and path.read_text() == job.command
