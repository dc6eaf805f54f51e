"""The benchmark of merging holds two ways against each other that give the same bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import benchmarks.bench_merge as bench


@pytest.mark.slow
def test_both_ways_write_the_same_bytes_and_a_way_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    words = ["bench", "--small", "--layers", "2", "--rank", "8", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    ways = json.loads((tmp_path / "merge.json").read_text())["layers"]["2"]
    assert ways[bench.PROJECT]["files"] == ways[bench.PLAIN]["files"] != []
    assert all(ways[way]["peak_bytes"] > 2 * ways["parameters"] for way in (bench.PROJECT, bench.PLAIN))
    assert [line.split("|")[-2].strip() for line in capsys.readouterr().out.splitlines()[-2:]] == ["yes", "yes"]

    monkeypatch.setattr(bench, "free_memory", lambda device: 3.0 * ways["parameters"])
    bench.main()
    ways = json.loads((tmp_path / "merge.json").read_text())["layers"]["2"]
    assert bench.PROJECT in ways and bench.PLAIN not in ways
    assert "does not fit" in (tmp_path / "merge.md").read_text()
