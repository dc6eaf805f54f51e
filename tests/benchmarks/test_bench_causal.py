"""The benchmark of patches runs every way in small, on the CPU, and records its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finqa.runtime.paths import REPOSITORY


@pytest.mark.slow
def test_a_small_run_times_every_way_and_records_it(tmp_path: Path):
    flags = ["--small", "--documents", "2", "--new-tokens", "3", "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.bench_causal", *flags]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout
    record = json.loads((tmp_path / "causal.json").read_text())
    assert (record["layers"], record["layer"], record["latents"], record["documents"]) == (4, 2, 128, 2)
    assert record["patches"] == 2 + 2 * 8 + 1 and record["mean_active_latents"] == pytest.approx(16, abs=0.1)
    assert record["nats_from_whole_models"]["largest_difference"] < 1e-5
    assert len(record["ways"]) == 6 + 7 and all(way["value"] > 0 for way in record["ways"].values())
    assert "| generation, base steered" in printed and "| ceilings" in printed
