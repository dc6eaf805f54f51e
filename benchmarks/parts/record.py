"""What every benchmark keeps: on which machine, from which code, by which command, and the figures.

    record = {"n_programs": 800, "seconds": summary([1.31, 1.28, 1.35])}
    table = markdown_table(("way", "ms a program"), [("everything on", "1.6")])
    write_record("sandbox", record, table)         # benchmarks/results/sandbox.json and sandbox.md

Absolute times are worth little away from their machine: a benchmark compares things that it measured in one run.
"""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finqa.runtime.manifest import command_words, device, git_revision, package_versions, write_json
from finqa.runtime.paths import REPOSITORY, write_atomically

RESULTS = REPOSITORY / "benchmarks" / "results"


def write_record(name: str, record: Mapping[str, Any], table: str, folder: Path = RESULTS) -> Path:
    """Write `{name}.json` and, to be read, `{name}.md` into `folder`. Returns the path of the JSON file.

    Args:
        name: What was measured; the record of an earlier run under this name is replaced.
        record: The figures: settings, n, repeats, medians and spreads with their units in their names.
        table: The same in Markdown (`markdown_table`), printed by the benchmark as well.
    """
    about = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "git": git_revision(),
        "machine": machine(),
    }
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**about, **record})
    write_atomically(folder / f"{name}.md", f"# {name}\n\n{table.rstrip()}\n\n{_provenance(about)}\n")
    return path


def machine() -> dict[str, Any]:
    """The facts on which a time depends. `cores` are those that this process may use."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "device": device(),
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "load_1_min": round(os.getloadavg()[0], 2),
    }


def cpu_model() -> str:
    """The processor's name as the system gives it; the architecture where it gives none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.machine()


def command_line() -> str:
    """manifest.command_words in one line, as it is typed."""
    return shlex.join(command_words())


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Median and spread of repeated measurements, in their unit."""
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "repeats": len(values),
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, padded so that it can be read as text; all columns but the first are right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(row, widths, strict=True)) for row in (cells[0], rule, *cells[1:]))
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _provenance(about: Mapping[str, Any]) -> str:
    facts, git = about["machine"], about["git"]
    code = f"{git['revision'][:10]}{' with changes' if git['dirty'] else ''}" if git else "no git checkout"
    where = f"{facts['cpu']}, {facts['cores']} cores, {facts['device']}, {facts['system']} {facts['kernel']}"
    return f"{about['date']}, {code}, {where}, Python {facts['python']}: `{about['command']}`"
