"""The training loss of a batch and its terms, and the explained variance of one batch. All on scaled activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crosscoder.dictionaries.config import Reconstruction, TrainingConfig
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.dictionaries.selection import Selection


def reconstruction_loss(x: Tensor, xhat: Tensor, kind: Reconstruction) -> Tensor:
    """[batch, 2, d_model] twice -> []. TrainingConfig.reconstruction has the two definitions."""
    squared = (x - xhat).pow(2).sum(dim=-1)
    if kind == "mse":
        return squared.sum(dim=-1).mean()
    # The gradient of a norm at exactly zero is not a number; an error that small has no gradient to give.
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt().mean()


def difference_loss(x: Tensor, xhat: Tensor) -> Tensor:
    """[batch, 2, d_model] twice -> []: |e[1] - e[0]|^2 with e = x - xhat, summed over features, mean over tokens."""
    error = x - xhat
    return (error[:, 1] - error[:, 0]).pow(2).sum(dim=-1).mean()


def l1_penalty(values: Tensor, norms: Tensor) -> Tensor:
    """Sum over latents of value times decoder norms, mean over tokens (Lindsey et al. 2024).

    `values` [batch, latent]; `norms` [latent], the sum of a latent's decoder norms, is not detached: else values would
    shrink at no cost while the norms grow.
    """
    return (values * norms).sum(dim=-1).mean()


def auxiliary_values(values: Tensor, scores: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """[batch, latent] `values` of the `k_aux` dead latents of the largest score of each token, 0 elsewhere.

    `dead` is a [latent] mask. Gradients flow to the values kept.
    """
    candidates = dead.nonzero().squeeze(-1)
    n_keep = min(k_aux, len(candidates))
    best = torch.topk(scores[:, candidates], n_keep, dim=-1, sorted=False).indices
    indices = candidates[best]
    return torch.zeros_like(values).scatter(-1, indices, values.gather(-1, indices))


def auxiliary_loss(residual: Tensor, reconstructed: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """How much of the residual the dead latents leave: squared error over the residual's batch-centred variance.

    `residual` [batch, 2, d_model] without gradient, `reconstructed` the dead latents' decoding without bias; both
    models are one vector. 1 is no better than nothing on a centred residual; 0 where the variance is 0. With several
    processes the variance is that of all rows, and the mean of their losses is the loss.
    """
    error = ranks.world * (residual - reconstructed).pow(2).sum()
    mean = ranks.mean(residual.mean(dim=0))
    variance = ranks.sum((residual - mean).pow(2).sum())
    return error / torch.where(variance > 0, variance, torch.inf)


def batch_explained_variance(x: Tensor, xhat: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """[2]: 1 - squared error / squared distance from the batch mean, for each input. For logs: the figure that is
    reported is crosscoder.analysis.measures.explained_variance, on held-out documents."""
    error = (x - xhat).pow(2).sum(dim=(0, 2))
    total = (x - ranks.mean(x.mean(dim=0))).pow(2).sum(dim=(0, 2))
    return 1 - ranks.sum(error) / ranks.sum(total)


def published_explained_variance(x: Tensor, xhat: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """[2]: mean over tokens of 1 - |error|^2 / |x - batch mean|^2, for each input, as the published run logged it
    on its training batches. Compare it with nothing else: a token near the mean weighs as much as any other."""
    error = (x - xhat).pow(2).sum(dim=-1)
    total = (x - ranks.mean(x.mean(dim=0))).pow(2).sum(dim=-1)
    return ranks.mean((1 - error / total).mean(dim=0))


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """[n, d] -> [d]: the point of the smallest summed distance to all, by Weiszfeld's iteration."""
    median = points.mean(dim=0)
    for _ in range(iterations):
        distances = (points - median).norm(dim=-1).clamp_min(1e-12)
        weights = 1 / distances
        new = (points * weights[:, None]).sum(dim=0) / weights.sum()
        if (new - median).norm() <= tolerance * median.norm():
            return new
        median = new
    return median


class Weights(NamedTuple):
    """What the loss depends on besides the settings."""

    k: int
    l1: float
    difference: float
    """lambda."""


class Terms(NamedTuple):
    """The loss of a batch, its parts before their weights, and what they were computed from."""

    loss: Tensor
    reconstruction: Tensor
    difference: Tensor
    l1: Tensor
    auxiliary: Tensor
    values: Tensor
    """[batch, latent]: after ReLU, before the selection."""
    selection: Selection
    xhat: Tensor
    """[batch, 2, d_model]."""


def objective(
    model: BatchTopKCrosscoder,
    x: Tensor,
    config: TrainingConfig,
    weights: Weights,
    dead: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Terms:
    """Loss of scaled `x` [batch, 2, d_model]: reconstruction + lambda * difference + coefficient * l1 + weight * aux.

    `dead` is the [latent] mask of the auxiliary loss; without one, or with no dead latent, there is none. With several
    processes `x` are one's own rows, and the mean over the processes is the loss of the batch.
    """
    zero = torch.zeros((), device=x.device)
    values = model.activations(x)
    selection = model.select_batch_topk(values, weights.k, ranks)
    xhat = model.decode(selection.values)
    reconstruction = reconstruction_loss(x, xhat, config.reconstruction)
    difference = difference_loss(x, xhat) if weights.difference else zero
    penalty = l1_penalty(selection.values, model.W_dec.norm(dim=-1).sum(dim=-1)) if weights.l1 else zero
    auxiliary = zero
    if config.aux_weight and dead is not None and bool(dead.any()):
        auxiliary = _auxiliary(model, values, (x - xhat).detach(), dead, config, ranks)
    loss = reconstruction + weights.difference * difference + weights.l1 * penalty + config.aux_weight * auxiliary
    return Terms(loss, reconstruction, difference, penalty, auxiliary, values, selection, xhat)


def auxiliary_latents(config: TrainingConfig, d_model: int) -> int:
    """Dead latents a token in the auxiliary loss, at most."""
    return config.aux_k or max(1, d_model // 2)


def _auxiliary(
    model: BatchTopKCrosscoder, values: Tensor, residual: Tensor, dead: Tensor, config: TrainingConfig, ranks: Ranks
) -> Tensor:
    scores = values.detach() * model.selection_norms().detach()
    kept = auxiliary_values(values, scores, dead, auxiliary_latents(config, model.config.d_model))
    return auxiliary_loss(residual, model.decode_without_bias(kept), ranks)
