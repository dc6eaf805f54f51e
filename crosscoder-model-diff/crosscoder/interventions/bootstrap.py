"""The share of a gap that a patch recovers, with its uncertainty over questions.

    recovered = (m(S) - m(none)) / (m(ceiling) - m(none))

m is a mean over questions. Intervals are paired bootstrap: a resample draws the same questions for all three. Where the
gap's own interval holds 0 there is nothing to recover, and the share is None: neither 0 nor 1 would be true.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finqa.evaluation.metrics import mcnemar

INTERVAL = (0.025, 0.975)
RESAMPLES = 2_000


class Share(NamedTuple):
    """Of one measure over the same questions."""

    n: int
    """Questions."""
    patched: float
    none: float
    ceiling: float
    gap: tuple[float, float]
    """95% interval of m(ceiling) - m(none)."""
    recovered: float | None
    """None where there is no gap."""
    interval: tuple[float, float] | None
    """95%, of the share."""


def resamples(n: int, seed: int = 0, count: int = RESAMPLES) -> Tensor:
    """[count, n] fp64: how often each of n questions is drawn, over n; a mean is a product with it."""
    return draws(n, seed, count) / n


def draws(n: int, seed: int = 0, count: int = RESAMPLES) -> Tensor:
    """[count, n] fp64: how often each of n is drawn in each of `count` resamples."""
    drawn = torch.randint(n, (count, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(count, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def share_recovered(
    patched: Sequence[float], none: Sequence[float], ceiling: Sequence[float], weights: Tensor
) -> Share:
    """A number for each question, and the resamples of these questions."""
    table = torch.tensor([list(patched), list(none), list(ceiling)], dtype=torch.float64)
    m_patched, m_none, m_ceiling = table.mean(dim=1).tolist()
    drawn = table @ weights.T
    low, high = (drawn[2] - drawn[1]).quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    recovered = interval = None
    if not low <= 0 <= high:
        recovered = (m_patched - m_none) / (m_ceiling - m_none) + 0.0  # no minus before a 0
        # A few resamples of few questions have no gap; they say nothing of the share.
        has_gap = drawn[2] != drawn[1]
        ratios = ((drawn[0] - drawn[1]) / (drawn[2] - drawn[1]))[has_gap]
        ends = ratios.quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
        interval = (ends[0], ends[1])
    return Share(table.shape[1], m_patched, m_none, m_ceiling, (low, high), recovered, interval)


def mcnemar_of(patched: Sequence[bool], none: Sequence[bool]) -> float:
    """Exact two-sided p that a patch changes how many questions are right."""
    pairs = list(zip(patched, none, strict=True))
    return mcnemar(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))


def p_above(value: float, null: Sequence[float]) -> float:
    """One-sided p of a value among draws of a null: (1 + draws at least as large) / (1 + draws)."""
    return (1 + sum(draw >= value for draw in null)) / (1 + len(null))
