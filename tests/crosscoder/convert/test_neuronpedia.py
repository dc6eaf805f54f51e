"""The dashboard's latents as SAEDashboard's JSON, read back by its own classes where they are installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_activations import D_MODEL

from crosscoder.analysis.findings import find
from crosscoder.analysis.lens import Unembedding
from crosscoder.convert import neuronpedia
from crosscoder.convert.neuronpedia import write_neuronpedia
from crosscoder.dashboard.builder import build_dashboard
from crosscoder.dashboard.records import Dashboard, DashboardConfig
from crosscoder.dashboard.summary import summary_of
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.opening import OpenedCrosscoder
from finqa.models import students
from finqa.runtime.errors import UserError

N_LATENTS, DEAD = 8, 5
CONFIG = DashboardConfig(n_strongest=3, n_per_band=2)
FEATURE = {
    *("feature_index", "frac_nonzero", "neg_str", "neg_values", "pos_str", "pos_values", "vector", "dataset"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights", "decoder_weights_dist", "activations"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt"),
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *(f"correlated_{of}_{by}" for of in ("neurons", "features") for by in ("indices", "l1", "pearson")),
}
"""Fields of SAEDashboard's NeuronpediaDashboardFeature."""
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


@pytest.fixture
def reading(store, tiny_student) -> OpenedCrosscoder:
    """An untrained crosscoder of eight latents, one of them dead."""
    tokenizer = students.load_tokenizer(str(tiny_student))
    store.token_id = store.token_id % len(tokenizer)
    store.config = replace(store.config, recorded={"model": "a/base", "layer": 3, "site": "mlp", "dataset": "FinQA"})
    generator = torch.Generator().manual_seed(1)
    model = new_dictionary(CrosscoderConfig(D_MODEL, N_LATENTS, 2), generator=generator)
    model.activation_scales = store.config.activation_scales
    model.W_dec.data[:, 1] *= 2
    model.threshold = 0.05
    model.b_enc.data[DEAD] = -1e6
    unembedding = Unembedding(torch.rand(D_MODEL), torch.randn(len(tokenizer), D_MODEL, generator=generator))
    return OpenedCrosscoder("made-up", model, store, store.split(0.1, 0), tokenizer, unembedding, Path("results"))


@pytest.fixture
def dashboard(reading) -> Dashboard:
    found = find(reading)
    return build_dashboard(reading, found.statistics, found.rows, summary_of(found), CONFIG)


@pytest.fixture
def batches(reading, dashboard, tmp_path: Path, monkeypatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(neuronpedia, "FEATURES_IN_BATCH", 4)
    assert write_neuronpedia(reading, dashboard, CONFIG, tmp_path / "out") == N_LATENTS - 1
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("batch-*.json"))]


def test_every_latent_that_fires_is_in_some_batch_with_all_fields(batches):
    assert [len(batch["features"]) for batch in batches] == [4, 3]
    assert [batch["layer"] for batch in batches] == [2, 2], "counted from 0"
    assert {batch["model_id"] for batch in batches} == {"base"}
    features = [feature for batch in batches for feature in batch["features"]]
    assert sorted(feature["feature_index"] for feature in features) == [i for i in range(N_LATENTS) if i != DEAD]
    for feature in features:
        assert feature.keys() == FEATURE
        assert all(activation.keys() == ACTIVATION for activation in feature["activations"])


def test_the_real_classes_read_a_batch_and_say_the_same(batches):
    real = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    for batch in batches:
        assert real.NeuronpediaDashboardBatch(**batch).to_dict() == batch


@torch.no_grad()
def test_figures_are_the_dictionarys_own(reading, batches):
    store, model = reading.store, reading.model
    f = model.encode(model.scale(store.read(torch.arange(len(store)))))
    vectors = model.raw_decoder()[:, 1]
    for feature in batches[0]["features"]:
        j = feature["feature_index"]
        assert feature["frac_nonzero"] == pytest.approx((f[:, j] > 0).float().mean().item(), rel=1e-4)
        assert feature["vector"] == pytest.approx(vectors[j].tolist(), rel=1e-4)
        assert sum(feature["freq_hist_data_bar_heights"]) == int((f[:, j] > 0).sum())
        logits = reading.unembedding.weight @ (reading.unembedding.norm_weight * vectors[j])
        assert feature["pos_values"] == pytest.approx(logits.topk(10).values.tolist(), rel=1e-4)
        assert feature["neg_values"] == pytest.approx(logits.sort().values[:10].tolist(), rel=1e-4)
        assert sum(feature["logits_hist_data_bar_heights"]) == len(logits)
        strongest, *others = feature["activations"]
        assert (strongest["bin_min"], strongest["bin_max"], strongest["bin_contains"]) == (-1, 99, -1)
        assert len(strongest["tokens"]) == len(strongest["values"]) <= feature["n_tokens_in_prompt"]
        assert strongest["values"][strongest["qualifying_token_index"]] == pytest.approx(f[:, j].max().item(), rel=1e-4)
        assert any(0 < one["bin_min"] <= max(one["values"]) and one["bin_contains"] == 0.25 for one in others)


def test_batches_of_another_run_are_not_mixed_with(reading, dashboard, batches, tmp_path):
    with pytest.raises(UserError, match="has batches already, which would be mixed with these; give another --out"):
        write_neuronpedia(reading, dashboard, CONFIG, tmp_path / "out")


def test_without_examples_there_is_nothing_to_write(reading, dashboard, tmp_path):
    bare = replace(dashboard, pages=tuple(replace(page, examples=None) for page in dashboard.pages))
    with pytest.raises(UserError, match="no latent has examples; raise --examples-for"):
        write_neuronpedia(reading, bare, CONFIG, tmp_path)
