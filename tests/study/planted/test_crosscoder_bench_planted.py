"""The benchmark of planted features, in small: it counts what it says, and records every run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from study.planted import bench_planted


def outcome(method: str, magnitude: float, seed: int, **changes) -> bench_planted.Outcome:
    values = {
        "found": 2,
        "claims": 4,
        "precise": 3,
        "confirmed": 2,
        "confirmed_found": 1,
        "found_by_any": 5,
        "explained_joint": 0.9,
        "explained_difference": 0.5,
        "l0": 4.0,
        "dead_share": 0.1,
    }
    return bench_planted.Outcome(method, magnitude, seed, **(values | changes))


def test_the_table_has_the_seeds_side_by_side_and_precision_over_all_claims():
    rows = bench_planted.table(
        [outcome("L1", 0.45, 0), outcome("L1", 0.45, 1, found=7, claims=6, precise=0), outcome("L1", 0.7, 0, claims=0)]
    ).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert cells[0] == ["L1", "0.45", "2, 7", "0.30 of 10", "1, 1", "5, 5", "0.900", "0.500", "4.0"]
    assert cells[1][2:4] == ["2", "no claim"]


def test_each_method_claims_by_its_own_reading():
    crosscoder = new_dictionary(CrosscoderConfig(4, 6, 2))
    crosscoder.W_dec.data[2, 0] *= 0.01
    assert bench_planted.claims_of(crosscoder).nonzero().flatten().tolist() == [2]
    partition = new_dictionary(CrosscoderConfig(4, 6, 2, method="partition", n_delta=2, k_delta=1))
    assert bench_planted.claims_of(partition).nonzero().flatten().tolist() == [4, 5]
    assert bool(bench_planted.claims_of(new_dictionary(CrosscoderConfig(4, 6, 2, method="difference-sae"))).all())


def test_settings_are_chosen_without_knowing_what_was_added():
    # About K active latents first, then what is explained of the difference.
    assert bench_planted.best_of([(4.1, 0.2), (4.9, 0.6), (8.9, 0.9)]) == 1
    assert bench_planted.best_of([(9.0, 0.9), (7.0, 0.1)]) == 1
    assert [kind.name for kind in bench_planted.kinds_of(None)] == ["shared"]
    for name in bench_planted.METHODS:
        tried = bench_planted.candidates(name, None)
        assert {settings["learning_rate"] for settings in tried} == set(bench_planted.RATES)
        assert {settings["k"] + settings.get("k_delta", 0) for settings in tried} == {bench_planted.K}
    assert [settings["learning_rate"] for settings in bench_planted.candidates("crosscoder", 0.5)] == [0.5]


@pytest.mark.slow
def test_a_small_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    methods = ["crosscoder", "partition", "difference SAE"]
    words = ["bench_planted", "--methods", *methods, "--seeds", "0", "--tokens", "4000", "--passes", "1", "--results"]
    monkeypatch.setattr("sys.argv", [*words, str(tmp_path)])
    bench_planted.main()
    record = json.loads((tmp_path / "planted.json").read_text())
    runs = [(run["method"], run["magnitude"]) for run in record["outcomes"]]
    assert runs == [(method, magnitude) for magnitude in (0.45, 0.7) for method in methods]
    for run in record["outcomes"]:
        assert 0 <= run["precise"] <= run["claims"] <= 192
        assert run["found"] <= run["found_by_any"] <= 8
        assert (run["confirmed"] is None) == (run["method"] != "crosscoder")
    assert torch.isfinite(torch.tensor([run["explained_difference"] for run in record["outcomes"]])).all()
    assert "| difference SAE |" in (tmp_path / "planted.md").read_text()
    assert record["settings"]["tokens"] == 4000
