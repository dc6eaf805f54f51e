"""Batch top-k: which latents of a batch are active in training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crosscoder.dictionaries.ranks import ALONE, Ranks


class Selection(NamedTuple):
    """What was kept of a batch."""

    values: Tensor
    """[batch, latent]: the unscaled value where kept, 0 elsewhere; gradients flow to the kept values alone."""
    smallest_score: Tensor
    """[]: smallest positive score that was kept; infinity where none was positive."""


def batch_topk(values: Tensor, scores: Tensor, n_keep: int, ranks: Ranks = ALONE) -> Selection:
    """Keep the values of the `n_keep` largest scores of the whole batch; of equal scores exactly so many.

    `values` and `scores` are [batch, latent], scores without gradient. With several processes they are each one's
    rows, and `n_keep` counts over the rows of all.
    """
    best, indices = torch.topk(scores.flatten(), min(n_keep, scores.numel()), sorted=False)
    chosen = values.flatten()[indices]
    if ranks.world > 1:
        best, mine = shared_best(best, n_keep, ranks)
        chosen = torch.where(mine, chosen, 0.0)
    kept = torch.zeros_like(values).flatten().scatter(0, indices, chosen)
    return Selection(kept.view_as(values), smallest_positive(best))


def smallest_positive(scores: Tensor) -> Tensor:
    """[]: infinity where none is positive."""
    positive = torch.where(scores > 0, scores, torch.inf)
    return positive.min() if positive.numel() else positive.new_tensor(torch.inf)


def shared_best(best: Tensor, n_keep: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The `n_keep` largest scores of all processes, in any order, and which of this one's `best` [n] are among them.

    No process has more than `n_keep` of those, so its own best are all that the others need to know. Of scores that
    are equal at the cut the first processes keep theirs. Nothing here is waited for.
    """
    everyone = ranks.gather(best)
    kept = torch.topk(everyone.flatten(), min(n_keep, everyone.numel()), sorted=False).values
    cut = kept.min()
    above, equal = (everyone > cut).sum(), (everyone == cut).sum(dim=1)
    left = len(kept) - above - equal[: ranks.rank].sum()
    at_cut = best == cut
    return kept, (best > cut) | (at_cut & (at_cut.cumsum(dim=0) <= left))
