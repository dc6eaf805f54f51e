"""The statistics of the verdicts: an exact sign-flip test, Holm's correction, intervals over metrics and fine-tunes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from crosscoder.interventions.causal_rows import INTERVAL, RESAMPLES, draws

TOLERANCE = 1e-9
"""Sums that differ by less are equal: they are sums of the same numbers in another order."""


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided p that differences are symmetric about 0: the share of all 2^n choices of their signs whose sum
    is at least as far from 0 as theirs. 1/32,768 at least for 16 differences."""
    values = torch.tensor(differences, dtype=torch.float64)
    sums = torch.zeros(1, dtype=torch.float64)
    for value in values:
        sums = torch.cat([sums - value, sums + value])
    return float((sums.abs() >= values.sum().abs() - TOLERANCE).double().mean())


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p by name (Holm 1979): each is the largest, so far, of p times the number of tests not yet passed."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda one: one[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - place)))
        adjusted[name] = largest
    return adjusted


def clustered_interval(
    statistic: Callable[[Tensor], Tensor], n_metrics: int, n_seeds: int, seed: int = 0
) -> tuple[float, float] | None:
    """95% bootstrap interval, clustered by metric and by fine-tuning seed.

    Both are drawn with replacement, metrics and seeds apart, so that what is common to a metric or to a fine-tune is
    not counted as so many observations.

    Args:
        statistic: Weights [resamples, metrics, seeds], each resample's of sum 1, to [resamples]; what is not a number
            there is left out.

    Returns None where no resample gives a number.
    """
    of_metrics, of_seeds = draws(n_metrics, seed, RESAMPLES), draws(n_seeds, seed + 1, RESAMPLES)
    weights = of_metrics[:, :, None] * of_seeds[:, None, :] / (n_metrics * n_seeds)
    found = statistic(weights)
    found = found[found.isfinite()]
    if not len(found):
        return None
    low, high = found.quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return low, high
