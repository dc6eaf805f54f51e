"""What an analysis needs is what its stages hold, and it is said before anything is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_memory import Live

from benchmarks.parts.record import RESULTS
from crosscoder.analysis import findings
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.findings import analysis_need, plan_analysis
from crosscoder.analysis.latent_scaling import latent_scaling
from crosscoder.analysis.lens import Unembedding, promoted_tokens
from crosscoder.analysis.statistics import latent_statistics
from crosscoder.analysis.token_kinds import KINDS
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.opening import AnalysisConfig
from finqa.runtime.errors import UserError


class Batches:
    """Three batches of random activations."""

    def __init__(self, batch: int, d_model: int) -> None:
        self.raw = torch.randn(3 * batch, 2, d_model).bfloat16()

    def is_completion(self) -> torch.Tensor:
        return torch.zeros(len(self.raw), dtype=torch.bool)

    def batches(self, indices: torch.Tensor, size: int, what: str = "") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((chunk, self.raw[chunk]) for chunk in indices.split(size))


@pytest.mark.parametrize(
    ("method", "d_model", "n_latents", "batch", "n_tokens"),
    [
        ("batchtopk", 64, 2048, 256, 100), ("batchtopk", 16, 4096, 256, 100), ("batchtopk", 1024, 512, 64, 100),
        ("batchtopk", 256, 256, 512, 100), ("batchtopk", 256, 1024, 32, 16_000), ("difference-sae", 64, 1024, 256, 100),
        ("stagewise-sae", 64, 1024, 256, 100), ("stagewise-sae", 256, 512, 128, 100),
    ],
)  # fmt: skip
@torch.no_grad()
def test_an_analysis_is_planned_within_a_quarter_of_what_is_alive(
    method: Any, d_model: int, n_latents: int, batch: int, n_tokens: int
):
    config = CrosscoderConfig(d_model, n_latents, 8, method=method)
    model = new_dictionary(config)
    model.activation_scales = (1.0, 1.0)[: config.n_inputs]
    model.threshold, model.further_thresholds = 0.5, (0.5,) * (method == "stagewise-sae")
    store: Any = Batches(batch, d_model)
    every = torch.arange(3 * batch)
    kinds = torch.zeros(3 * batch, dtype=torch.int64)
    unembedding = Unembedding(torch.ones(d_model), torch.randn(n_tokens, d_model))

    def statistics() -> None:
        latent_statistics(model, store, every, batch_size=batch, kinds=kinds)

    def variance() -> None:
        sums = analysis.VarianceSums(model, len(KINDS))
        for chunk, raw in store.batches(every, batch):
            sums.add(raw, kinds[chunk])

    def scaling() -> None:
        latent_scaling(model, (raw for _, raw in store.batches(every, batch)))

    def lens() -> None:
        for directions in analysis.decoder_directions(model).values():
            promoted_tokens(directions, unembedding, 10)

    peaks = []
    for stage in (statistics, variance, lens, *([scaling] if config.compares_models else [])):
        with Live([*model.parameters(), store.raw]) as live:
            stage()
        peaks.append(live.peak)
    assert 1 <= analysis_need(config, batch, n_tokens, on_gpu=False).total / max(peaks) <= 1.25


def test_the_plan_of_an_analysis_is_what_was_measured_on_a_gpu_and_at_most_a_quarter_more():
    """The record's stage computes no logit lens, and the dictionary and the set were on the GPU by then."""
    record = json.loads((RESULTS / "diff.json").read_text())
    shape = CrosscoderConfig(**record["crosscoder"])
    held = 4 * sum(p.numel() for p in new_dictionary(shape).parameters()) + 1e9 * record["peak_gb"]["open the set"]
    taken = 1e9 * record["peak_gb"]["analyse"] - held
    assert 1.0 <= analysis_need(shape, AnalysisConfig().batch_size, 0, on_gpu=True).total / taken <= 1.25


def test_an_analysis_that_does_not_fit_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    model = new_dictionary(CrosscoderConfig(64, 1024, 8))
    opened: Any = SimpleNamespace(model=model, unembedding=Unembedding(torch.ones(64), torch.zeros(100, 64)))
    monkeypatch.setattr(findings, "free_memory", lambda device: 1e9)
    plan_analysis(opened, AnalysisConfig())
    printed = capsys.readouterr().out
    assert "plan: analysis needs 97 MB; 1.0 GB are free in the machine's memory" in printed
    assert "4,096 tokens x 1,024 latents" in printed
    monkeypatch.setattr(findings, "free_memory", lambda device: 9e7)
    with pytest.raises(UserError, match="analysis needs 97 MB of memory and 90 MB are free; use a machine with more"):
        plan_analysis(opened, AnalysisConfig())
