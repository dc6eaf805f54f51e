"""The active pairs of token and latent of a batch, as the step by hand holds them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """The active pairs in order of their rows: tokens, or latents."""

    starts: Tensor
    """[rows + 1] int32: where each row's pairs begin."""
    other: Tensor
    """[pairs] int32: the latent of each pair in order of tokens, or the token in order of latents."""
    values: Tensor
    """[pairs] fp32."""


class Selection(NamedTuple):
    """The k * batch pairs of token and latent of the largest scores. Pairs without a positive score have value 0."""

    index: Tensor
    """[pairs], ascending: token * latents + latent, 0 where the value is 0."""
    values: Tensor
    """[pairs] fp32."""
    smallest: Tensor
    """[]: the smallest positive score of them, or infinity."""
    positive: Tensor
    """[latent] int8: whether it is positive for a token."""
    counter: Tensor
    """[] int32, on its way to the CPU: the pairs above the bound. `least` to `most` of them and nothing was missed."""
    counted: torch.cuda.Event | None
    least: int
    most: int

    def is_whole(self) -> bool:
        if self.counted is not None:
            self.counted.synchronize()
        return self.least <= int(self.counter) <= self.most


def largest(scores: Tensor, values: Tensor, indices: Tensor, n_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n_keep largest scores: their indices, ascending, and values, both 0 where the score is not positive; and the
    smallest positive score."""
    top = torch.topk(scores, n_keep, sorted=False)
    kept = top.values > 0
    index, order = torch.sort(indices[top.indices] * kept)
    return index, (values[top.indices] * kept)[order], torch.where(kept, top.values, torch.inf).min()


def starts_of(index: Tensor, columns: int, rows: int) -> Tensor:
    """[rows + 1] int32: where each row begins among sorted indices row * columns + column."""
    bounds = torch.arange(rows + 1, device=index.device, dtype=torch.int64) * columns
    return torch.searchsorted(index.long(), bounds, out_int32=True)


def index_type(count: int) -> torch.dtype:
    return torch.int32 if count < 2**31 else torch.int64


def latents_first(encoder: Tensor) -> Tensor:
    """[2, d_model, latent] -> [latent, 2 * d_model], a view."""
    return encoder.reshape(-1, encoder.shape[-1]).t()


def sum_of_squares(tensor: Tensor) -> Tensor:
    """[]: the sum of its squares, fp32."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float32) ** 2
