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
    best, indices = torch.topk(scores.flatten(), min(n_keep, scores.numel()), sorted=ranks.world > 1)
    chosen = values.flatten()[indices]
    if ranks.world > 1:
        best, n_here = _share(best, n_keep, ranks)
        chosen = torch.where(torch.arange(len(chosen), device=chosen.device) < n_here, chosen, 0.0)
    kept = torch.zeros_like(values).flatten().scatter(0, indices, chosen)
    return Selection(kept.view_as(values), smallest_positive(best))


def smallest_positive(scores: Tensor) -> Tensor:
    """[]: infinity where none is positive."""
    positive = torch.where(scores > 0, scores, torch.inf)
    return positive.min() if positive.numel() else positive.new_tensor(torch.inf)


def _share(best: Tensor, n_keep: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The `n_keep` largest scores of all processes, and how many [] of this one's descending `best` are among them.

    No process has more than `n_keep` of those, so its own best are all that the others need to know. Of scores that
    are equal at the cut the first processes keep theirs. Nothing here is waited for.
    """
    everyone = ranks.gather(best)
    kept = torch.topk(everyone.flatten(), min(n_keep, everyone.numel()), sorted=True).values
    above, equal = (everyone > kept[-1]).sum(dim=1), (everyone == kept[-1]).sum(dim=1)
    left = len(kept) - above.sum() - equal[: ranks.rank].sum()
    return kept, above[ranks.rank] + torch.minimum(left.clamp(min=0), equal[ranks.rank])
