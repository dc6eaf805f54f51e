"""The benchmark of reading runs every pass in small, on the CPU, and records its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.bench_reading import SMALL, made_up, mean_active, passes_of
from crosscoder.analysis.latent_scaling import LatentScaling
from crosscoder.analysis.statistics import LatentStatistics
from finqa.runtime.paths import REPOSITORY

PASSES = [
    "reading",
    "encoder product",
    "encode",
    "statistics",
    "explained variance",
    "by kind",
    "latent scaling",
    "everything",
]


@pytest.mark.slow
def test_a_small_run_times_every_pass_and_records_it(tmp_path: Path):
    flags = ["--small", "--device", "cpu", "--tokens", "1500", "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.bench_reading", *flags]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout
    record = json.loads((tmp_path / "reading.json").read_text())
    assert (record["settings"]["d_model"], record["settings"]["tokens"]) == (SMALL["d_model"], 1500)
    assert list(record["seconds"]) == PASSES
    for times in record["seconds"].values():
        assert times["repeats"] == SMALL["repeats"] and 0 < times["lowest"] <= times["highest"]
    assert record["over_encoder_product"]["encoder product"] == 1
    assert all(f"| {name}" in printed for name in PASSES)
    assert "latent scaling" in (tmp_path / "reading.md").read_text()


def test_the_passes_are_those_of_a_dictionary_with_k_active_latents_over_every_token():
    args = Namespace(**SMALL | {"device": "cpu", "tokens": 1000})
    model, store = made_up(args)
    assert mean_active(model, store, args) == pytest.approx(args.k, rel=0.01)
    passes = passes_of(model, store, args)
    assert list(passes) == PASSES
    statistics, scaling = passes["statistics"](), passes["latent scaling"]()
    assert isinstance(statistics, LatentStatistics) and statistics.n_tokens == 1000
    assert statistics.template_share is not None
    assert isinstance(scaling, LatentScaling)
    # Both have seen every firing.
    assert torch.equal(scaling.n, statistics.n_firings) and int(scaling.n.sum()) > 900 * args.k / 2
