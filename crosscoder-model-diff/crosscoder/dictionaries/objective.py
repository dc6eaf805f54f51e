"""The training loss of one batch, from its terms (losses.py), by the model's selection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crosscoder.dictionaries import losses
from crosscoder.dictionaries.config import TrainingConfig
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.dictionaries.selection import Selection


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
    reconstruction = losses.reconstruction_loss(x, xhat, config.reconstruction)
    difference = losses.difference_loss(x, xhat) if weights.difference else zero
    penalty = losses.l1_penalty(selection.values, model.W_dec.norm(dim=-1).sum(dim=-1)) if weights.l1 else zero
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
    kept = losses.auxiliary_values(values, scores, dead, auxiliary_latents(config, model.config.d_model))
    return losses.auxiliary_loss(residual, model.decode_without_bias(kept), ranks)
