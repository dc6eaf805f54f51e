"""AUROC for many items at once, exact with ties, and how sure one is of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finqa.evaluation.metrics import wilson

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval and what it stands on. All three figures are None where there is nothing to
    estimate it from: an empty class has no value, neither 0 nor 1."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """What the figure is taken over: positives of an AUROC, members of a share."""
    n_others: int = 0
    """Negatives of an AUROC."""


def ranks(values: Tensor) -> Tensor:
    """[n, items] -> [n, items] fp64: ranks from 1 within each item, the mean rank for equal values."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.cpu().numpy(), axis=0, method="average"))


def auroc(values: Tensor, positive: Tensor) -> Tensor:
    """[n, items] and [n, classes] bool -> [items, classes] fp64: the chance that a positive has the larger value, ties
    by half. Not a number for a class of all or none of the rows."""
    return auroc_of_ranks(ranks(values), positive)


def auroc_of_ranks(ranked: Tensor, positive: Tensor) -> Tensor:
    """AUROCs from `ranks`, which need to be computed once for any number of labellings."""
    member = positive.to(ranked)
    n_positive = member.sum(dim=0)
    n_negative = len(member) - n_positive
    above = ranked.T @ member - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)


def auroc_sparse(item: Tensor, value: Tensor, positive: Tensor, n_items: int, n_positive: int, n_all: int) -> Tensor:
    """[n_items] fp64: AUROC of items that are 0 on most of `n_all` rows, from their positive values alone.

    Args:
        item, value, positive: [entries] each: whose value it is, the value (above 0), whether its row is a positive.
        n_positive: Rows that are positives, of all.
    """
    # By item, then by value: two stable sorts.
    order = value.argsort(stable=True)
    order = order[item[order].argsort(stable=True)]
    item, value, positive = item[order], value[order], positive[order].double()
    counts = torch.bincount(item, minlength=n_items)
    zeros = n_all - counts
    # Mean rank of each run of equal values of one item, its zeros below it.
    first = torch.ones(len(item), dtype=torch.bool)
    first[1:] = (item[1:] != item[:-1]) | (value[1:] != value[:-1])
    run = first.long().cumsum(0) - 1
    length = torch.bincount(run)
    ends = length.cumsum(0)
    start_of_item = counts.cumsum(0) - counts
    rank = (ends - (length - 1) / 2)[run] - start_of_item[item] + zeros[item]
    positive_counts = torch.zeros(n_items, dtype=torch.float64).index_add_(0, item, positive)
    rank_sums = torch.zeros(n_items, dtype=torch.float64).index_add_(0, item, positive * rank)
    rank_sums += (n_positive - positive_counts) * (zeros + 1) / 2
    return (rank_sums - n_positive * (n_positive + 1) / 2) / (n_positive * (n_all - n_positive))


def auroc_estimate(values: Tensor, positive: Tensor) -> Estimate:
    """AUROC of one item, with its interval, from [n] values and [n] bool; NaN values are left out."""
    known = ~values.isnan()
    values, positive = values[known], positive[known]
    n, n_others = int(positive.sum()), int((~positive).sum())
    if not n or not n_others:
        return Estimate(None, None, None, n, n_others)
    area = float(auroc(values[:, None], positive[:, None]))
    return Estimate(area, *auroc_interval(area, n, n_others), n, n_others)


def auroc_interval(area: float, n: int, n_others: int) -> tuple[float, float]:
    """95% interval of an AUROC from n positives and n_others negatives; valid at 0, at 1 and for one positive.

    Newcombe, Statistics in Medicine 25 (2006) 559-573, method 5: the areas whose distance is 1.96 times the standard
    error of Hanley and McNeil at that area, with both groups' sizes in its bracket replaced by their mean. At 1/2 that
    is the exact variance without ties, (n + n_others + 1) / (12 n n_others).
    """
    from scipy.optimize import brentq

    mean = (n + n_others) / 2

    def beyond(theta: float) -> float:
        bracket = 2 * mean - 1 - (3 * mean - 3) / ((2 - theta) * (1 + theta))
        return (theta - area) ** 2 - Z_95**2 * theta * (1 - theta) * bracket / (n * n_others)

    # At 0 and at 1 the standard error is 0 too: the interval's other end is looked for from just inside.
    inside = min(max(area, 1e-9), 1 - 1e-9)
    low: Any = 0.0 if area == 0 else brentq(beyond, 0, inside)
    high: Any = 1.0 if area == 1 else brentq(beyond, inside, 1)
    return float(low), float(high)


def share(k: int, n: int) -> Estimate:
    """k of n, with Wilson's interval; no value where n is 0."""
    return Estimate(k / n, *wilson(k, n), n) if n else Estimate(None, None, None, 0)
