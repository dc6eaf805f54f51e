"""The terms of the training loss, and the explained variance of one batch. All on scaled activations."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.dictionaries.config import Reconstruction
from crosscoder.dictionaries.ranks import ALONE, Ranks


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
