"""The terms of the loss and their gradients, against float64 sums written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crosscoder.dictionaries import losses

B, D = 5, 4


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, xhat = torch.randn(2, B, 2, D, generator=generator, dtype=torch.float64)
    return x, xhat.requires_grad_()


def squared_error(x: Tensor, xhat: Tensor, i: int, m: int) -> float:
    return sum((x[i, m, a].item() - xhat[i, m, a].item()) ** 2 for a in range(D))


def test_mse_sums_features_and_models_and_averages_tokens(pair):
    x, xhat = pair
    expected = sum(squared_error(x, xhat, i, m) for i in range(B) for m in range(2)) / B
    loss = losses.reconstruction_loss(x, xhat, "mse")
    assert math.isclose(loss.item(), expected)
    loss.backward()
    assert torch.allclose(xhat.grad, 2 * (xhat - x) / B)


def test_l2_averages_the_unsquared_norm_over_tokens_and_models(pair):
    x, xhat = pair
    norms = [[math.sqrt(squared_error(x, xhat, i, m)) for m in range(2)] for i in range(B)]
    loss = losses.reconstruction_loss(x, xhat, "l2")
    assert math.isclose(loss.item(), sum(map(sum, norms)) / (2 * B))
    loss.backward()
    assert torch.allclose(xhat.grad, (xhat - x) / torch.tensor(norms)[..., None] / (2 * B))


def test_l2_has_a_finite_gradient_where_the_reconstruction_is_exact():
    x = torch.ones(2, 2, D)
    xhat = x.clone().requires_grad_()
    losses.reconstruction_loss(x, xhat, "l2").backward()
    assert xhat.grad is not None
    assert torch.isfinite(xhat.grad).all()


def test_the_auxiliary_loss_takes_the_best_dead_latents_of_each_token():
    values = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 3.0, 2.0, 1.0]])
    norms = torch.tensor([1.0, 1.0, 1.0, 10.0])
    dead = torch.tensor([False, True, True, True])
    kept = losses.auxiliary_values(values, values * norms, dead, 2)
    assert kept.tolist() == [[0, 0, 2, 3], [0, 3, 0, 1]]


def test_fewer_dead_latents_than_asked_for_are_all_taken():
    values = torch.tensor([[9.0, 1.0, 2.0]])
    assert losses.auxiliary_values(values, values, torch.tensor([False, True, False]), 100).tolist() == [[0, 1, 0]]


def test_the_auxiliary_loss_is_squared_error_over_batch_centred_variance(pair):
    residual, reconstructed = pair
    error = sum(squared_error(residual, reconstructed, i, m) for i in range(B) for m in range(2))
    mean = residual.mean(dim=0)
    variance = sum(squared_error(residual, mean.expand_as(residual), i, m) for i in range(B) for m in range(2))
    loss = losses.auxiliary_loss(residual, reconstructed)
    assert math.isclose(loss.item(), error / variance)
    loss.backward()
    assert torch.allclose(reconstructed.grad, 2 * (reconstructed - residual) / variance)


def test_without_variance_the_auxiliary_loss_is_zero_and_so_is_its_gradient():
    reconstructed = torch.randn(3, 2, D, requires_grad=True)
    loss = losses.auxiliary_loss(torch.zeros(3, 2, D), reconstructed)
    loss.backward()
    assert loss.item() == 0
    assert reconstructed.grad is not None
    assert bool((reconstructed.grad == 0).all())


def test_the_batch_figure_is_a_ratio_of_sums_and_the_published_one_a_mean_of_ratios(pair):
    x, xhat = pair[0], pair[1].detach()
    mean = x.mean(dim=0).expand_as(x)
    for m in range(2):
        errors = [squared_error(x, xhat, i, m) for i in range(B)]
        totals = [squared_error(x, mean, i, m) for i in range(B)]
        ratio = losses.batch_explained_variance(x, xhat)[m]
        assert math.isclose(float(ratio), 1 - sum(errors) / sum(totals))
        published = losses.published_explained_variance(x, xhat)[m]
        assert math.isclose(float(published), sum(1 - e / t for e, t in zip(errors, totals, strict=True)) / B)


def test_the_geometric_median_ignores_how_far_away_an_outlier_is():
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [1.0, -1.0], [1000.0, 0.0]], dtype=torch.float64)
    near = losses.geometric_median(points, iterations=5000, tolerance=1e-12)
    points[-1, 0] = 1e6
    far = losses.geometric_median(points, iterations=5000, tolerance=1e-12)
    assert torch.allclose(near, far, atol=1e-2)
    # Where it is no data point, the unit vectors to all points sum to zero.
    directions = points - far
    assert (directions / directions.norm(dim=-1, keepdim=True)).sum(dim=0).norm() < 0.05
