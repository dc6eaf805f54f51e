"""Explained variance by its definition in float64, decoder norms and classes, and the counts of one pass."""

from __future__ import annotations

import math

import pytest
import torch

from crosscoder.analysis import measures as analysis
from crosscoder.analysis.statistics import latent_statistics
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.model import BatchTopKCrosscoder


def crosscoder(d_model: int = 12, n_latents: int = 9) -> BatchTopKCrosscoder:
    generator = torch.Generator().manual_seed(5)
    model = BatchTopKCrosscoder(CrosscoderConfig(d_model, n_latents, 3), generator=generator)
    model.b_dec.data = torch.randn(2, d_model, generator=generator)
    model.W_dec.data[:, 1] += 0.3 * torch.randn(n_latents, d_model, generator=generator)
    model.threshold = 1.0
    model.activation_scales = (1.7, 0.6)
    return model


def test_explained_variance_is_one_ratio_of_sums_over_all_tokens(store):
    model = crosscoder()
    raw = store.read(torch.arange(len(store)))
    result = analysis.explained_variance(model, raw.split(300))
    exact = crosscoder().double()
    x = exact.scale(raw)
    f = exact.encode(x).detach()
    error, centred = (x - exact.decode(f).detach()), x - x.mean(dim=0)
    numerators, denominators = error.pow(2).sum((0, 2)), centred.pow(2).sum((0, 2))
    per_model = (1 - numerators / denominators).tolist()
    assert (result.instruct, result.fine_tuned) == pytest.approx(per_model, rel=1e-6)
    assert result.joint == pytest.approx(float(1 - numerators.sum() / denominators.sum()), rel=1e-6)
    assert result.l0 == pytest.approx(float((f > 0).double().sum(dim=-1).mean()))
    assert result.n_tokens == len(store)


def test_the_difference_is_explained_in_the_models_own_units(store):
    model = crosscoder()
    raw = store.read(torch.arange(len(store)))
    result = analysis.explained_variance(model, raw.split(300))
    exact = crosscoder().double()
    xhat = exact(exact.scale(raw)).detach() / torch.tensor([1.7, 0.6], dtype=torch.float64)[:, None]
    wanted, got = raw.double()[:, 1] - raw.double()[:, 0], xhat[:, 1] - xhat[:, 0]
    expected = 1 - (wanted - got).pow(2).sum() / (wanted - wanted.mean(dim=0)).pow(2).sum()
    assert result.difference == pytest.approx(float(expected), rel=1e-6)


def test_a_reconstruction_that_ignores_the_difference_explains_none_of_it():
    """Both models get the same vector, their mean: well explained each, the difference not at all."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(500, 1, 6, generator=generator)
    own = 0.1 * torch.randn(500, 2, 6, generator=generator)
    own -= own.mean(dim=0)

    class MeanOfBoth(BatchTopKCrosscoder):
        def encode(self, x):
            return x.mean(dim=1)

        def decode(self, f):
            return f[:, None].repeat(1, 2, 1)

    result = analysis.explained_variance(MeanOfBoth(CrosscoderConfig(6, 6, 3)), [shared + own])
    assert min(result.instruct, result.fine_tuned) > 0.98
    assert result.difference == pytest.approx(0, abs=1e-6)


def test_the_mean_activation_may_be_large_without_losing_the_variance():
    generator = torch.Generator().manual_seed(0)
    raw = 1e3 + torch.randn(4000, 2, 8, generator=generator)
    model = BatchTopKCrosscoder(CrosscoderConfig(8, 4, 2))
    model.threshold = math.inf
    model.b_dec.data = raw[:, :].mean(dim=0)
    result = analysis.explained_variance(model, raw.split(1000))
    assert result.instruct == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("norms", "relative", "delta", "kind"),
    [
        ((1.0, 1.0), 0.5, 0.5, "shared"),
        ((1.0, 0.0), 0.0, 0.0, "instruct-only"),
        ((0.0, 2.0), 1.0, 1.0, "fine-tuned-only"),
        ((1.0, 4.0), 0.8, 0.875, "between"),
        ((1.0, 5.1), 5.1 / 6.1, 1 - 0.5 / 5.1, "fine-tuned-only"),
        ((5.1, 1.0), 1 / 6.1, 0.5 / 5.1, "instruct-only"),
        ((1.0, 0.9), 0.9 / 1.9, 0.45, "shared"),
    ],
)
def test_classes_by_delta(norms, relative, delta, kind):
    pair = torch.tensor([norms])
    assert analysis.relative_decoder_norm(pair).item() == pytest.approx(relative)
    assert analysis.delta(pair).item() == pytest.approx(delta)
    assert analysis.classify(analysis.delta(pair)) == [kind]


@pytest.mark.parametrize("norms", [(1.0, 0.2), (1.0, 0.7), (1.0, 1.0), (0.3, 1.0), (0.1, 1.0)])
def test_a_bound_on_delta_is_drawn_at_its_relative_norm(norms):
    pair = torch.tensor([norms], dtype=torch.float64)
    at = analysis.relative_norm_at(analysis.delta(pair).item())
    assert at == pytest.approx(analysis.relative_decoder_norm(pair).item())


def test_the_bound_of_fine_tuned_only_latents_is_five_sixths():
    assert analysis.relative_norm_at(0.9) == pytest.approx(5 / 6)


def test_decoder_norms_are_taken_in_the_models_own_units():
    model = crosscoder()
    expected = [[model.W_dec[j, m].norm().item() / (1.7, 0.6)[m] for m in range(2)] for j in range(9)]
    assert torch.allclose(analysis.decoder_norms(model), torch.tensor(expected))


def test_cosines_compare_the_two_vectors_of_one_latent():
    model = crosscoder()
    a, b = model.W_dec.detach()[3]
    assert analysis.decoder_cosines(model)[3].item() == pytest.approx(float(a @ b / a.norm() / b.norm()))


def test_one_pass_counts_what_each_latent_does(store):
    model = crosscoder()
    indices = torch.arange(300, 1700)
    statistics = latent_statistics(model, store, indices, n_top=5, batch_size=256)
    with torch.no_grad():
        f = model.encode(model.scale(store.read(indices)))
        positive = model.activations(model.scale(store.read(indices))) > 0
    assert statistics.n_firings.tolist() == (f > 0).sum(dim=0).tolist()
    assert statistics.n_positive.tolist() == positive.sum(dim=0).tolist()
    in_program = store.is_completion()[indices]
    assert statistics.n_completion_firings.tolist() == (f[in_program] > 0).sum(dim=0).tolist()
    for j in range(9):
        best = f[:, j].topk(5)
        assert torch.allclose(statistics.top_values[j], best.values)
        alive = best.values > 0
        assert statistics.top_tokens[j][alive].tolist() == indices[best.indices][alive].tolist()
        assert (statistics.top_tokens[j][~alive] == -1).all()
        active = f[:, j][f[:, j] > 0]
        expected = active.double().mean().item() if len(active) else 0.0
        assert statistics.mean_activation[j].item() == pytest.approx(expected)


def test_a_latent_that_is_never_active_is_dead(store):
    model = crosscoder()
    model.b_enc.data[4] = -1e6
    statistics = latent_statistics(model, store, torch.arange(len(store)))
    assert statistics.dead[4]
    assert statistics.n_positive[4] == 0
    assert statistics.frequency[4] == 0
