"""The benchmarks of the step, of the defaults and of the whole diff, in small: what they measure is recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import bench_crosscoder, bench_diff
from crosscoder.activations.store import ActivationStore
from study.planted import bench_defaults


def recorded(module: ModuleType, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict:
    """What a benchmark writes when it is started with these words."""
    monkeypatch.setattr(sys, "argv", [name, *words, "--output-dir", str(folder)])
    module.main()
    assert (folder / f"{name}.md").read_text().startswith(f"# {name}")
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_every_way_of_a_step_has_a_time_or_the_reason_why_not(tmp_path: Path, monkeypatch):
    words = ("--cpu", "--latents", "64", "128", "--steps", "8", "--ev-steps", "4", "--tokens", "2560")
    record = recorded(bench_crosscoder, "crosscoder_step", tmp_path, monkeypatch, *words)
    assert set(record["steps"]) == {"64", "128"}
    of = record["steps"]["64"]
    assert set(of) == {"floor", *bench_crosscoder.OURS, *bench_crosscoder.OTHERS}
    assert of["floor"]["both"] == pytest.approx(of["floor"]["products"] + of["floor"]["adam"])
    for way in (bench_crosscoder.AUTOGRAD, bench_crosscoder.PLAIN):
        assert of[way]["ms"] > 0 and of[way]["steps"] == 2
    assert "no step by hand for the device cpu" in of[bench_crosscoder.BY_HAND]
    explained = record["explained_variance"]
    assert explained["autograd, bf16"]["instruct"] == pytest.approx(explained["autograd, fp32"]["instruct"], abs=0.05)
    assert bench_crosscoder.FROM_MEMORY not in record["steps"]["128"]


@pytest.mark.slow
def test_the_defaults_stand_beside_the_published_settings(store: ActivationStore, tmp_path: Path, monkeypatch):
    words = (str(store.folder), "--ways", "batchtopk", "partition", "difference-sae", "published, sized")
    record = recorded(bench_defaults, "defaults", tmp_path, monkeypatch, *words, "--set", "epochs=2.0")
    assert list(record["outcomes"]) == list(words[2:])
    ours, published = record["outcomes"]["batchtopk"], record["outcomes"]["published, sized"]
    assert ours["crosscoder"]["n_latents"] == published["crosscoder"]["n_latents"]
    assert (published["training"]["seed"], published["training"]["decoder_norm"]) == (49, 0.08)
    assert {of["training"]["epochs"] for of in record["outcomes"].values()} == {2.0}
    assert record["outcomes"]["difference-sae"]["report"]["classes"] is None


@pytest.mark.slow
def test_the_whole_diff_is_timed_stage_by_stage(tmp_path: Path, monkeypatch):
    words = ("--small", "--documents", "12", "--mean-tokens", "60", "--device", "cpu")
    record = recorded(bench_diff, "diff", tmp_path, monkeypatch, *words)
    assert set(record["seconds"]) == {"make the model", *bench_diff.STAGES}
    assert record["total_s"] == pytest.approx(sum(record["seconds"][stage] for stage in bench_diff.STAGES), abs=0.01)
    assert record["crosscoder"]["d_model"] == 64
    assert record["held_out"]["n_tokens"] > 0
