"""How exclusive to the fine-tuned model an item is, by each measure that is defined for it.

`delta`        Delta of the two decoder norms (analysis.measures.delta): what the dictionary writes into each model
`1 - nu_err`   latent scaling with the fine-tuned model's vector as the probe (latent_scaling.py), where its slopes
               can be trusted: enough firings, a positive slope in the fine-tuned model, a ratio that means something
`delta_slope`  Delta with slopes in place of norms: how far each model's activation goes along the item's direction
               where the item is active

A difference SAE has one decoder vector a latent, so neither of the first two is defined for it, and that a latent
reads the difference does not say whose doing the difference is: the fine-tuned model may have added a feature, the
instruct model may have had one that is gone, or both have it, one more of it. `delta_slope` tells these apart by the
models' own activations: with b[m] the slope, least squares with an intercept, of <x[m], D>/|D|^2 on the item's value,
it is Delta of (|b[0]|, |b[1]|): 1 where only the fine-tuned model moves, 0 where only the instruct model does, 1/2
where both move alike. It is bounded, needs no decoder norm, and so stands for exclusivity wherever there is no Delta;
it is given for every method, as the one measure by which all can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.latent_scaling import MIN_FIRINGS, latent_scaling
from study.measures.readouts import BATCH_TOKENS, Subject

Measure = Literal["delta", "1 - nu_err", "delta_slope"]


@dataclass(frozen=True)
class Exclusivity:
    """Measures of exclusivity for every item, on the CPU. A measure that a subject lacks is not in the mappings."""

    measures: dict[Measure, Tensor]
    """[items] fp64 each, large for the fine-tuned model's own; not a number where it cannot be trusted."""
    classes: dict[str, Tensor]
    """[items] bool each, the fine-tuned-only items: `delta` (Delta above 0.9), `confirmed` (those that latent scaling
    confirms), `delta_slope` (delta_slope above 0.9, with as many firings as latent scaling asks for)."""
    n_unreliable: int | None
    """Active items whose nu_err cannot be trusted; None where it is not defined."""


def exclusivity(subject: Subject, store: ActivationStore, indices: Tensor) -> Exclusivity:
    """Over the tokens `indices`, best of documents that the dictionary was not trained on; two passes at most."""
    measures: dict[Measure, Tensor] = {}
    classes: dict[str, Tensor] = {}
    n_unreliable = None
    if subject.compares:
        assert subject.model is not None
        delta = analysis.delta(analysis.decoder_norms(subject.model)).double()
        scaling = latent_scaling(subject.model, (raw for _, raw in store.batches(indices, BATCH_TOKENS)))
        reliable = scaling.trusted
        measures["delta"] = delta
        measures["1 - nu_err"] = torch.where(reliable, 1 - scaling.nu_err[:, 1], torch.nan)
        n_unreliable = int((~reliable & (scaling.n > 0)).sum())
        classes["delta"] = delta > analysis.FINE_TUNED_ONLY_ABOVE
        classes["confirmed"] = classes["delta"] & scaling.exclusive[:, 1]
    if subject.directions is not None:
        slopes, n = activation_slopes(subject, subject.directions, store, indices)
        measures["delta_slope"] = analysis.delta(slopes.abs())
        enough = n >= MIN_FIRINGS
        classes["delta_slope"] = enough & (measures["delta_slope"] > analysis.FINE_TUNED_ONLY_ABOVE)
    return Exclusivity(measures, classes, n_unreliable)


@torch.no_grad()
def activation_slopes(
    subject: Subject, directions: Tensor, store: ActivationStore, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """([items, 2] fp64, [items] int64), on the CPU: slope of each model's activation along D on the item's value, by
    least squares with an intercept, and on how many of the tokens the item is active; one pass.

    Not a number for an item that has one value throughout, or no direction.
    """
    n_items = len(directions)
    # Along D / |D|^2, the slope of a model that has exactly `value * D` in it is 1.
    along = (directions / directions.pow(2).sum(dim=-1, keepdim=True)).float().T
    device = along.device
    sums = {name: torch.zeros(n_items, dtype=torch.float64, device=device) for name in ("value", "square", "active")}
    projected = torch.zeros(n_items, 2, dtype=torch.float64, device=device)
    products = torch.zeros_like(projected)
    for _, raw in store.batches(indices, BATCH_TOKENS):
        raw = raw.to(device)
        value = subject.read(raw)
        sums["value"] += value.sum(dim=0, dtype=torch.float64)
        sums["square"] += value.double().pow(2).sum(dim=0)
        sums["active"] += (value > 0).sum(dim=0)
        for m in range(2):
            along_direction = raw[:, m].float() @ along
            projected[:, m] += along_direction.sum(dim=0, dtype=torch.float64)
            products[:, m] += (value * along_direction).sum(dim=0, dtype=torch.float64)
    mean = sums["value"] / len(indices)
    variance = sums["square"] - len(indices) * mean**2
    slopes = (products - mean[:, None] * projected) / torch.where(variance > 0, variance, torch.nan)[:, None]
    return slopes.cpu(), sums["active"].long().cpu()
