"""What a dictionary multiplies its inputs by, and what it takes off them before."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from finqa.runtime.errors import UserError


def sample_of(indices: Tensor, max_tokens: int, seed: int) -> Tensor:
    """At most `max_tokens` of the token indices, drawn, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    return indices[torch.randperm(len(indices), generator=generator)[:max_tokens]].sort().values


@torch.no_grad()
def fit_scaling(model: BatchTopKCrosscoder, store: ActivationStore, sample: Tensor, centre: bool) -> None:
    """Set `activation_scales`, so that an input is of length sqrt(d_model) on average, and `activation_means`.

    A crosscoder takes the store's scales, one for each model. A partition and a stagewise SAE have one for both. What
    the store does not know (the scale of a difference, or of centred activations) is measured on the tokens at
    `sample`, in fp64. The store's `largest_norms` are noted.
    """
    model.largest_norms = store.config.largest_norms
    method, d_model = model.config.method, model.config.d_model
    if method in ("batchtopk", "l1", "dedicated") and not centre:
        model.activation_scales = store.config.activation_scales
        return
    if centre or method == "difference-sae":
        means = _mean_inputs(model, store, sample) if centre else None
        lengths = _mean_lengths(model, store, sample, means)
        model.activation_means = None if means is None else means.float()
    else:
        lengths = d_model**0.5 / torch.tensor(store.config.activation_scales, dtype=torch.float64)
    if not bool((lengths > 0).all()):
        raise UserError(f"the activations in {store.folder} leave nothing to learn: their mean length is 0")
    if method in ("partition", "stagewise-sae"):
        lengths = lengths.mean().expand(2)
    model.activation_scales = tuple((d_model**0.5 / lengths).tolist())


@torch.no_grad()
def equal_difference_weight(model: BatchTopKCrosscoder, store: ActivationStore, sample: Tensor) -> float:
    """lambda at which the models' sum and difference weigh alike in |e0|^2 + |e1|^2 + lambda |e1 - e0|^2.

    With u = (e0 + e1)/sqrt(2) and v = (e1 - e0)/sqrt(2) that is |u|^2 + (1 + 2 lambda) |v|^2: alike at
    lambda = (Var u / Var v - 1) / 2, with the variances of the scaled activations. 0 where it would be negative.
    """
    sums = torch.zeros(2, model.config.d_model, dtype=torch.float64)
    squares = torch.zeros(2, dtype=torch.float64)
    for _, raw in store.batches(sample):
        x = model.scale(raw.to(model.b_dec.device)).double().cpu()
        rotated = torch.stack([x[:, 1] + x[:, 0], x[:, 1] - x[:, 0]], dim=1) / 2**0.5
        sums += rotated.sum(dim=0)
        squares += rotated.pow(2).sum(dim=(0, 2))
    of_sum, of_difference = (squares - sums.pow(2).sum(dim=-1) / len(sample)).tolist()
    if of_difference <= 0:
        raise UserError(f"the two models' activations in {store.folder} are the same: there is no difference to weigh")
    return max(0.0, (of_sum / of_difference - 1) / 2)


def _mean_inputs(model: BatchTopKCrosscoder, store: ActivationStore, sample: Tensor) -> Tensor:
    total = torch.zeros(model.config.n_inputs, model.config.d_model, dtype=torch.float64)
    for _, raw in store.batches(sample):
        total += model.inputs(raw.to(model.b_dec.device)).double().sum(dim=0).cpu()
    return total / len(sample)


def _mean_lengths(model: BatchTopKCrosscoder, store: ActivationStore, sample: Tensor, means: Tensor | None) -> Tensor:
    total = torch.zeros(model.config.n_inputs, dtype=torch.float64)
    for _, raw in store.batches(sample):
        inputs = model.inputs(raw.to(model.b_dec.device)).double().cpu()
        total += (inputs if means is None else inputs - means).norm(dim=-1).sum(dim=0)
    return total / len(sample)
