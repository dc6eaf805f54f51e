"""The benchmark of the sandbox runs every way on the same programs, and refuses a way that answers otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_sandbox import INTERPRETER, LIMITS, ONE, TWO, measure
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY


def test_a_small_run_times_every_way_and_records_it(tmp_path: Path):
    flags = ["--rows", "6", "--repeats", "2", "--interpreters", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.bench_sandbox", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    record = json.loads((tmp_path / "sandbox.json").read_text())
    assert record["n_programs"] == 6
    assert set(record["ms_a_program"]) == {INTERPRETER, LIMITS, ONE, TWO}
    for ms in record["ms_a_program"].values():
        assert ms["repeats"] == 2
        assert 0 < ms["lowest"] <= ms["median"] <= ms["highest"]
    assert all(f"| {name}" in done.stdout for name in record["ms_a_program"])


def test_a_way_that_gives_other_answers_is_refused():
    ways = {name: (lambda codes: [1.0] * len(codes)) for name in (INTERPRETER, LIMITS, ONE, TWO)}
    measure(ways, ["ans = 1"] * 3, repeats=1, interpreters=2)
    ways[LIMITS] = lambda codes: [2.0] * len(codes)
    with pytest.raises(UserError, match=f"{LIMITS}: other answers"):
        measure(ways, ["ans = 1"] * 3, repeats=1, interpreters=2)
