"""The selection of the step by hand: the pairs of token and latent of the largest scores of a batch.

Only pairs above a bound are looked at, and whether it was a good one is known from a count, which is on its way to the
CPU while the GPU goes on. Several processes have a share of the latents each, and all tokens. The bound is the same in
all of them, and so are the counts that they judge it by: each decides what all decide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]  not installed without a GPU
from torch import Tensor

from crosscoder.dictionaries.ranks import Ranks
from crosscoder.dictionaries.selection import shared_best
from crosscoder.training.gpu import kernels

CAPACITY = 4
"""Candidates of the selection that there is room for in a process, over its share of the pairs that are kept."""
BOUND = 0.9
"""Share of the last step's smallest kept score, at first: pairs below are no candidates. It moves so that there are
between ENOUGH and MANY times the pairs that are kept: some room on both sides for what a step changes."""
ENOUGH, MANY = 1.3, 2.0
TILE = 32, 128
"""Tokens and latents of a program that looks at scores."""
SEARCH_STEPS = 40
"""Bounds that are tried where that one was no good, before the selection is made over all pairs."""
SAMPLED_TOKENS = 64
"""Tokens whose scores the search of a bound starts from."""


class OnCpu:
    """A tensor on its way to the CPU, where it arrives once the GPU has done what it had been asked for by then."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._copied = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor


class Selection(NamedTuple):
    """The k * batch pairs of token and latent of the largest scores; of several processes each one's part of them.

    There is room for more pairs than are kept: where scores were not positive, and where the others' were larger. What
    is left is filled with pairs outside the batch of value 0, which are the last ones in order of tokens and of
    latents.
    """

    index: Tensor
    """[pairs], ascending: token * latents + latent."""
    values: Tensor
    """[pairs] fp32."""
    smallest: Tensor
    """[]: the smallest positive score of all that were kept, or infinity."""
    positive: Tensor
    """[latent] int8: whether it is positive for a token; of this process's latents, as all that has a latent."""
    counters: OnCpu
    """[world] int32: each process's pairs above the bound. `least` of them together, `most` in each, and nothing was
    missed."""
    least: int
    most: int

    def is_whole(self) -> bool:
        return self.least <= self.count and self.has_room

    @property
    def count(self) -> int:
        """Pairs above the bound. Waits until they have been counted, as `has_room` does."""
        return sum(self.counters.wait().tolist())

    @property
    def has_room(self) -> bool:
        return max(self.counters.wait().tolist()) <= self.most


class Selector:
    """Selects for one step after the other, from the bound that the last one has left."""

    def __init__(self, bias: Tensor, ranks: Ranks) -> None:
        """`bias` [latent] fp32 is the encoder's of this process's latents, which changes in place."""
        self.bias, self.ranks = bias, ranks
        self.bound, self.bound_share = torch.zeros((), device=bias.device), BOUND

    def forget(self) -> None:
        """To be called after weights were changed from outside: the scores may be others now."""
        self.bound.zero_()

    def select(self, product: Tensor, norms: Tensor, k: int, bound: Tensor | None = None) -> Selection:
        """The selection where the pairs above `bound` suffice for it and there is room for them; see is_whole.

        `product` [batch, latent] of x and the encoder, `norms` [latent] of the scores.
        """
        batch, n_latents = product.shape
        n_keep = self._n_keep(product, k)
        capacity = min(-(-CAPACITY * k * batch // self.ranks.world), product.numel())
        device = product.device
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        positive = torch.zeros(n_latents, dtype=torch.int8, device=device)
        scores, values = torch.full((2, capacity), -1.0, device=device).unbind()
        indices = torch.full((capacity,), outside(product), dtype=index_type(product), device=device)
        kernel: Any = kernels.candidates
        kernel[tuple(map(triton.cdiv, product.shape, TILE))](
            product, self.bias, norms, self.bound if bound is None else bound, counter, scores, values, indices,
            positive, batch, n_latents, capacity, *TILE,
        )  # fmt: skip
        counters = OnCpu(self.ranks.gather(counter).flatten())
        kept = self._largest(scores, values, indices, n_keep, outside(product))
        return Selection(*kept, positive, counters, n_keep, capacity)

    def search(self, product: Tensor, norms: Tensor, k: int) -> Selection:
        """The selection where nothing is known of the scores, as at the first step: tries bounds, and waits.

        All that it goes by was exchanged, so that all processes try the same bounds, and as many.
        """
        n_keep = self._n_keep(product, k)
        sample = product[:: max(1, len(product) // SAMPLED_TOKENS)]
        scores = (torch.relu(sample.float() + self.bias) * norms).flatten()
        n_likely = 2 * k * len(sample)
        best = torch.topk(scores, min(n_likely, len(scores)), sorted=False).values
        likely = best if self.ranks.world == 1 else shared_best(best, n_likely, self.ranks)[0]
        low, high, bound = 0.0, float("inf"), float(likely.min())
        for _ in range(SEARCH_STEPS):
            found = self.select(product, norms, k, torch.tensor(bound, device=product.device))
            if found.is_whole() or (bound == 0 and found.has_room):
                return found
            if found.count >= n_keep:
                low, bound = bound, 2 * bound + 1e-30 if high == float("inf") else (bound + high) / 2
            elif found.has_room:
                high, bound = bound, (low + bound) / 2 if bound > high / 1e6 else 0.0
            else:  # one process has most of the pairs: no bound leaves it room and all of them enough
                break
        values = torch.relu(product.float() + self.bias)
        scores = (values * norms).flatten()
        indices = torch.arange(product.numel(), dtype=index_type(product), device=product.device)
        indices.masked_fill_(scores <= 0, outside(product))
        chosen = self._largest(scores, values.flatten(), indices, n_keep, outside(product))
        return Selection(*chosen, found.positive, found.counters, 0, product.numel())

    def move_bound(self, selection: Selection) -> None:
        """Set the next step's bound from the count, which is there by now, and the smallest score, which may not be."""
        if selection.count > MANY * selection.least:
            self.bound_share = (1 + self.bound_share) / 2
        elif selection.count < ENOUGH * selection.least:
            self.bound_share *= BOUND
        smallest = selection.smallest
        self.bound = torch.where(torch.isfinite(smallest), self.bound_share * smallest, 0.0)

    def _n_keep(self, product: Tensor, k: int) -> int:
        """Pairs that are kept in all processes."""
        return min(k * len(product), product.numel() * self.ranks.world)

    def _largest(
        self, scores: Tensor, values: Tensor, indices: Tensor, n_keep: int, filling: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The n_keep largest scores of all processes: indices of this one's, ascending, and values, `filling` and 0
        where the score is not among them; and the smallest positive score. Where a score is not positive its index is
        `filling` already."""
        top = torch.topk(scores, min(n_keep, len(scores)), sorted=False)
        best, kept, chosen = top.values, top.values > 0, indices[top.indices]
        positive = kept
        if self.ranks.world > 1:
            best, mine = shared_best(best, n_keep, self.ranks)
            positive, kept = best > 0, kept & mine
            chosen.masked_fill_(~mine, filling)
        index, order = torch.sort(chosen)
        return index, (values[top.indices] * kept)[order], torch.where(positive, best, torch.inf).min()


def outside(product: Tensor) -> int:
    """Index of a pair that is behind all of the batch, in order of tokens and of latents: the last latent of the token
    after the last. (Token + latent * tokens is latents * tokens.)"""
    return (len(product) + 1) * product.shape[1] - 1


def index_type(product: Tensor) -> torch.dtype:
    """Dtype of a pair's index, `outside` included."""
    return torch.int32 if outside(product) < 2**31 else torch.int64
